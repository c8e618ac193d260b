#!/usr/bin/env bash
# The machines of a host file (launch/hosts.example), reached by pdsh over ssh, from one of them or
# from a login node:
#   bash launch/hostfile.sh hosts --ds_config ds_configs/zero3.json --config my.yaml
# Needed: pdsh here, ssh without a password to all; there the same folder, environment and versions.
# `vembed-ds doctor --hostfile hosts --config my.yaml` looks at all of that first.
set -euo pipefail
hosts=${1:?usage: bash launch/hostfile.sh HOSTFILE ARGUMENTS OF train}
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec vembed-ds train --hostfile "$hosts" "$@" --resume auto
