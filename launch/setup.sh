#!/usr/bin/env bash
# Source this: makes the virtual environment .venv with the extra named in $1, and activates it.
# VEMBED_VENV: another place for the environment. PYTHON: the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VEMBED_VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
echo "== Installing into $venv (the first time several minutes, without a word from pip)"
python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
# Nothing here needs the internet after this line.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=offline
