"""Compiled backbones train as the others do, with a bounded number of compilations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from tests.distributed.test_syncs import INFONCE, texts
from tests.distributed.test_train import COMPOSED, ds_file, losses_of
from tests.worlds import World
from vembed_ds import convert
from vembed_ds.models.compiled import GRAPHS_PER_LENGTH

__all__ = ["texts"]

COMPILED = "tests.distributed.compile_cases:run_compiled"
Worlds = Callable[[int], World]
Make = Callable[..., str]
MODELS: dict[str, dict[str, Any]] = {"text": INFONCE, "clip": {}, "composed": COMPOSED}


def compile_run(
    world: World, make_config: Make, out: Path, *, stage: int, backend: str | None, **changes: Any
) -> tuple[dict[int, float], int]:
    """Losses by step, and the graphs that a rank has compiled."""
    config = make_config(**changes, use_torch_compile=True, output_dir=str(out))
    results = world.run(COMPILED, config=config, ds_config=ds_file(stage), backend=backend)
    for result in results:
        assert "error" not in result, result["error"]
    return losses_of(out), results[0]["graphs"]


def changes_of(model: str, texts: str) -> dict[str, Any]:
    data = {"data_path": texts, "val_data_path": None} if model == "text" else {}
    return data | MODELS[model]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "model"), [(0, "text"), (1, "composed"), (2, "clip")])
def test_losses_are_those_of_the_uncompiled_model(
    world: Worlds, make_config: Make, texts: str, tmp_path: Path, stage: int, model: str
) -> None:
    """With dropout: every chunk must draw the same numbers, twice."""
    found = {}
    for backend in (None, "aot_eager"):
        out = tmp_path / str(backend)
        found[backend], graphs = compile_run(
            *(world(2), make_config, out),
            stage=stage,
            backend=backend,
            **changes_of(model, texts),
        )
        assert (graphs > 0) == (backend is not None)
    assert found["aot_eager"] == pytest.approx(found[None], rel=1e-5)
    assert len(found[None]) == 4


@pytest.mark.slow
def test_more_steps_compile_no_more(
    world: Worlds, make_config: Make, texts: str, tmp_path: Path
) -> None:
    graphs = {}
    for steps in (4, 16):
        _, graphs[steps] = compile_run(
            *(world(2), make_config, tmp_path / str(steps)),
            stage=2,
            backend="aot_eager",
            **changes_of("text", texts),
            max_steps=steps,
        )
    # Texts of 3 to 10 tokens are padded to 16; and the attempt at the start.
    assert graphs[4] == graphs[16] <= GRAPHS_PER_LENGTH + 1


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_compiler_itself(
    world: Worlds, make_config: Make, texts: str, tmp_path: Path, model: str
) -> None:
    found = {
        backend: compile_run(
            *(world(2), make_config, tmp_path / str(backend)),
            stage=2,
            backend=backend,
            **changes_of(model, texts),
        )[0]
        for backend in (None, "inductor")
    }
    assert found["inductor"] == pytest.approx(found[None], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_and_is_exported_under_the_names_of_the_uncompiled_model(
    world: Worlds, make_config: Make, texts: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def train(**arguments: Any) -> dict[int, float]:
        config = make_config(
            **changes_of("text", texts),
            use_torch_compile=True,
            save_steps=2,
            output_dir=str(out),
        )
        for result in world(2).run(
            COMPILED, config=config, ds_config=ds_file(2), backend="aot_eager", **arguments
        ):
            assert "error" not in result, result["error"]
        return losses_of(out)

    whole = train()
    assert train(resume=str(out / "checkpoint-step-2")) == whole
    assert convert.main([str(out), str(out / "model")]) == 0
    names = set(load_file(out / "model" / "model.safetensors"))
    assert names == set(AutoModel.from_pretrained(out / "model").state_dict())


def test_stage_3_is_refused(world: Worlds, make_config: Make) -> None:
    config = make_config(use_torch_compile=True)
    results = world(2).run(COMPILED, config=config, ds_config=ds_file(3), backend="aot_eager")
    for result in results:
        assert result["error"].startswith(
            "ConfigError: use_torch_compile=true: ZeRO stage 3 gathers parameters in hooks"
        )


def test_a_machine_that_cannot_compile_is_named(world: Worlds, make_config: Make) -> None:
    config = make_config(use_torch_compile=True)
    results = world(2).run(COMPILED, config=config, ds_config=ds_file(2), backend="no_such")
    for result in results:
        assert "use_torch_compile=true: nothing can be compiled here (" in result["error"]
