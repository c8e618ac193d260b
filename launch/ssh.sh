#!/usr/bin/env bash
# As hostfile.sh, but by ssh alone: each machine of the host file starts its own ranks.
#   bash launch/ssh.sh hosts --ds_config ds_configs/zero3.json --config my.yaml
# SSH: another command than ssh. Ctrl-C ends the connections: the ranks notice, and stop with a
# checkpoint.
set -euo pipefail
hosts=${1:?usage: bash launch/ssh.sh HOSTFILE ARGUMENTS OF train}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosts=$(realpath "$hosts")
mapfile -t names < <(sed -E 's/^[[:space:]]+//; /^(#|$)/d; s/[[:space:]].*//' "$hosts")
script="bash $(printf '%q ' "$here/no_ssh.sh" "$hosts" "$@")"
started=()
for rank in "${!names[@]}"; do
  # -tt: the ranks hear when this script is gone.
  ${SSH:-ssh -tt} -o BatchMode=yes -o ServerAliveInterval=15 "${names[$rank]}" \
    "cd $(printf %q "$PWD") && PATH=$(printf %q "$PATH") NODE_RANK=$rank $script" < /dev/null &
  started+=($!)
done
code=0
for process in "${started[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
