#!/usr/bin/env bash
# Sets everything up and runs all checks and tests. Arguments go to pytest.
#   bash launch/test.sh
#   bash launch/test.sh tests/parity -k clip
#   bash launch/test.sh --all     # also what is marked slow
# launch/system_packages.sh installs Debian packages without which some tests are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
# Built once here, before any test world starts: two builds at a time wait for each other.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
ruff format --check .
ruff check .
mypy
python - <<'PYTHON'
from vembed_ds.engine.extensions import prepare_extensions
prepare_extensions(
    {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": False}},
    }
)
PYTHON
python -m pytest "$@"
