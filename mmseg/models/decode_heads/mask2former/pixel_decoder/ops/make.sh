#!/bin/sh
# Builds the native libraries into the user's cache (THEMASK_OPS_CACHE chooses another folder). Any shell, any directory:
#   sh make.sh          what this torch can use: the CPU library, and the CUDA one beside a CUDA torch
#   sh make.sh --cuda   the CUDA library too, whatever torch is installed (it compiles without a GPU)
set -e
here=$(dirname -- "$0")
if [ -z "$PYTHON" ]; then
    if command -v python >/dev/null 2>&1; then PYTHON=python; else PYTHON=python3; fi
fi
export PYTHONPATH="$here/../../../../../..${PYTHONPATH:+:$PYTHONPATH}"  # the package need not be installed
exec "$PYTHON" -m mmseg.kernels.library "$@"
