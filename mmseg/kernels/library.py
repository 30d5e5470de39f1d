"""The two native libraries, for the CPU and for CUDA: compiled on first use, cached, loaded into torch.

The compiler is called directly, against torch's stable C++ ABI. The file name of a library holds the versions of torch
and of the compiler and a hash of sources and flags, so a change of any of them builds a new file. A checksum beside it
tells a library that a crash or a full disk damaged; it is built again. What another user could have put there is not
loaded.
``python -m mmseg.kernels.library`` builds the libraries ahead of time. Environment:

* ``THEMASK_OPS_BACKEND``: ``auto`` (the fastest form that works), ``cpu``, ``cuda`` (that native op or an error),
  ``pytorch`` (the PyTorch form of the op, and no word about building or slower forms);
* ``THEMASK_OPS_BUILD=0``: never compile, use what was built ahead of time;
* ``THEMASK_OPS_CACHE``: folder of the libraries (default ``$XDG_CACHE_HOME/themask/ops`` or ``~/.cache/themask/ops``,
  or the folder of temporary files for a user without a home);
* ``THEMASK_OPS_INSTRUCTION_SET``: ``avx512``, ``avx2`` or ``portable`` instead of the best that the processor has;
* ``CXX``, ``CUDACXX``: the compilers; ``TORCH_CUDA_ARCH_LIST``: GPU targets, such as ``8.0;9.0+PTX``.

torch is imported when a library is needed, so that the metrics start without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from mmseg.utils.files import write_atomically

Kind = Literal['cpu', 'cuda']
BACKENDS = ('auto', 'cpu', 'cuda', 'pytorch')
TIMEOUT_S = 900
SOURCES = Path(__file__).with_name('csrc')
MAKE = Path(__file__).parents[1] / 'models/decode_heads/mask2former/pixel_decoder/ops/make.sh'
AHEAD = f'to build all of them ahead of time: sh {MAKE}'
COMMON = ('-std=c++17', '-DTORCH_TARGET_VERSION=0x020a000000000000')
CXX = (*COMMON, '-fPIC', '-fvisibility=hidden', '-Wno-psabi')
# No traps lets loops use vector selects; NaN and infinity keep their meaning.
KERNELS = {
    'ms_deform_attn': (*CXX, '-O2', '-fno-trapping-math', '-fno-math-errno'),
    'attention': (*CXX, '-O3', '-fno-trapping-math', '-ffp-contract=fast'),
    'label_map': (*CXX, '-O3', '-fno-trapping-math', '-ffp-contract=fast'),
    'run_lengths': (*CXX, '-O3'),
}
X86_SETS = {
    'avx512': (
        '-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512', '-DWIDTH=64'),
    'avx2': ('-mavx2', '-mfma', '-DWIDTH=32'),
}
ARCHITECTURES = ('8.0', '9.0', '10.0', '12.0+PTX')
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class BuildError(RuntimeError):
    """A library cannot be built or loaded; the message says why and what to do."""


class BackendError(RuntimeError):
    """The backend or the instruction set that was asked for cannot be had."""


class Unit(NamedTuple):
    """One call of the compiler."""

    name: str
    source: Path
    flags: Sequence[str]


def cache_dir() -> Path:
    """The folder of the built libraries."""
    own = os.environ.get('THEMASK_OPS_CACHE')
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'themask' / 'ops'
    except RuntimeError:  # neither HOME nor an entry in the table of users, as in some containers
        return Path(tempfile.gettempdir()) / f'themask-ops-{os.geteuid()}'


def find_compiler(kind: Kind) -> list[str] | None:
    """The compiler's command (with arguments, as in ``CXX``), or None where there is none."""
    candidates = [os.environ.get('CXX', ''), 'g++', 'c++', 'clang++']
    if kind == 'cuda':
        homes = [os.environ.get('CUDA_HOME', ''), os.environ.get('CUDA_PATH', ''), '/usr/local/cuda']
        candidates = [os.environ.get('CUDACXX', ''), 'nvcc', *(f'{home}/bin/nvcc' for home in homes if home)]
    commands = (shlex.split(candidate) for candidate in candidates)
    return next((command for command in commands if command and shutil.which(command[0])), None)


def cpu_units(sets: Mapping[str, Sequence[str]] | None = None) -> list[Unit]:
    """The binding, and the kernels for each instruction set of this processor family."""
    if sets is None:
        sets = X86_SETS if platform.machine().lower() in ('x86_64', 'amd64') else {}
    units = [Unit('cpu', SOURCES / 'cpu.cpp', (*CXX, '-O2'))]
    for name, own in {**sets, 'portable': ('-DWIDTH=16',)}.items():
        for kernel, flags in KERNELS.items():
            source = SOURCES / f'{kernel}_kernel.cpp'
            units.append(Unit(f'{kernel}_{name}', source, (*flags, f'-DSET={name}', *own)))
    return units


def cuda_units(nvcc: Sequence[str]) -> list[Unit]:
    """The one unit of the CUDA library, for ``TORCH_CUDA_ARCH_LIST`` or the default targets that this nvcc knows."""
    wanted = os.environ.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split()
    if not wanted:
        known = output([*nvcc, '--list-gpu-arch']).split()
        wanted = [a for a in ARCHITECTURES if f'compute_{a.split("+")[0].replace(".", "")}' in known]
        if wanted and not wanted[-1].endswith('+PTX'):
            wanted[-1] += '+PTX'
    targets = []
    for architecture in wanted:
        number, _, ptx = architecture.replace('.', '').partition('+')
        code = f'[sm_{number},compute_{number}]' if ptx else f'sm_{number}'
        targets.append(f'-gencode=arch=compute_{number},code={code}')
    flags = ('-O3', '-DUSE_CUDA', '--threads=0', '--expt-relaxed-constexpr', '-Xcompiler=-fPIC,-fvisibility=hidden')
    return [Unit('cuda', SOURCES / 'cuda.cu', (*COMMON, *flags, *targets))]


def output(command: Sequence[str]) -> str:
    """What a short command prints.

    Raises:
        BuildError: it does not run or fails.
    """
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode(errors='replace')
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f'{command[0]} does not run: {error}') from error


def compile_units(units: Sequence[Unit], compiler: Sequence[str], target: Path, flags: Sequence[str] = ()) -> None:
    """Compile the units side by side, link them, and put the library at ``target`` in one step.

    Args:
        units: what to compile.
        compiler: the compiler's command.
        target: the library's path; written by rename, so a reader never sees half of it, nor does a crash leave it.
        flags: more flags for every call (tests: sanitizers).

    Raises:
        BuildError: the compiler failed.
        OSError: the folder of ``target`` cannot be written.
    """
    import torch

    home = Path(torch.__file__).parent
    # libtorch names the CUDA half of torch as its own need; keep it although no symbol is asked of it directly.
    keep = ('-Xlinker', '--no-as-needed') if sys.platform.startswith('linux') else ()
    link = (*keep, f'-L{home}/lib', '-ltorch', '-ltorch_cpu', *_own_runtime())
    call = [*compiler, *flags]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.build-') as folder:
        objects = [f'{folder}/{unit.name}.o' for unit in units]
        commands = [
            [*call, *unit.flags, '-isystem', f'{home}/include', '-c', str(unit.source), '-o', built]
            for unit, built in zip(units, objects)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        result = f'{folder}/{target.name}'
        _run([*call, *objects, '-shared', *link, '-o', result])
        os.chmod(result, os.stat(result).st_mode & ~_WRITABLE_BY_OTHERS)
        with open(result, 'rb') as file:
            os.fsync(file.fileno())
        write_atomically(_checksum_file(target), _checksum(Path(result)))
        os.replace(result, target)


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]}: {error}') from error
    if result.returncode:
        raise BuildError(f'{shlex.join(command)}\n{result.stderr.decode(errors="replace").strip()[-2000:]}')


def _own_runtime() -> list[str]:
    """Linker flags that name the C++ runtime of this process (Linux), before the compiler adds its own.

    Some compilers bring a static one.  A second runtime in the process is where an exception that leaves the library
    ends in a crash.
    """
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/maps').read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if Path(path).name.startswith('libstdc++.so') and Path(path).is_file():
                return ['-Xlinker', path]
    return []


def file_name(kind: Kind, units: Sequence[Unit], compiler: str) -> str:
    """The name of the built library; ``compiler`` identifies the compiler's version."""
    import torch

    sources = (part for path in sorted(SOURCES.iterdir()) for part in (path.name, path.read_bytes()))
    flags = (flag for unit in units for flag in unit.flags)
    return f'{kind}-torch{torch.__version__}-{_digest([platform.machine(), *sources, *flags])}-{compiler}.so'


def library(kind: Kind, allow_build: bool = True, quiet: bool = False) -> Path:
    """The built library of this torch and compiler; it is built where it is missing, damaged or of doubtful origin.

    Of several processes that start together one builds and the others wait for it; if it fails, they fail with it
    instead of trying in turn. Without a C++ compiler, what another machine with the same sources built into a shared
    folder is used.

    Args:
        kind: ``cpu`` or ``cuda``.
        allow_build: False only looks into the cache.
        quiet: do not say that the compiler works and how to have it work ahead of time.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be used.
    """
    compiler, folder = find_compiler(kind), cache_dir()
    try:
        if folder.exists():
            _check_folder(folder)
        if compiler is None:
            if kind == 'cuda':
                raise BuildError('there is no nvcc (install CUDA, or set CUDACXX)')
            found = [path for path in sorted(folder.glob(file_name(kind, cpu_units(), '*'))) if not _fault(path)]
            if found:
                return found[-1]
            raise BuildError('there is no C++ compiler (install g++, or set CXX)')
        units = cpu_units() if kind == 'cpu' else cuda_units(compiler)
        target = folder / file_name(kind, units, _digest([output([*compiler, '--version'])]))
        fault = _fault(target)
        if fault and not allow_build:
            raise BuildError(f'{target} {fault}, and THEMASK_OPS_BUILD=0 forbids building; {AHEAD}')
        if fault:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _check_folder(folder)
            _build_once(units, compiler, target, quiet)
    except OSError as error:
        raise BuildError(f'{folder} cannot be used ({error}); set THEMASK_OPS_CACHE to a folder of your own') from error
    return target


def _build_once(units: Sequence[Unit], compiler: Sequence[str], target: Path, quiet: bool) -> None:
    """Builds unless another process does, or fails, meanwhile."""
    started = time.time()
    failure = target.with_suffix('.failed')
    with _locked(target.with_suffix('.lock')):
        if not _fault(target):
            return
        if failure.is_file() and not failure.is_symlink() and failure.stat().st_mtime > started:
            raise BuildError(failure.read_text('utf-8', 'replace'))
        if not quiet and requested() != 'pytorch':
            _announce(target.parent)
        try:
            compile_units(units, compiler, target)
        except BuildError as error:
            write_atomically(failure, str(error), sync=False)
            raise
        failure.unlink(missing_ok=True)


@functools.cache
def _announce(folder: Path) -> None:
    print(f'compiling native libraries into {folder}, once; this takes some seconds; {AHEAD}', file=sys.stderr)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if sys.platform == 'win32':
        raise BuildError('native libraries are not built on Windows')
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _fault(path: Path) -> str:
    """Why a library of the cache cannot be loaded; empty where it can."""
    try:
        doubt = _doubt(path)
        if doubt:
            return doubt
        whole = _checksum_file(path).read_bytes() == _checksum(path).encode()
    except FileNotFoundError:
        return 'has no checksum beside it' if path.exists() else 'is not built'
    return '' if whole else 'is damaged'


def _checksum_file(path: Path) -> Path:
    return path.with_suffix('.sha256')


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_folder(folder: Path) -> None:
    """Raises BuildError if another user could put a library there; closes the user's own default folder to others."""
    doubt, state = _doubt(folder), folder.stat()
    if doubt and state.st_uid == os.geteuid() and not os.environ.get('THEMASK_OPS_CACHE'):
        folder.chmod(state.st_mode & ~_WRITABLE_BY_OTHERS)  # made by an earlier version under a umask of 002
        doubt = _doubt(folder)
    if doubt:
        raise BuildError(
            f'{folder} {doubt}, so that its libraries are not safe to load; run "chmod go-w {folder}" if it is yours, '
            'or set THEMASK_OPS_CACHE to a folder of your own'
        )


def _doubt(path: Path) -> str:
    """How others than this user and root could have written a file or folder, or a link to it; empty if not."""
    if not hasattr(os, 'geteuid'):
        return ''
    state = path.stat()
    strangers = {path.lstat().st_uid, state.st_uid} - {os.geteuid(), 0}
    if strangers:
        return f'belongs to the user {strangers.pop()}'
    sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX  # others cannot replace what lies in it
    return 'can be written by others' if state.st_mode & _WRITABLE_BY_OTHERS and not sticky else ''


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b'\0')
    return digest.hexdigest()[:16]


def load(kind: Kind, path: Path) -> ctypes.CDLL:
    """Loads a built library into torch, and checks that it can run here.

    Raises:
        BuildError: it does not load, lacks a function, or has no code for this GPU.
        BackendError: ``THEMASK_OPS_INSTRUCTION_SET`` names none that this processor has.
    """
    import torch

    try:
        torch.ops.load_library(path)
        functions = ctypes.CDLL(str(path))
        if kind == 'cpu':
            functions.themask_instruction_set.restype = ctypes.c_char_p
            functions.themask_instruction_set.argtypes = [ctypes.c_int64]
            functions.themask_choose_instruction_set.restype = ctypes.c_bool
            functions.themask_choose_instruction_set.argtypes = [ctypes.c_char_p]
        else:
            functions.themask_cuda_problem.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise BuildError(f'{path} does not load: {error}; delete it to have it built anew') from error
    if kind == 'cuda' and (problem := functions.themask_cuda_problem().decode()):
        raise BuildError(f'{path} cannot run on this GPU: {problem}; set TORCH_CUDA_ARCH_LIST to its architecture')
    if kind == 'cpu' and (wanted := os.environ.get('THEMASK_OPS_INSTRUCTION_SET')):
        choose_instruction_set(wanted, functions)
    return functions


@functools.cache
def native(kind: Kind) -> ctypes.CDLL | BuildError:
    """The library, built and loaded on the first call; what went wrong where that fails."""
    try:
        return load(kind, library(kind, allow_build=os.environ.get('THEMASK_OPS_BUILD', '1') != '0'))
    except BuildError as error:
        return error


@functools.cache
def usable(kind: Kind) -> bool:
    """Whether there is a native library; warns once where there is none, at the line that called this package."""
    loaded = native(kind)
    if isinstance(loaded, BuildError) and requested() != 'pytorch':
        warnings.warn(
            f'There is no native library for {kind}; MSDeformAttn, attention and label maps run in slower PyTorch '
            f'forms: {loaded}. Mend this and start again, or set THEMASK_OPS_BACKEND=pytorch to be quiet.',
            stacklevel=_caller_level(),
        )
    return not isinstance(loaded, BuildError)


def _caller_level() -> int:
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals['__name__'].startswith(f'{__package__}.'):
        frame, level = frame.f_back, level + 1
    return level


def requested() -> str:
    """The value of ``THEMASK_OPS_BACKEND``.

    Raises:
        BackendError: it is none of `BACKENDS`.
    """
    choice = os.environ.get('THEMASK_OPS_BACKEND', 'auto').strip().lower() or 'auto'
    if choice not in BACKENDS:
        raise BackendError(f'THEMASK_OPS_BACKEND={choice} is none of {", ".join(BACKENDS)}')
    return choice


def cpu_library() -> ctypes.CDLL:
    """The loaded library for the CPU.

    Raises:
        BuildError: there is none.
    """
    loaded = native('cpu')
    if isinstance(loaded, BuildError):
        raise BuildError(str(loaded))  # a new one: an exception that is raised twice keeps the frames of both
    return loaded


def instruction_sets() -> list[str]:
    """The instruction sets that this processor has, the fastest first; empty without a native library."""
    loaded = native('cpu')
    names: list[str] = []
    while not isinstance(loaded, BuildError) and (name := loaded.themask_instruction_set(len(names))):
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The instruction set that the CPU library uses."""
    return cpu_library().themask_instruction_set(-1).decode()


def choose_instruction_set(name: str, functions: ctypes.CDLL | None = None) -> None:
    """Makes the CPU library use another instruction set from now on (for tests and benchmarks).

    Raises:
        BackendError: the processor lacks it, or the name is none.
    """
    if not (functions or cpu_library()).themask_choose_instruction_set(name.encode()):
        raise BackendError(f'the CPU library has no instruction set {name!r} that this processor can run')


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds what this torch can use and says where it is; the exit status is 1 if something could not be built."""
    import torch

    parser = argparse.ArgumentParser(description='Builds the native libraries ahead of time.')
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
