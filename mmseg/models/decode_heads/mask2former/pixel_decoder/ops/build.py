"""Build and cache the native libraries by plain compiler calls against torch's stable C++ ABI.

The file name of a library holds torch's version, the compiler and a hash of sources and flags, so a change of any of
them builds anew and nothing stale is ever loaded. Environment:

* ``THEMASK_OPS_CACHE``: where libraries are kept (default ``$XDG_CACHE_HOME/themask/ops`` or ``~/.cache/themask/ops``);
* ``CXX``, ``CUDACXX``: the compilers; ``TORCH_CUDA_ARCH_LIST``: GPU targets, such as ``8.0;9.0+PTX``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Kind = Literal['cpu', 'cuda']

SOURCES = Path(__file__).parent / 'src'
TORCH = Path(torch.__file__).parent
COMMON = ['-std=c++17', '-DTORCH_TARGET_VERSION=0x020a000000000000']
# No errno and no traps lets loops use vector square roots and selects; NaN and infinity keep their meaning.
KERNEL = ['-O2', '-fPIC', '-fvisibility=hidden', '-Wno-psabi', '-fno-math-errno', '-fno-trapping-math']
X86_SETS = {
    'avx512': ['-DWIDTH=16', '-mavx512f', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
    'avx2': ['-DWIDTH=8', '-mavx2', '-mfma'],
}
DEFAULT_ARCHITECTURES = ('8.0', '9.0', '10.0', '12.0+PTX')
TIMEOUT_S = 900


class BuildError(RuntimeError):
    """A library cannot be built; the message says why and how to mend it."""


@dataclass(frozen=True)
class Unit:
    """One compiler call: a source, its flags, and the name of the object."""

    source: str
    flags: tuple[str, ...]
    name: str


def cache_dir() -> Path:
    """The folder of the built libraries."""
    own = os.environ.get('THEMASK_OPS_CACHE')
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'themask' / 'ops'


def find_compiler(kind: Kind) -> list[str] | None:
    """The compiler's command, or None where there is none."""
    if kind == 'cpu':
        candidates = [os.environ.get('CXX', ''), 'g++', 'c++', 'clang++']
    else:
        homes = [os.environ.get('CUDA_HOME', ''), os.environ.get('CUDA_PATH', ''), '/usr/local/cuda']
        candidates = [os.environ.get('CUDACXX', ''), 'nvcc', *(f'{home}/bin/nvcc' for home in homes if home)]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def cpu_units(sets: dict[str, list[str]] | None = None) -> list[Unit]:
    """The binding and one set of kernels for each instruction set of this processor family."""
    if sets is None:
        sets = X86_SETS if platform.machine().lower() in ('x86_64', 'amd64') else {}
    units = [Unit('cpu.cpp', ('-O1', '-isystem', f'{TORCH}/include', '-fPIC', '-fvisibility=hidden'), 'binding')]
    for name, flags in {'portable': ['-DWIDTH=4', '-DWITH_DOUBLE'], **sets}.items():
        units.append(Unit('kernel.cpp', (*KERNEL, f'-DKERNELS=kernels_{name}', *flags), name))
    return units


def cuda_architectures(nvcc: Sequence[str]) -> list[str]:
    """``-gencode`` flags of `TORCH_CUDA_ARCH_LIST`, or of the default targets that this nvcc knows."""
    wanted = os.environ.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split()
    if not wanted:
        known = _output([*nvcc, '--list-gpu-arch']).split()
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
        '-O3',
        '-DUSE_CUDA',
        '--threads=0',
        '--expt-relaxed-constexpr',
        '-Xcompiler=-fPIC,-fvisibility=hidden',
        '-isystem',
        f'{TORCH}/include',
        *cuda_architectures(nvcc),
    )
    return [Unit('cuda.cu', flags, 'cuda')]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b'\0')
    return digest.hexdigest()[:16]


def _name(kind: Kind, compiler: str, units: Sequence[Unit]) -> str:
    sources = b''.join(path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir()))
    # Where torch lies does not matter, so that machines can share a folder.
    flags = [flag for flag in (*COMMON, *(f for unit in units for f in unit.flags)) if str(TORCH) not in flag]
    return f'{kind}-torch{torch.__version__}-{_digest(sources, *flags)}-{compiler}.so'


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]}: {error}') from error
    if result.returncode:
        raise BuildError(f'{shlex.join(command)}\n{result.stderr.strip()[-2000:]}')


def compile_library(
    kind: Kind, compiler: Sequence[str], units: Sequence[Unit], target: Path, flags: Sequence[str] = ()
) -> None:
    """Compile the units side by side, link them, and put the library at `target` in one step.

    Args:
        kind: which library.
        compiler: its compiler's command.
        units: what to compile.
        target: the library's path; written by rename, so a reader never sees half of it.
        flags: more flags for every call (tests: sanitizers).
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.build-') as folder:
        objects = [f'{folder}/{unit.name}.o' for unit in units]
        commands = [
            [*compiler, *COMMON, *flags, *unit.flags, '-c', str(SOURCES / unit.source), '-o', output]
            for unit, output in zip(units, objects)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        library = f'{folder}/{target.name}'
        link = ['-shared', f'-L{TORCH}/lib', '-ltorch', '-ltorch_cpu']
        # libtorch names the CUDA half of torch as its own need; keep it although no symbol is asked of it directly.
        keep = ['-Xlinker', '--no-as-needed'] if sys.platform.startswith('linux') else []
        _run([*compiler, *flags, *objects, *keep, *link, '-o', library])
        os.replace(library, target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def library(kind: Kind, allow_build: bool = True) -> Path:
    """The built library of this torch and compiler, building it where it is missing.

    Of several processes that start together one builds and the others wait for it; if it fails, they fail with it
    instead of trying in turn.

    Args:
        kind: ``cpu`` or ``cuda``.
        allow_build: False only looks into the cache.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    compiler = find_compiler(kind)
    folder = cache_dir()
    if compiler is None:
        name = {'cpu': 'C++ compiler (install g++, or set CXX)', 'cuda': 'nvcc (install CUDA, or set CUDACXX)'}[kind]
        # A machine without a compiler may use what another one with the same sources built into a shared folder.
        found = sorted(folder.glob(_name(kind, '*', cpu_units()))) if kind == 'cpu' else []
        if found:
            return found[-1]
        raise BuildError(f'there is no {name}')
    try:
        units = cpu_units() if kind == 'cpu' else cuda_units(compiler)
        version = _digest(_output([*compiler, '--version']))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f'{compiler[0]} does not run: {error}') from error
    target = folder / _name(kind, version, units)
    if target.exists():
        return target
    if not allow_build:
        raise BuildError(f'{target} is not built and THEMASK_OPS_BUILD=0 forbids building; run make.sh')
    started = time.time()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        failure = target.with_suffix('.failed')
        with _locked(target.with_suffix('.lock')):
            if target.exists():
                return target
            if failure.exists() and failure.stat().st_mtime > started:
                raise BuildError(failure.read_text())
            try:
                compile_library(kind, compiler, units, target)
            except BuildError as error:
                failure.write_text(str(error))
                raise
            failure.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f'{folder} cannot be written ({error}); set THEMASK_OPS_CACHE to a folder that can') from error
    return target


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
            path = library(kind)
            print(f'{kind}: {path} ({time.perf_counter() - started:.1f} s)')
        except BuildError as error:
            print(f'{kind}: not built: {error}', file=sys.stderr)
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
