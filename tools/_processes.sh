# Sourced by dist_*.sh and slurm_*.sh, with $tools set to the folder of the tools.
# Environment: PYTHON (default: the first of python, python3 and .venv/bin/python that has torch), PORT (default: a
# free one; 29500 with several machines), NNODES, NODE_RANK, MASTER_ADDR, OMP_NUM_THREADS (default: the cores shared
# among the processes).

root=$(dirname "$tools")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# Prints the Python to use; an environment that is active goes before one that "make" has built here.
find_python() {
    has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
    for candidate in ${PYTHON:+"$PYTHON"} python python3 "$root/.venv/bin/python"; do
        if "$candidate" -c "$has_torch" >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python with torch; activate its environment, or set PYTHON" >&2
    return 1
}

# check_number NAME VALUE LEAST MOST: ends the script where VALUE is no whole number within the limits.
check_number() {
    case $2 in
        '' | *[!0-9]* | 0?* | ??????????*) ;;
        *) if [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; then return 0; fi ;;
    esac
    echo "error: $1: expected a whole number from $3 to $4, got '$2'" >&2
    exit 2
}

# run_processes TOOL COUNT ARGUMENTS...: the tool in COUNT processes of this machine, maybe one machine of several.
run_processes() {
    tool=$1
    count=$2
    shift 2
    case $count in
        '' | *[!0-9]* | 0)
            echo "error: expected the number of GPUs (without a GPU: of processes), got '$count'" >&2
            exit 2
            ;;
    esac
    nnodes=${NNODES:-1}
    check_number NNODES "$nnodes" 1 99999
    check_number NODE_RANK "${NODE_RANK:-0}" 0 $((nnodes - 1))
    if [ "$nnodes" -gt 1 ] && { [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; }; then
        echo "error: NNODES=$nnodes needs MASTER_ADDR (the first machine) and NODE_RANK (which this one is, from 0)" >&2
        exit 2
    fi
    python=$(find_python) || exit
    if [ -n "${PORT:-}" ]; then
        check_number PORT "$PORT" 1 65535
    else
        PORT=29500
        if [ "$nnodes" -eq 1 ]; then
            PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') || exit
        fi
    fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
        OMP_NUM_THREADS=$((cores / count > 0 ? cores / count : 1))
        export OMP_NUM_THREADS
    fi
    exec "$python" "$tools/_launch.py" \
        --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT" --nproc_per_node="$count" \
        "$tools/$tool" "$@" --launcher pytorch
}

# run_slurm TOOL PARTITION JOB_NAME ARGUMENTS...: the tool under srun, one process a GPU.
# Environment: GPUS (default 4), GPUS_PER_NODE (default: all up to 8), CPUS_PER_TASK (5), PORT (random), SRUN_ARGS, PYTHON.
run_slurm() {
    tool=$1
    partition=$2
    job=$3
    shift 3
    gpus=${GPUS:-4}
    check_number GPUS "$gpus" 1 99999
    per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    cpus=${CPUS_PER_TASK:-5}
    check_number GPUS_PER_NODE "$per_node" 1 99999
    check_number CPUS_PER_TASK "$cpus" 1 99999
    if [ -n "${PORT:-}" ]; then
        check_number PORT "$PORT" 1 65535
    fi
    python=$(find_python) || exit
    MASTER_PORT=${PORT:-$("$python" -c 'import random; print(random.randrange(20000, 40000))')}
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    export MASTER_PORT OMP_NUM_THREADS
    # shellcheck disable=SC2086  # SRUN_ARGS holds several words
    exec srun -p "$partition" --job-name="$job" --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
        --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$python" -u "$tools/$tool" "$@" --launcher slurm
}
