#!/usr/bin/env bash
# Trains with several processes on this machine; a process that dies is restarted with all others
# from the last checkpoint.
#
#   launch/local.sh 2 configs/tiny.toml parallel.ep=2
#
# Arguments: processes, then those of `trinity pretrain`. Settings: docs/launch.md.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh PROCESSES CONFIG [KEY=VALUE]..." >&2
  exit 2
fi
processes=$1
shift
python=${TRINITY_PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}
run_dir=${TRINITY_RUN_DIR:-$PWD/runs/$(basename "$1" .toml)-$(date +%Y%m%d-%H%M%S)}

# Without it, a restarted worker reads its peers' previous addresses from the store of the agents.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun takes any other status of a worker that saved and stopped for a failure.
export TRINITY_STOPPED_STATUS=0
# The workers handle these themselves; torchrun would end them before they have saved.
trap '' USR1

"$python" -m torch.distributed.run --nnodes=1 --nproc-per-node="$processes" \
  --max-restarts="${TRINITY_MAX_RESTARTS:-3}" --monitor-interval=1 \
  --shutdown-timeout="${TRINITY_SHUTDOWN_S:-300}" \
  --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 \
  -m trinity pretrain "$@" --run-dir "$run_dir" --auto-resume

if [ ! -e "$run_dir/DONE" ]; then
  echo "saved and stopped; the same command with TRINITY_RUN_DIR=$run_dir goes on" >&2
  exit 75
fi
