# Sourced by the dist_*.sh scripts: runs a tool in several processes of this machine, maybe one machine of several.
#   run_processes TOOL COUNT ARGUMENTS...
# Environment: PORT (default: a free one; 29500 with several machines), NNODES, NODE_RANK, MASTER_ADDR, PYTHON,
# OMP_NUM_THREADS (default: the cores shared among the processes).

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
    python=${PYTHON:-python}
    nnodes=${NNODES:-1}
    if [ -z "${PORT:-}" ]; then
        PORT=29500
        if [ "$nnodes" = 1 ]; then
            PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') || exit
        fi
    fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
        OMP_NUM_THREADS=$((cores / count > 0 ? cores / count : 1))
        export OMP_NUM_THREADS
    fi
    PYTHONPATH=$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    exec "$python" -m torch.distributed.run \
        --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT" --nproc_per_node="$count" \
        "$tools/$tool" "$@" --launcher pytorch
}
