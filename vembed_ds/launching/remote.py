"""What reaches other machines: the environment, and words that shells there do not take apart."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from vembed_ds.errors import ConfigError

_USERS_FILE = ".deepspeed_env"  # unless DS_ENV_FILE names another

# Beside what DeepSpeed passes on (PYTHON*, MLFLOW*, UCX*, and NCCL* on GPUs). No keys or tokens:
# the command lines of a machine can be read by everybody on it.
PASSED_ON = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "DS_ACCELERATOR",
    "DS_SKIP_CUDA_CHECK",
    "GLOO_SOCKET_IFNAME",
    "HF_DATASETS_CACHE",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "NCCL_",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCH_EXTENSIONS_DIR",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    "VEMBED_",
    "WANDB_MODE",
)


def exported(environment: Mapping[str, str], folders: Iterable[Path]) -> dict[str, str]:
    """What the machines of a launch shall have of this environment; the user's files win.

    Args:
        environment: Of this process.
        folders: Where a ``.deepspeed_env`` (``DS_ENV_FILE``) may lie; the last wins.

    Raises:
        ConfigError: A line of such a file is no ``NAME=VALUE``.
    """
    names = tuple(name for name in PASSED_ON if name.endswith("_"))
    found = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith(names)
    }
    file = environment.get("DS_ENV_FILE") or _USERS_FILE
    for folder in folders:
        if (folder / file).is_file():
            found.update(_read(folder / file))
    return found


def write_environment(path: Path, variables: Mapping[str, str]) -> None:
    """A file that the launcher reads as its ``.deepspeed_env`` (DS_ENV_FILE)."""
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def pdsh_word(word: str) -> str:
    """``word`` so that it comes through DeepSpeed, pdsh and the shell behind ssh as it is.

    DeepSpeed puts words with a blank into double quotes and escapes only these; pdsh takes ``%h``,
    ``%n`` and ``%u`` for its own.
    """
    if " " in word:
        for character in ("\\", "$", "`"):
            word = word.replace(character, f"\\{character}")
    else:
        word = shlex.quote(word)
    return word.replace("%", "%%")


def _read(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, sign, value = line.partition("=")
        if not line.strip():
            continue
        if not sign or not name.strip().isidentifier():
            raise ConfigError(f"{path.resolve()}, line {number}: {line!r}: must be NAME=VALUE")
        found[name.strip()] = value
    return found
