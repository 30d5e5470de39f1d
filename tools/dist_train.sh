#!/usr/bin/env bash
# dist_train.sh CONFIG GPUS [arguments of train.py]; without a GPU, GPUS is the number of processes.  See _processes.sh.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$tools/_processes.sh"
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [--work-dir DIR] [--finetune-from DIR] [--options K=V ...] ..." >&2
    exit 2
fi
config=$1
count=$2
shift 2
run_processes train.py "$count" "$config" "$@"
