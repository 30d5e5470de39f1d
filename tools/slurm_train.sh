#!/usr/bin/env bash
# slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]; environment: run_slurm in _processes.sh
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$tools/_processes.sh"
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
    exit 2
fi
run_slurm train.py "$@"
