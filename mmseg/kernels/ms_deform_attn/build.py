"""What the native libraries of the op are made of: plain compiler calls against torch's stable C++ ABI.

:mod:`mmseg.kernels.native` builds and caches them, and reads ``THEMASK_OPS_CACHE`` and ``CXX``. Further environment:
``CUDACXX``: the CUDA compiler; ``TORCH_CUDA_ARCH_LIST``: GPU targets, such as ``8.0;9.0+PTX``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mmseg.kernels.native import BuildError, Library, Unit, cache_dir, cached_library, find_cxx, first_command, output

__all__ = ['BuildError', 'Kind', 'cache_dir', 'find_compiler', 'library']

Kind = Literal['cpu', 'cuda']

SOURCES = Path(__file__).parents[1] / 'csrc'
FILES = (
    'binding.h', 'cuda.cu', 'cuda_kernel.cuh', 'ms_deform_attn.cpp', 'ms_deform_attn.h',
    'ms_deform_attn_kernel.cpp', 'simd.h')
TORCH = Path(torch.__file__).parent
COMMON = ['-std=c++17', '-DTORCH_TARGET_VERSION=0x020a000000000000']
# No errno and no traps lets loops use vector square roots and selects; NaN and infinity keep their meaning.
KERNEL = ['-O2', '-fPIC', '-fvisibility=hidden', '-Wno-psabi', '-fno-math-errno', '-fno-trapping-math']
X86_SETS = {
    'avx512': ['-DWIDTH=16', '-mavx512f', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
    'avx2': ['-DWIDTH=8', '-mavx2', '-mfma'],
}
DEFAULT_ARCHITECTURES = ('8.0', '9.0', '10.0', '12.0+PTX')


def find_compiler(kind: Kind) -> list[str] | None:
    """The compiler's command, or None where there is none."""
    if kind == 'cpu':
        return find_cxx()
    homes = [os.environ.get('CUDA_HOME', ''), os.environ.get('CUDA_PATH', ''), '/usr/local/cuda']
    return first_command([os.environ.get('CUDACXX', ''), 'nvcc', *(f'{home}/bin/nvcc' for home in homes if home)])


def cpu_units(sets: dict[str, list[str]] | None = None) -> list[Unit]:
    """The binding and one set of kernels for each instruction set of this processor family."""
    if sets is None:
        sets = X86_SETS if platform.machine().lower() in ('x86_64', 'amd64') else {}
    flags = (*COMMON, '-O1', '-fPIC', '-fvisibility=hidden')
    units = [Unit(SOURCES / 'ms_deform_attn.cpp', flags, 'binding', (TORCH / 'include',))]
    for name, own in {'portable': ['-DWIDTH=4', '-DWITH_DOUBLE'], **sets}.items():
        flags = (*COMMON, *KERNEL, f'-DKERNELS=kernels_{name}', *own)
        units.append(Unit(SOURCES / 'ms_deform_attn_kernel.cpp', flags, name))
    return units


def cuda_architectures(nvcc: Sequence[str]) -> list[str]:
    """``-gencode`` flags of `TORCH_CUDA_ARCH_LIST`, or of the default targets that this nvcc knows."""
    wanted = os.environ.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split()
    if not wanted:
        known = output([*nvcc, '--list-gpu-arch']).split()
        wanted = [a for a in DEFAULT_ARCHITECTURES if f'compute_{a.split("+")[0].replace(".", "")}' in known]
        if wanted and not wanted[-1].endswith('+PTX'):
            wanted[-1] += '+PTX'
    flags = []
    for architecture in wanted:
        number, _, ptx = architecture.partition('+')
        number = number.replace('.', '')
        code = f'[sm_{number},compute_{number}]' if ptx else f'sm_{number}'
        flags.append(f'-gencode=arch=compute_{number},code={code}')
    return flags


def cuda_units(nvcc: Sequence[str]) -> list[Unit]:
    """The one unit of the CUDA library."""
    flags = (
        *COMMON,
        '-O3',
        '-DUSE_CUDA',
        '--threads=0',
        '--expt-relaxed-constexpr',
        '-Xcompiler=-fPIC,-fvisibility=hidden',
        *cuda_architectures(nvcc),
    )
    return [Unit(SOURCES / 'cuda.cu', flags, 'cuda', (TORCH / 'include',))]


def made_of(kind: Kind, units: Sequence[Unit]) -> Library:
    """The library of some units, for this torch."""
    # libtorch names the CUDA half of torch as its own need; keep it although no symbol is asked of it directly.
    keep = ('-Xlinker', '--no-as-needed') if sys.platform.startswith('linux') else ()
    return Library(
        name=f'{kind}-torch{torch.__version__}',
        sources=tuple(SOURCES / name for name in FILES),
        units=tuple(units),
        link=(*keep, f'-L{TORCH}/lib', '-ltorch', '-ltorch_cpu'),
    )


def library(kind: Kind, allow_build: bool = True, quiet: bool = False) -> Path:
    """The built library of this torch and compiler, building it where it is missing.

    Args:
        kind: ``cpu`` or ``cuda``.
        allow_build: False only looks into the cache.
        quiet: do not say that the compiler works.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be used.
    """
    compiler = find_compiler(kind)
    if kind == 'cpu':
        units = cpu_units()
    elif compiler is None:
        raise BuildError('there is no nvcc (install CUDA, or set CUDACXX)')
    else:
        units = cuda_units(compiler)
    return cached_library(made_of(kind, units), compiler, allow_build, quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what this torch can use and say where it is; the exit status is 1 if something could not be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--cuda', action='store_true', help='build the CUDA library beside a CPU-only torch too')
    kinds: list[Kind] = ['cpu']
    if parser.parse_args(arguments).cuda or torch.version.cuda:
        kinds.append('cuda')
    status = 0
    for kind in kinds:
        started = time.perf_counter()
        try:
            path = library(kind, quiet=True)
            print(f'{kind}: {path} ({time.perf_counter() - started:.1f} s)')
        except BuildError as error:
            print(f'{kind}: not built: {error}', file=sys.stderr)
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
