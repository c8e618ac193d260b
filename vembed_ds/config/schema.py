"""The typed, frozen configuration; the only home of defaults.

Every leaf name is unique over all sections, so a key can be written flat (``lr: 1e-4``) or in its
section (``optimizer: {lr: 1e-4}``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from vembed_ds.config.compat import ENCODER_FAMILIES
from vembed_ds.config.distillation import DistillationConfig
from vembed_ds.config.fields import (
    COLUMN_ROLES,
    Augmentations,
    DataPaths,
    Decay,
    ModelReference,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    as_tuple,
    known_mode,
    known_roles,
    plain_int,
    tracker_words,
)

ALIASES = {
    "hard_topk": "hard_mining_topk",
    "model_name_or_path": "model_name",
    "learning_rate": "lr",
}
"""Other spellings of a key, as vembed-factory's files have them, to the key's name here."""


class ModelConfig(Section):
    """The encoder: backbones, pooling, projection, what is frozen, precision."""

    model_name: ModelReference | None = Field(
        default=None,
        description="Hub name, folder, `package:NAME/folder` or `{config: ...}` of one shared encoder.",
    )
    encoder_mode: Literal["auto", "composed", *ENCODER_FAMILIES] = Field(  # type: ignore[valid-type]
        default="auto",
        description="`composed` builds one encoder of two towers; vembed-factory's families mean auto, and must not contradict the model's own config.",
    )
    text_model_name: ModelReference | None = Field(
        default=None, description="Text tower of a composed encoder."
    )
    image_model_name: ModelReference | None = Field(
        default=None, description="Image tower of a composed encoder."
    )
    pooling_method: Literal["cls", "mean", "last_token", "pooler", "none"] | None = Field(
        default=None,
        description="How token states become one vector; none: they stay one vector per token (late interaction) (composed: of the text tower); null: what a sentence-transformers folder states, else by what the model is.",
    )
    projection_dim: PositiveInt | None = Field(
        default=None, description="Width of the projection; null: none, or 512 when composed."
    )
    projection_layers: Annotated[Literal[1, 2] | None, BeforeValidator(plain_int)] = Field(
        default=None, description="Layers of the projection; null: 1, or 2 when composed."
    )
    topk_tokens: NonNegativeInt = Field(
        default=0,
        description="With pooling_method none: patches of an image that are kept beside its class token, the most like it; 0: all.",
    )
    freeze_text_encoder: bool = Field(default=False, description="Train no text tower weights.")
    freeze_image_encoder: bool = Field(default=False, description="Train no image tower weights.")
    cache_frozen_encoder: bool = Field(
        default=True,
        description="Run a frozen tower once for every text or image, and keep its features on the disk for this and later runs (images: without image_augmentation).",
    )
    frozen_features_dir: Text | None = Field(
        default=None,
        description="Folder of these features, which all ranks see and runs may share; null: output_dir/frozen_features.",
    )
    use_lora: bool = Field(
        default=False, description="Train low-rank adapters instead of the backbones' weights."
    )
    lora_r: PositiveInt = Field(default=16, description="Rank of the adapters.")
    lora_alpha: PositiveFloat = Field(
        default=32, description="An adapter is scaled by lora_alpha / lora_r."
    )
    lora_dropout: Decay = Field(default=0.05, description="Dropout of the adapters' input.")
    lora_target_modules: Literal["all-linear"] | Names | None = Field(
        default=None,
        description="Names of the layers to adapt, or `all-linear`; null: the linear layers of attention and feed-forward blocks.",
    )
    lora_modules_to_save: Names | None = Field(
        default=None, description="Backbone modules that are trained whole beside the adapters."
    )
    use_dora: bool = Field(
        default=False, description="DoRA: also train the length of every adapted row."
    )
    use_rslora: bool = Field(
        default=False, description="rsLoRA: scale by lora_alpha / sqrt(lora_r)."
    )
    load_in_4bit: bool = Field(
        default=False,
        description="QLoRA: hold the weights of the adapted layers in 4 bit (nf4, double quantisation); needs the extra `qlora`, ZeRO stage 0 to 2.",
    )
    freeze_batch_norm: bool = Field(
        default=False, description="Keep the running statistics of batch norm layers fixed."
    )
    max_seq_length: PositiveInt | None = Field(
        default=None, description="Tokens a text is cut to; null: the tokenizer's limit."
    )
    attn_implementation: Literal["eager", "sdpa"] | None = Field(
        default=None, description="Attention kernel; null: the model's own choice."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in backward to save memory."
    )
    activation_checkpointing: Literal["huggingface", "deepspeed"] = Field(
        default="huggingface", description="Mechanism used when gradient_checkpointing is true."
    )
    gradient_checkpointing_slice_size: PositiveInt | None = Field(
        default=None,
        description="With gradient_checkpointing, and best without use_gradient_cache: every layer takes the whole batch, so many items at a time, before the next one does. ZeRO-3 then gathers a layer at most twice per step, and only its inputs are kept; but all items are padded to the longest; null: a layer takes its items at once.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that a model's repository brings, with your rights; only for models that need it, from people you trust.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Number format of weights and activations."
    )


class DatasetEntry(Section):
    """One of several data sets; what is null is as it is for all."""

    name: Text | None = None
    data_path: DataPaths
    val_data_path: DataPaths | None = None
    weight: PositiveFloat = 1.0
    image_root: str | None = None
    allow_images_outside_root: bool | None = None
    allow_image_urls: bool | None = None
    column_mapping: Annotated[dict[str, str], AfterValidator(known_roles)] | None = None
    retrieval_mode: Annotated[str, AfterValidator(known_mode)] | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    max_negatives: PositiveInt | None = None
    loss: dict[str, Any] = Field(default={})


DatasetEntries = Annotated[tuple[DatasetEntry, ...], BeforeValidator(as_tuple)]


class DataConfig(Section):
    """Pairs, images and how they are read."""

    data_path: DataPaths | None = Field(
        default=None,
        description="Training pairs: file (.jsonl .csv .tsv .parquet, WebDataset .tar; patterns such as a-{000..127}.tar), data set folder or hub name, or a list.",
    )
    val_data_path: DataPaths | None = Field(
        default=None, description="Validation pairs, in the same forms; null: no evaluation."
    )
    datasets: DatasetEntries = Field(
        default=(),
        description="Instead of data_path, several data sets: a list of mappings with data_path and, where they differ, name, val_data_path, weight (passes per epoch), image_root, allow_images_outside_root, allow_image_urls, column_mapping, retrieval_mode, query_instruction, document_instruction, max_negatives, loss (keys of the section loss; needs batching: homogeneous).",
    )
    batching: Literal["mixed", "homogeneous"] = Field(
        default="mixed",
        description="Of several data sets: every global batch mixes them, or comes from one.",
    )
    streaming: bool = Field(
        default=False,
        description="Read the training data row by row instead of converting it first; needs max_steps. docs/streaming.md says what it cannot do.",
    )
    shuffle_buffer: PositiveInt = Field(
        default=10_000,
        description="With streaming, rows held in memory by each rank, among which the next one is drawn; 1: the order of each file.",
    )
    no_duplicates: bool = Field(
        default=False,
        description="No query, positive or negative twice in a global batch; reads every record once at the start.",
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        default="fail",
        description="What a record does that cannot be used; skip: all records are tried before training, and the bad ones left out and listed.",
    )
    max_bad_records: NonNegativeInt = Field(
        default=100, description="Most records of a data set that may be skipped."
    )
    image_root: str = Field(
        default="",
        description="Folder that relative image paths start from, and that no image path may leave; empty: the working folder, and any path.",
    )
    allow_images_outside_root: bool = Field(
        default=False,
        description="Image paths may leave image_root: absolute, by `..` or by links.",
    )
    allow_image_urls: bool = Field(
        default=False,
        description="Images may be http and https URLs of public addresses, fetched whenever they are needed (64 MiB and 60 s each, no proxy).",
    )
    column_mapping: Annotated[dict[str, str], AfterValidator(known_roles)] = Field(
        default={}, description=f"Column of each role ({', '.join(COLUMN_ROLES)})."
    )
    retrieval_mode: Annotated[str, AfterValidator(known_mode)] = Field(
        default="t2i",
        description="What searches what, QUERY2POSITIVE: t is text, i is image, m is text and image together, x is what the record holds.",
    )
    query_instruction: str = Field(
        default="",
        description="Put before every query's text; a vision-language model's system message.",
    )
    document_instruction: str = Field(
        default="", description="The same for positives and negatives."
    )
    prompt: Text | None = Field(
        default=None,
        description="Instruction of a vision-language model where no other is given (vembed-factory).",
    )
    max_negatives: PositiveInt | None = Field(
        default=None,
        description="Most explicit negatives of one record, drawn anew in every epoch; null: all.",
    )
    num_workers: NonNegativeInt = Field(default=4, description="Loader processes per rank.")
    prefetch_factor: PositiveInt = Field(
        default=2, description="Batches that a rank's loader processes together prepare ahead."
    )
    loader_timeout_seconds: PositiveFloat | None = Field(
        default=None,
        description="Longest wait for a loader process before the run fails; null: half of timeout_minutes.",
    )
    pin_memory: bool = Field(default=True, description="Page-locked chunks, for faster copies.")
    persistent_workers: bool = Field(
        default=True,
        description="Accepted from vembed-factory; one loader serves the whole run anyway.",
    )
    image_augmentation: Augmentations = Field(
        default=(), description="Kornia classes in order: `[{ClassName: {argument: value}}, ...]`."
    )


class LossConfig(Section):
    """The training objective."""

    loss_type: Literal[
        "infonce", "sigmoid", "triplet", "cosent", "colbert", "in_batch_hard", "hard_negative"
    ] = Field(
        default="infonce",
        description="The loss; docs/losses.md has formulas and sources. hard_negative is another name of in_batch_hard.",
    )
    temperature: Annotated[float, Field(ge=1e-4)] = Field(
        default=0.05,
        description="Divides the similarities, with infonce, colbert and in_batch_hard; at least 1e-4.",
    )
    learnable_temperature: bool = Field(
        default=False,
        description="Train the temperature, with the same losses; sigmoid always trains its scale.",
    )
    loss_bidirectional: bool = Field(
        default=False,
        description="Also search the queries with the positives: short for loss_directions [query_to_doc, doc_to_query], per_direction.",
    )
    loss_directions: Annotated[
        tuple[Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"], ...],
        Field(min_length=1),
        BeforeValidator(as_tuple),
    ] = Field(
        default=("query_to_doc",),
        description="What is compared with what, with infonce and colbert; query_to_doc always.",
    )
    loss_partition: Literal["joint", "per_direction"] = Field(
        default="joint",
        description="One softmax over the columns of all directions, or the mean of one per direction.",
    )
    negatives_scope: Literal["shared", "own"] = Field(
        default="shared",
        description="Explicit negatives are seen by all queries, or by their own only, with infonce, colbert, in_batch_hard and sigmoid.",
    )
    label_mode: Literal["multi_positive", "mask", "ignore"] | None = Field(
        default=None,
        description="Other columns of the same label are positives, are left out, or count as negatives; null: positives with infonce and sigmoid, left out with the others.",
    )
    mask_duplicates: bool = Field(
        default=False,
        description="Leave out columns that hold the same as the row's own partner.",
    )
    guide_model_name: Text | None = Field(
        default=None,
        description="A frozen model that judges which columns are no negatives (GIST): a reference as in model_name, or a folder of ours. It embeds all items before training.",
    )
    guide_query_instruction: str | None = Field(
        default=None,
        description="Put before the queries' texts for the guide; null: what its folder states.",
    )
    guide_document_instruction: str | None = Field(
        default=None, description="The same for positives and negatives."
    )
    guide_margin: NonNegativeFloat = Field(
        default=0.0,
        description="Leave out columns that the guide finds closer than the row's own pair minus this.",
    )
    guide_margin_type: Literal["absolute", "relative"] = Field(
        default="absolute",
        description="The margin itself, or as a share of the similarity of the row's own pair.",
    )
    init_logit_scale: float = Field(
        default=2.6592, description="Start of the trained scale of sigmoid; exp multiplies."
    )
    init_logit_bias: float = Field(
        default=-10.0, description="Start of the trained bias of sigmoid."
    )
    triplet_margin: NonNegativeFloat = Field(default=0.5, description="Margin of triplet.")
    cosent_scale: PositiveFloat = Field(
        default=20.0, description="Multiplies the similarities of cosent."
    )
    maxsim_reduction: Literal["mean", "sum"] = Field(
        default="mean", description="MaxSim of colbert: mean or sum over the query's tokens."
    )
    hard_mining_topk: PositiveInt = Field(
        default=16, description="Negatives per query of in_batch_hard: the closest ones."
    )
    use_all_negatives: bool = Field(
        default=False, description="in_batch_hard takes all negatives after all."
    )
    use_mrl: bool = Field(
        default=False, description="Matryoshka: sum the loss over prefixes of the embeddings."
    )
    mrl_dims: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(as_tuple)] = (
        Field(
            default=(768, 512, 256, 128),
            description="Widths of the prefixes, used with use_mrl; none wider than the embeddings.",
        )
    )
    mrl_weights: Annotated[
        tuple[NonNegativeFloat, ...] | None, Field(min_length=1), BeforeValidator(as_tuple)
    ] = Field(default=None, description="Weights, in the order of mrl_dims; null: 1 each.")
    mrl_layers: Annotated[
        tuple[PositiveInt, ...] | None, Field(min_length=1), BeforeValidator(as_tuple)
    ] = Field(
        default=None,
        description="2-D Matryoshka: also sum over these layers of the backbone, counted from 1, the last one last; null: the last only.",
    )
    mrl_layer_weights: Annotated[
        tuple[NonNegativeFloat, ...] | None, Field(min_length=1), BeforeValidator(as_tuple)
    ] = Field(default=None, description="Weights, in the order of mrl_layers; null: 1 each.")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = Field(default=2e-5, description="Highest learning rate.")
    text_encoder_lr: PositiveFloat | None = Field(
        default=None, description="The same of the text backbone, or language model; null: lr."
    )
    image_encoder_lr: PositiveFloat | None = Field(
        default=None, description="The same of the image backbone, or vision tower; null: lr."
    )
    projection_lr: PositiveFloat | None = Field(
        default=None, description="The same of the projections of projection_dim; null: lr."
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.01, description="Decay of matrices; norms, biases and scalars have none."
    )
    adam_beta1: Decay = Field(default=0.9, description="Decay of the gradient's mean.")
    adam_beta2: Decay = Field(default=0.999, description="Decay of the gradient's square.")
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="Added to Adam's denominator.")
    max_grad_norm: NonNegativeFloat = Field(
        default=1.0, description="Clip the gradient to this norm; 0: off."
    )
    scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = Field(
        default="cosine",
        description="Learning rate after the warm-up; transformers' schedules of that name.",
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Share of all steps that warm up."
    )
    warmup_steps: NonNegativeInt = Field(
        default=0,
        description="Warm-up steps; above 0 it wins over warmup_ratio. `constant` has no warm-up.",
    )


class TrainingConfig(Section):
    """Batch, length of the run, seed, gradient cache, what is watched."""

    batch_size: PositiveInt = Field(
        default=32, description="Pairs per rank and step, all of them in one loss."
    )
    epochs: PositiveInt = Field(default=3, description="Passes over the training pairs.")
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps; wins over epochs."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=42, description="Seed of weights, order and dropout."
    )
    use_gradient_cache: bool = Field(
        default=False,
        description="Embed in chunks, and differentiate one after the other: memory of one chunk, or of those whose graph is kept.",
    )
    gradient_cache_chunk_size: Literal["auto"] | PositiveInt = Field(
        default=8,
        description="Items per chunk, if they are as long as the longest; used with use_gradient_cache, as are the next two. auto: as many as fit into memory, chosen before the first step and kept when the run is resumed.",
    )
    gradient_cache_chunk_tokens: Literal["auto"] | PositiveInt | None = Field(
        default="auto",
        description="Most tokens per chunk once it is padded; auto: as many as gradient_cache_chunk_size of the longest items have, so that shorter ones come in larger chunks at no more memory; null: always gradient_cache_chunk_size items. The size of images always limits a chunk as with auto.",
    )
    gradient_cache_sort: bool = Field(
        default=True,
        description="Cut chunks from the items in order of their length, the longest first, for little padding; false: as they stand in the batch.",
    )
    encode_duplicates_once: bool = Field(
        default=True,
        description="Embed equal items of a rank's batch once and sum their gradients, if the model draws no random numbers (dropout) for them.",
    )
    gradient_cache_kept_graphs: Literal["auto"] | PositiveInt = Field(
        default="auto",
        description="Chunks that are not computed twice, because they keep the graph of their first pass: a number, or auto: as many as fit into memory, but one where ZeRO-3 gathers with cache_pass. The update is the same (with cache_pass but for its last bit).",
    )
    gradient_reduction: Literal["once", "per_chunk", "auto"] = Field(
        default="once",
        description="When gradients travel: once per step, kept whole until then; or, at ZeRO-2 and 3, after every chunk, each rank keeping its part only: more traffic, less memory; auto: per_chunk where whole gradients take more than a quarter of the memory.",
    )
    zero3_gather: Literal["auto", "once", "cache_pass", "per_module"] = Field(
        default="auto",
        description="How often ZeRO-3 gathers the parameters: once per step; once for embedding and then for every replayed chunk; or for every module call. auto: the first whose parameters (and gradients, for once) take at most a quarter of the memory.",
    )
    loss_tile_size: PositiveInt | Literal["auto"] | None = Field(
        default="auto",
        description="The loss compares this many rows with this many columns at a time, so that its memory does not grow with the square of the batch; auto: 512 on a CPU, 4096 elsewhere; null: all at once.",
    )
    use_torch_compile: bool = Field(
        default=False,
        description="Compile the backbones (torch.compile), a graph for each of the few lengths that texts are then padded to; ZeRO stage 0 to 2.",
    )
    gradient_self_test: bool = Field(
        default=True, description="At start, compare a chunked gradient with a whole one."
    )
    on_nonfinite: Literal["abort", "skip"] = Field(
        default="abort",
        description="What a step does whose loss or gradient is NaN or infinite on any rank: end the run, or leave the step out. Its records are written to nonfinite-step-N.json.",
    )
    max_nonfinite_steps: PositiveInt = Field(
        default=10, description="Most steps in a row that on_nonfinite: skip leaves out."
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=10.0,
        description="Warn, and write the records to spike-step-N.json, when loss or gradient norm is this many times the median of the last 100 steps; null: never.",
    )
    replica_check_steps: NonNegativeInt = Field(
        default=100,
        description="Steps between comparisons of what every rank holds whole; 0: only before checkpoints.",
    )


class RunConfig(Section):
    """Output, logging, evaluation and time limits."""

    output_dir: Text = Field(default="output", description="Folder for all results.")
    logging_steps: PositiveInt = Field(default=10, description="Steps between log lines.")
    save_steps: NonNegativeInt = Field(
        default=0, description="Steps between checkpoints; 0: only at the end."
    )
    save_epochs: NonNegativeInt = Field(
        default=0, description="Epochs between checkpoints, beside save_steps; 0: none for that."
    )
    save_total_limit: PositiveInt | None = Field(
        default=None,
        description="How many of the newest checkpoints are kept; the best one is kept beside them; null: all.",
    )
    best_metric: Text | None = Field(
        default=None,
        description="A metric of the evaluation, such as `recall@10`: whenever it is the highest so far a checkpoint is saved, which `best` names.",
    )
    save_async: bool = Field(
        default=False,
        description="Write checkpoints in the background; training waits only while they are copied to host memory, which must hold one.",
    )
    node_local_output: bool = Field(
        default=False,
        description="output_dir is a disk of each machine's own: every machine keeps its part of a checkpoint; only the same machines and ranks resume.",
    )
    on_save_error: Literal["fail", "warn"] = Field(
        default="fail",
        description="A checkpoint or metrics.jsonl that cannot be written (full disk): end the run, or warn and train on; the last step must be saved.",
    )
    save_every_minutes: PositiveFloat | None = Field(
        default=None,
        description="Also save when this long has passed since the last checkpoint; null: not by time.",
    )
    eval_steps: NonNegativeInt = Field(
        default=0, description="Steps between evaluations; 0: only at the end."
    )
    eval_on_start: bool = Field(
        default=True, description="Also evaluate before the first step, as the figure to beat."
    )
    eval_batch_size: PositiveInt | None = Field(
        default=None,
        description="Items per rank in evaluation; null: the chunk size with use_gradient_cache, else batch_size, at most the slice size.",
    )
    eval_recall_k: Annotated[
        tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(as_tuple)
    ] = Field(default=(1, 5, 10), description="The k of Recall@k.")
    report_to: Annotated[str, BeforeValidator(tracker_words)] = Field(
        default="tensorboard",
        description="Trackers beside metrics.jsonl and metrics.csv, one or several with commas between them: tensorboard, wandb, swanlab, mlflow; all: the first two; none.",
    )
    run_name: Text | None = Field(default=None, description="Name shown by the trackers.")
    timeout_minutes: PositiveFloat = Field(
        default=30.0, description="Longest wait for another rank before the job fails."
    )


class Config(Section):
    """A whole run; each section's fields are documented in its class."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    loss: LossConfig = LossConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    run: RunConfig = RunConfig()

    def __getitem__(self, key: str) -> Any:
        """The value of a key, in whatever section it is; other spellings are known too.

        Raises:
            KeyError: There is no such key.
        """
        name = ALIASES.get(key, key)
        return getattr(getattr(self, SECTION_OF[name]), name)

    def __contains__(self, key: str) -> bool:
        return ALIASES.get(key, key) in SECTION_OF

    def get(self, key: str, default: Any = None) -> Any:
        """As :meth:`__getitem__`, or ``default`` when there is no such key."""
        try:
            return self[key]
        except KeyError:
            return default

    def flat(self) -> dict[str, Any]:
        """Every key with its value, as a plain dictionary that may be changed."""
        return {key: self[key] for key in SECTION_OF}


SECTIONS: dict[str, type[Section]] = {
    name: (get_args(field.annotation) or (field.annotation,))[0]
    for name, field in Config.model_fields.items()
}
SECTION_OF = {leaf: name for name, section in SECTIONS.items() for leaf in section.model_fields}
"""Section of each leaf key."""


def default_of(key: str) -> Any:
    """The default of a leaf key."""
    return SECTIONS[SECTION_OF[key]].model_fields[key].default
