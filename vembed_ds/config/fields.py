"""The types of single values, and the base of all sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vembed_ds.tracker_names import tracker_names

COLUMN_ROLES = (
    "query",
    "query_image",
    "positive",
    "positive_image",
    "negatives",
    "negative_images",
    "label",
    "score",
    "pos_scores",
    "neg_scores",
)

MODE_LETTERS = ("t", "i", "m", "x")


def as_tuple(value: Any) -> Any:
    """YAML has lists only; tuples keep the frozen models immutable."""
    return tuple(value) if isinstance(value, list) else value


def plain_int(value: Any) -> Any:
    """Refuse ``true`` and ``1.0``, which a Literal takes for 1."""
    if value is not None and type(value) is not int:
        raise ValueError("expected 1 or 2 or null")
    return value


def none_word(value: Any) -> Any:
    """``null`` means the word "none": an override ``report_to=none`` is read as null."""
    return "none" if value is None else value


def tracker_words(value: Any) -> Any:
    """Names of trackers, also in a list, with commas between them; ``null`` as in :func:`none_word`."""
    value = none_word(value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = ",".join(value) or "none"
    if isinstance(value, str) and value not in ("none", "all"):
        return ",".join(tracker_names(value))
    return value


def known_roles(value: dict[str, str]) -> dict[str, str]:
    """Refuse a role that no column has."""
    if unknown := [role for role in value if role not in COLUMN_ROLES]:
        raise ValueError(f"unknown role {unknown[0]!r}; expected one of {', '.join(COLUMN_ROLES)}")
    return value


def one_class_each(value: tuple[dict[str, dict[str, Any]], ...]) -> Any:
    """Refuse list entries that name several classes, or none."""
    if any(len(entry) != 1 for entry in value):
        raise ValueError("expected one class per list entry: [{ClassName: {argument: value}}, ...]")
    return value


def known_mode(value: str) -> str:
    """Refuse what is not two of the letters around a 2."""
    first, _, last = value.partition("2")
    if first not in MODE_LETTERS or last not in MODE_LETTERS:
        raise ValueError(
            "expected QUERY2POSITIVE with the letters t (text), i (image), m (text and image), "
            "x (what the record holds), for example t2i"
        )
    return value


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
DataPaths = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)], BeforeValidator(as_tuple)
]
Names = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Augmentations = Annotated[
    tuple[dict[str, dict[str, Any]], ...],
    BeforeValidator(as_tuple),
    AfterValidator(one_class_each),
]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, no conversion between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class ScratchModel(Section):
    """A model that starts from random weights: ``{config: {model_type: ...}, processor: ...}``."""

    config: dict[str, Any] = Field(description="Hugging Face config values; must name model_type.")
    processor: Text | dict[str, Any] | None = Field(
        default=None,
        description="Folder or name of tokenizer and image processor, or image processor settings.",
    )

    @model_validator(mode="after")
    def _named_types(self) -> ScratchModel:
        if "model_type" not in self.config:
            raise ValueError('the model\'s config has no "model_type"; add it, for example resnet')
        if isinstance(self.processor, dict) and "image_processor_type" not in self.processor:
            raise ValueError(
                'the processor\'s settings have no "image_processor_type"; '
                "add it, for example ConvNextImageProcessor"
            )
        return self


ModelReference = Text | ScratchModel
