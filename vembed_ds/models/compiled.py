"""Backbones compiled in place: one graph per padded length, whatever the number of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from vembed_ds.errors import ConfigError, one_line

BACKEND = "inductor"
GRAPHS_PER_LENGTH = 4
"""In training and, as the self-test and evaluation do, in evaluation mode; each with gradient and without."""


def compile_in_place(modules: Iterable[nn.Module], *, num_lengths: int) -> None:
    """Let modules run compiled from now on; their parameters keep their names.

    Dropout draws the numbers that it draws uncompiled, so that a chunk that is embedded twice is
    the same twice. Nothing runs uncompiled unsaid: a module that cannot be compiled whole, or that
    needs more graphs than the lengths explain, raises :class:`ConfigError` when it is called.

    Args:
        modules: Parts of a model that are called with tensors ``[n, ...]`` by name.
        num_lengths: How many different lengths texts are padded to; bounds the compilations.

    Raises:
        ConfigError: Nothing can be compiled here.
    """
    _try_compiling()
    for module in modules:
        module._compiled_call_impl = _compiled(module, limit=GRAPHS_PER_LENGTH * num_lengths)


def _compiled(module: nn.Module, *, limit: int) -> Any:
    """What ``nn.Module.compile`` would make, told which sizes to be general in.

    A single item runs uncompiled. It would need a graph of its own, in whose backward pass gradients of
    two parameters may be views of one tensor (a ViT's class token and positions, torch 2.13): autograd
    keeps both without a copy, and adding the next chunk's to one of them changes the other.
    """
    plain: Callable[..., Any] = module._call_impl
    run = torch.compile(plain, **_settings(limit))

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        if any(len(tensor) == 1 for tensor in tensors):
            return plain(*args, **kwargs)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
            for axis in range(1, tensor.dim()):
                torch._dynamo.mark_static(tensor, axis)
        try:
            return run(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            problem = f"would be compiled more than {limit} times"
            raise _refused(module, problem) from error
        except TorchDynamoException as error:
            raise _refused(module, f"cannot be compiled ({_cause(error)})") from error

    return call


def _refused(module: nn.Module, problem: str) -> ConfigError:
    return ConfigError(
        f"use_torch_compile=true: {type(module).__name__} {problem}; set use_torch_compile: false"
    )


def _settings(limit: int) -> dict[str, Any]:
    """Arguments of ``torch.compile``."""
    return {
        "backend": BACKEND,
        # Dropout by PyTorch's own generator: what is compiled can be compared with what is not.
        "options": {"fallback_random": True} if BACKEND == "inductor" else None,
        "fullgraph": True,
        "recompile_limit": limit,
        "isolate_recompiles": True,  # modules of one class share code, and so would its graphs
    }


def _try_compiling() -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        torch.compile(_twice, **_settings(1))(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler that is missing raises
        raise ConfigError(
            f"use_torch_compile=true: nothing can be compiled here ({_cause(error)}); it needs "
            "PyTorch 2.13 and a C++ compiler (CPU) or Triton (GPU); or set use_torch_compile: false"
        ) from error


def _cause(error: Exception) -> str:
    """Its text without the advice to developers of compilers that PyTorch adds."""
    return one_line(Exception(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]))


def _twice(values: Tensor) -> Tensor:
    return values * 2
