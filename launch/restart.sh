#!/usr/bin/env bash
# Runs a training command, and starts it again when it dies, so that it goes on from its newest
# checkpoint:
#   bash launch/restart.sh 3 deepspeed --num_gpus 8 --module vembed_ds.train \
#     --ds_config ds_configs/zero2.json --config my.yaml --resume auto
#
# The first argument is how many restarts in a row may fail to write a newer checkpoint; whoever
# gets on may be restarted for ever. Newer is what is beyond all that this script has seen: a run that
# fell back, because its newest checkpoint is damaged, has to pass that one first. Before each restart
# what is left of the run on this machine is killed (on others: their launcher's task), and 5 s are
# waited, then 10, 20, 40 and 60 (VEMBED_RESTART_SECONDS: another beginning).
#
# Ends with   0   the run is complete
#             2   something is to be mended first: not started again
#             75  stopped: by a signal that the ranks got, or that this script got (whoever kills the
#                 launcher alone gets a restart)
#             any other code that the last attempt ended with, when there were too many
#
# SIGTERM, SIGINT and SIGUSR1 stop the run with a checkpoint, however long that takes: a rank is
# asked and not the launcher, which would kill it after 30 s. A second signal ends the launcher too,
# a third one kills everything. For Slurm, in the batch script, so that a preempted job goes on:
#   #SBATCH --requeue --signal=B:USR1@600
#   bash launch/restart.sh 3 srun ... --resume auto & job=$!
#   trap 'kill -USR1 $job' USR1; wait $job; wait $job; [ $? -ne 75 ] || scontrol requeue $SLURM_JOB_ID
#
# The ranks tell their exit code and their checkpoints in a file, because launchers do not: torchrun
# makes 1 of every code, and `deepspeed` ends with 0 when its own child was killed. With ranks on
# other machines, VEMBED_STATUS_FILE must reach those of the first one (DeepSpeed: .deepspeed_env).
set -uo pipefail

say() { echo "restart.sh: $*" >&2; }

if [[ $# -lt 2 || ! $1 =~ ^[0-9]+$ ]]; then
  say "usage: bash launch/restart.sh N COMMAND... --resume auto (N: restarts without a newer checkpoint)"
  exit 2
fi
most=$1
shift
if [[ " $* " != *" --resume auto "* && " $* " != *" --resume=auto "* ]]; then
  say "the command has no --resume auto, so that every restart would begin again; add it"
  exit 2
fi

status=$(mktemp -t vembed-status-XXXXXX) || exit 2
token="$$-$RANDOM$RANDOM"
trap 'rm -f "$status"' EXIT

told() { sed -n "s/^$1 //p" "$status" | tail -n 1; } # what a rank said last of $1

# Every process of the run, also in sessions of their own (torchrun's ranks) and without a parent.
processes() { grep -lszFx "VEMBED_RESTART=$token" /proc/[0-9]*/environ 2> /dev/null | cut -d / -f 3; }

signal_all() {
  local found
  found=$(processes)
  # shellcheck disable=SC2086
  [[ -z $found ]] || kill "-$1" $found 2> /dev/null
}

kill_all() {
  local tries
  for tries in {1..60}; do
    [[ -n $(processes) ]] || return 0
    sleep 0.5
    [[ $tries -ge 4 ]] || continue # the servers of loader processes end by themselves
    [[ $tries -gt 4 ]] || say "killing what is left of the run: $(processes | tr '\n' ' ')"
    signal_all KILL
  done
  say "cannot be killed: $(processes | tr '\n' ' ')"
  exit 1
}

# Whether process $1 is a rank of this attempt, and not somebody else who has its number now.
is_rank() { [[ -n $1 ]] && grep -qszFx "VEMBED_STATUS_FILE=$status" "/proc/$1/environ"; }

signals=0
stop() {
  local rank
  signals=$((signals + 1))
  rank=$(told "pid $(uname -n)")
  if [[ $signals -ge 3 ]]; then
    say "SIG$1 again: killing the run"
    signal_all KILL
  elif [[ $signals -eq 1 ]] && is_rank "$rank" && kill -TERM "$rank" 2> /dev/null; then
    say "SIG$1: asking the run to stop with a checkpoint"
  else
    say "SIG$1: ending the run"
    signal_all TERM
  fi
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop USR1' USR1

# The exit code of an attempt: what a rank said, else what the launcher ended with.
outcome() {
  local said
  said=$(told exit)
  if [[ $1 -eq 2 ]]; then
    echo 2
  elif [[ $said -eq 75 && ($1 -eq 0 || ($1 -gt 128 && $1 -lt 160)) ]]; then
    say "the launcher was killed; the ranks noticed and stopped"
    echo 1
  elif [[ -n $said ]]; then
    echo "$said"
  elif [[ $1 -eq 0 ]]; then
    say "the command ended with 0, but no rank said that the run is complete"
    echo 1
  else
    echo "$1"
  fi
}

pause=${VEMBED_RESTART_SECONDS:-5}
wait_seconds=$pause failed=0 newest=-1
while true; do
  : > "$status"
  # A session of its own: Ctrl-C in the terminal reaches this script only.
  VEMBED_RESTART=$token VEMBED_STATUS_FILE=$status setsid "$@" &
  child=$!
  while kill -0 "$child" 2> /dev/null; do wait "$child"; done
  wait "$child"
  code=$?
  # A launcher that SIGTERM ended leaves ranks behind that are writing their checkpoint.
  while [[ $signals -gt 0 && -n $(processes) ]]; do sleep 0.5; done
  kill_all
  code=$(outcome "$code")
  case $code in
    0 | 2) exit "$code" ;;
    126 | 127) say "the command cannot be started"; exit "$code" ;;
  esac
  if [[ $code -eq 75 || $signals -gt 0 ]]; then
    say "stopped; to go on, run the same command again"
    exit 75
  fi
  saved=$(told saved)
  if [[ ${saved:-"-1"} -gt $newest ]]; then
    newest=$saved failed=0 wait_seconds=$pause
  fi
  failed=$((failed + 1))
  if [[ $failed -gt $most ]]; then
    say "ended with code $code; $most restarts have not brought it to a newer checkpoint: giving up"
    exit "$code"
  fi
  say "ended with code $code; restart $failed of $most (a newer checkpoint counts anew), in $wait_seconds s"
  sleep "$wait_seconds" &
  wait $! # a signal ends this one at once
  if [[ $signals -gt 0 ]]; then
    kill $! 2> /dev/null
    say "stopped; to go on, run the same command again"
    exit 75
  fi
  wait_seconds=$((wait_seconds * 2 > 60 ? 60 : wait_seconds * 2))
done
