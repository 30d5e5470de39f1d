#!/usr/bin/env bash
# slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
# Environment: GPUS (default 4), GPUS_PER_NODE (default: all up to 8), CPUS_PER_TASK (5), PORT, SRUN_ARGS, PYTHON.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$tools/_processes.sh"
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
    exit 2
fi
partition=$1
job=$2
shift 2
gpus=${GPUS:-4}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
cpus=${CPUS_PER_TASK:-5}
python=$(find_python)
MASTER_PORT=${PORT:-$("$python" -c 'import random; print(random.randrange(20000, 40000))')}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
export MASTER_PORT OMP_NUM_THREADS
# shellcheck disable=SC2086  # SRUN_ARGS holds several words
exec srun -p "$partition" --job-name="$job" --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "$python" -u "$tools/train.py" "$@" --launcher slurm
