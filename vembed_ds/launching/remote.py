"""What reaches other machines: the environment, and words that shells there do not take apart."""

from __future__ import annotations

import re
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


def exported(
    environment: Mapping[str, str], folders: Iterable[Path], *, by_pdsh: bool
) -> dict[str, str]:
    """What the machines of a launch shall have of this environment; the user's files win.

    Args:
        environment: Of this process.
        folders: Where a ``.deepspeed_env`` (``DS_ENV_FILE``) may lie; the last wins. Its values
            stay as they are, as shells read them.
        by_pdsh: Values come through pdsh and a shell, which must not take them apart.

    Raises:
        ConfigError: A line of such a file is no ``NAME=VALUE``.
    """
    names = tuple(name for name in PASSED_ON if name.endswith("_"))
    found = {
        name: _pdsh_value(value) if by_pdsh else value
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


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What the launcher may have of it: it writes all of MLFLOW* into command lines."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith("MLFLOW") and name.endswith(("PASSWORD", "TOKEN")))
    }


def require_plain(**paths: Path | str) -> None:
    """Refuse paths that DeepSpeed hands to a shell behind pdsh as they are.

    Args:
        paths: By what they are of.

    Raises:
        ConfigError: One has a blank, or something else that this shell or pdsh would act upon.
    """
    for what, path in paths.items():
        if found := re.search(r"[^\w@+=:,./-]", str(path)):
            raise ConfigError(
                f"{what} {path}: {found[0]!r} does not come through pdsh; use one of letters, digits and "
                "-_./ alone, or start on every machine yourself (--no_ssh, srun, torchrun)"
            )


def pdsh_word(word: str) -> str:
    """``word`` so that it comes through DeepSpeed, pdsh and the shell behind ssh as it is.

    DeepSpeed puts words with a blank into double quotes and escapes only these; pdsh takes ``%h``,
    ``%n`` and ``%u`` for its own.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def _pdsh_value(value: str) -> str:
    """The same for a value, which DeepSpeed puts into double quotes where one is needed."""
    return re.sub(r"([\\$`\"])", r"\\\1", value).replace("%", "%%")


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
