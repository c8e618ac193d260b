#!/usr/bin/env bash
# This machine's share of a run on several, for whoever starts one process on each (a batch system,
# a container, launch/ssh.sh). The same on all of them, but for NODE_RANK (0, 1, ...):
#   NODE_RANK=1 bash launch/no_ssh.sh hosts --ds_config ds_configs/zero3.json --config my.yaml
# MASTER_ADDR: address of the first machine, if it is not the first name in the host file.
# MASTER_PORT: a port that is free there.
set -euo pipefail
hosts=${1:?usage: NODE_RANK=N bash launch/no_ssh.sh HOSTFILE ARGUMENTS OF train}
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
first=$(sed -E 's/^[[:space:]]+//; /^(#|$)/d; s/[[:space:]].*//' "$hosts" | head -n 1)
exec vembed-ds train --no_ssh --hostfile "$hosts" \
  --node_rank "${NODE_RANK:?the place of this machine in the host file, from 0}" \
  --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" "$@" --resume auto
