"""Native libraries that are built on first use by plain compiler calls, and kept in a cache.

The file name of a library holds what it was built for, the compiler and a hash of sources and flags, so a change of
any of them builds anew and nothing stale is ever loaded.  A checksum lies beside it: what a crash or a full disk left
of a library is built anew.  What another user could have put there is not loaded.
``python -m mmseg.kernels.native MODULE ...`` builds those of some modules ahead of time. Environment:

* ``THEMASK_OPS_CACHE``: where libraries are kept (default ``$XDG_CACHE_HOME/themask/ops`` or ``~/.cache/themask/ops``,
  or the folder of temporary files for a user without a home);
* ``THEMASK_OPS_BACKEND=pytorch``: no word about building, nor where a slower form is used;
* ``THEMASK_OPS_BUILD=0``: never compile, use what was built ahead of time;
* ``CXX``: the C++ compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmseg.utils.files import write_atomically

TIMEOUT_S = 900
Loaded = TypeVar('Loaded')
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
MAKE = Path(__file__).parents[1] / 'models/decode_heads/mask2former/pixel_decoder/ops/make.sh'
AHEAD = f'to build all of them ahead of time: sh {MAKE}'


class BuildError(RuntimeError):
    """A library cannot be built; the message says why and how to mend it."""


@dataclass(frozen=True)
class Unit:
    """One compiler call: a source, its flags, the name of the object, and folders of headers from elsewhere.

    Where those folders lie does not enter the library's name, so that machines can share a cache.
    """

    source: Path
    flags: tuple[str, ...]
    name: str
    includes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Library:
    """What a library is made of.

    Attributes:
        name: how its file name begins; holds the versions of what it is linked with.
        sources: all files that it is compiled from, headers too.
        units: the compiler calls.
        link: flags of the last call, which links; not part of the file name.
    """

    name: str
    sources: tuple[Path, ...]
    units: tuple[Unit, ...]
    link: tuple[str, ...] = ()

    def file_name(self, compiler: str) -> str:
        """The name of the built file; ``compiler`` identifies the compiler's version."""
        sources = (part for path in sorted(self.sources) for part in (path.name, path.read_bytes()))
        flags = (flag for unit in self.units for flag in unit.flags)
        return f'{self.name}-{_digest([platform.machine(), *sources, *flags])}-{compiler}.so'


def cache_dir() -> Path:
    """The folder of the built libraries."""
    own = os.environ.get('THEMASK_OPS_CACHE')
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'themask' / 'ops'
    except RuntimeError:  # neither HOME nor an entry in the table of users, as in some containers
        return Path(tempfile.gettempdir()) / f'themask-ops-{os.geteuid()}'


def building_allowed() -> bool:
    """Whether ``THEMASK_OPS_BUILD`` leaves the compiler to be called."""
    return os.environ.get('THEMASK_OPS_BUILD', '1') != '0'


def first_command(candidates: Iterable[str]) -> list[str] | None:
    """The first of some commands (with arguments, as in ``CXX``) that is installed, or None."""
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def find_cxx() -> list[str] | None:
    """The C++ compiler's command, or None where there is none."""
    return first_command([os.environ.get('CXX', ''), 'g++', 'c++', 'clang++'])


def output(command: Sequence[str]) -> str:
    """What a short command prints.

    Raises:
        BuildError: it does not run or fails.
    """
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode(errors='replace')
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f'{command[0]} does not run: {error}') from error


def compile_library(library: Library, compiler: Sequence[str], target: Path, flags: Sequence[str] = ()) -> None:
    """Compile the units side by side, link them, and put the library at `target` in one step.

    Args:
        library: what to compile.
        compiler: the compiler's command.
        target: the library's path; written by rename, so a reader never sees half of it, nor does a crash leave it.
        flags: more flags for every call (tests: sanitizers).

    Raises:
        BuildError: the compiler failed.
        OSError: the folder of `target` cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.build-') as folder:
        objects = [f'{folder}/{unit.name}.o' for unit in library.units]
        commands = []
        for unit, built in zip(library.units, objects):
            includes = [part for include in unit.includes for part in ('-isystem', str(include))]
            commands.append([*compiler, *flags, *unit.flags, *includes, '-c', str(unit.source), '-o', built])
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        result = f'{folder}/{target.name}'
        _run([*compiler, *flags, *objects, '-shared', *library.link, *_own_runtime(), '-o', result])
        os.chmod(result, os.stat(result).st_mode & ~_WRITABLE_BY_OTHERS)
        with open(result, 'rb') as file:
            os.fsync(file.fileno())
        write_atomically(_checksum_file(target), _checksum(Path(result)))
        os.replace(result, target)


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


def cached_library(
    library: Library, compiler: Sequence[str] | None, allow_build: bool = True, quiet: bool = False
) -> Path:
    """The built library, building it where it is missing, damaged or of doubtful origin.

    Of several processes that start together one builds and the others wait for it; if it fails, they fail with it
    instead of trying in turn.

    Args:
        library: what it is made of.
        compiler: the compiler's command; None finds what another machine with the same sources built into a shared
            folder.
        allow_build: False only looks into the cache.
        quiet: do not say that the compiler works and how to have it work ahead of time.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be used.
    """
    folder = cache_dir()
    try:
        if folder.exists():
            _check_folder(folder)
        if compiler is None:
            found = [path for path in sorted(folder.glob(library.file_name('*'))) if not _fault(path)]
            if found:
                return found[-1]
            raise BuildError('there is no C++ compiler (install g++, or set CXX)')
        target = folder / library.file_name(_digest([output([*compiler, '--version'])]))
        fault = _fault(target)
        if fault and not allow_build:
            raise BuildError(f'{target} {fault}, and THEMASK_OPS_BUILD=0 forbids building; {AHEAD}')
        if fault:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _check_folder(folder)
            _build_once(library, compiler, target, quiet)
    except OSError as error:
        raise BuildError(f'{folder} cannot be used ({error}); set THEMASK_OPS_CACHE to a folder of your own') from error
    return target


def _build_once(library: Library, compiler: Sequence[str], target: Path, quiet: bool) -> None:
    """Builds unless another process does, or fails, meanwhile."""
    started = time.time()
    failure = target.with_suffix('.failed')
    with _locked(target.with_suffix('.lock')):
        if not _fault(target):
            return
        if failure.is_file() and not failure.is_symlink() and failure.stat().st_mtime > started:
            raise BuildError(failure.read_text('utf-8', 'replace'))
        if not quiet and not _silenced():
            _announce(target.parent)
        try:
            compile_library(library, compiler, target)
        except BuildError as error:
            write_atomically(failure, str(error), sync=False)
            raise
        failure.unlink(missing_ok=True)


@functools.cache
def _announce(folder: Path) -> None:
    print(f'compiling native libraries into {folder}, once; this takes some seconds; {AHEAD}', file=sys.stderr)


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


def loading(path: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What ``load`` makes of a built library.

    Raises:
        BuildError: it does not load, or lacks a function.
    """
    try:
        return load(path)
    except (OSError, AttributeError) as error:
        raise BuildError(f'{path} does not load: {error}; delete it to have it built anew') from error


def loaded(made_of: Callable[[], Library], load: Callable[[Path], ctypes.CDLL]) -> ctypes.CDLL | BuildError:
    """A library for ctypes, built where it is missing; what went wrong where that fails.

    Args:
        made_of: says what it is made of.
        load: loads the built file and declares its functions.
    """
    try:
        return loading(cached_library(made_of(), find_cxx(), building_allowed()), load)
    except BuildError as error:
        return error


def warn_of_slower_form(what: str, reason: BuildError | str, stacklevel: int) -> None:
    """Warns that a slower form is used, unless the user has asked for it by ``THEMASK_OPS_BACKEND=pytorch``."""
    if not _silenced():
        warnings.warn(
            f'{what}: {reason}. Mend this and start again, or set THEMASK_OPS_BACKEND=pytorch to be quiet.',
            stacklevel=stacklevel + 1,
        )


def _silenced() -> bool:
    return os.environ.get('THEMASK_OPS_BACKEND', '').strip().lower() == 'pytorch'


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the libraries of some modules and says where they are; the exit status is 1 if one could not be built."""
    parser = argparse.ArgumentParser(description='Builds native libraries ahead of time.')
    parser.add_argument('modules', metavar='MODULE', nargs='+', help='has a function made_of() -> Library')
    status = 0
    for name in parser.parse_args(arguments).modules:
        started = time.perf_counter()
        try:
            path = cached_library(importlib.import_module(name).made_of(), find_cxx(), quiet=True)
            print(f'{name}: {path} ({time.perf_counter() - started:.1f} s)')
        except BuildError as error:
            print(f'{name}: not built: {error}', file=sys.stderr)
            status = 1
    return status


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b'\0')
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]}: {error}') from error
    if result.returncode:
        raise BuildError(f'{shlex.join(command)}\n{result.stderr.decode(errors="replace").strip()[-2000:]}')


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


if __name__ == '__main__':
    sys.exit(main())
