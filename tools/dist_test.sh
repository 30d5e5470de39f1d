#!/usr/bin/env bash
# dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]; without a GPU, GPUS is the number of processes.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$tools/_processes.sh"
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [--out FILE] [--eval METRIC ...] [--options K=V ...] ..." >&2
    exit 2
fi
config=$1
checkpoint=$2
count=$3
shift 3
run_processes test.py "$count" "$config" "$checkpoint" "$@"
