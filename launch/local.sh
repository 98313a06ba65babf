#!/usr/bin/env bash
# Trains with several processes on this machine. When one dies, all are started again from the last
# checkpoint; TERM, INT or USR1 saves and stops.
#
#   launch/local.sh 2 configs/tiny.toml parallel.ep=2
#
# Arguments: processes, then those of `trinity pretrain`. Settings are environment variables;
# docs/launch.md has the table. Exit status: 0 finished, 75 saved and stopped, 1 failed.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh PROCESSES CONFIG [KEY=VALUE]..." >&2
  exit 2
fi
processes=$1
shift
python=${TRINITY_PYTHON:-$PWD/.venv/bin/python}
if [ ! -x "$python" ]; then python=$(command -v python3); fi
read -r -a trinity <<<"${TRINITY_COMMAND:-$python -u -m trinity}"
run_dir=${TRINITY_RUN_DIR:-$PWD/runs/$(basename "$1" .toml)-$(date +%Y%m%d-%H%M%S)}

# Without it, a restarted worker reads its peers' previous addresses from the store of the agent.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# One machine: nothing listens on the network, and its name need not resolve.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun takes any other status of a worker that saved and stopped for a failure.
export TRINITY_STOPPED_STATUS=0

# The time that torchrun gives workers to stop is also the delay before it starts dead ones again:
# too short for a save, or too long. So torchrun ignores TERM, as do the workers until the trainer
# handles it, and this script tells them itself.
(
  trap '' TERM USR1
  exec "$python" -m torch.distributed.run --nnodes=1 --nproc-per-node="$processes" \
    --max-restarts="${TRINITY_MAX_RESTARTS:-3}" --monitor-interval=1 \
    --signals-to-handle=SIGINT --shutdown-timeout=10 \
    --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 \
    --no-python "${trinity[@]}" pretrain "$@" --run-dir "$run_dir" --auto-resume
) &
training=$!

signal_workers() {
  local workers
  read -r -a workers <<<"$(cat /proc/"$training"/task/*/children 2>/dev/null | tr '\n' ' ')"
  if [ ${#workers[@]} -gt 0 ]; then kill -TERM "${workers[@]}" 2>/dev/null || true; fi
}
asked=0
# The second time, torchrun ends the workers whether they have saved or not.
trap 'asked=$((asked + 1)); if [ $asked -gt 1 ]; then kill -INT "$training"; fi' TERM INT USR1
while kill -0 "$training" 2>/dev/null; do
  # Again and again, as workers that are still starting do not hear it.
  if [ $asked = 1 ]; then signal_workers; fi
  sleep 1 &
  wait $! || true # returns early when a trap runs
done
status=0
wait "$training" || status=$?

if [ -e "$run_dir/DONE" ]; then exit 0; fi
if [ $status = 0 ]; then
  echo "saved and stopped; the same command with TRINITY_RUN_DIR=$run_dir goes on" >&2
  exit 75
fi
echo "failed with status $status; the same command with TRINITY_RUN_DIR=$run_dir tries again" >&2
exit 1
