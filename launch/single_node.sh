#!/usr/bin/env bash
# All accelerators of this machine (on a CPU: one rank; --num_gpus 2: two):
#   bash launch/single_node.sh --ds_config ds_configs/zero2.json --config my.yaml
# A crash starts it again from its newest checkpoint, at most three times without a newer one; Ctrl-C
# or SIGTERM stops it with a checkpoint. Exit codes: docs/checkpoints.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/restart.sh" 3 vembed-ds train "$@" --resume auto
