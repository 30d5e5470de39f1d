"""Native libraries that are built on first use by plain compiler calls, and kept in a cache.

The file name of a library holds what it was built for, the compiler and a hash of sources and flags, so a change of
any of them builds anew and nothing stale is ever loaded. ``python -m mmseg.utils.native MODULE ...`` builds those of
some modules ahead of time. Environment:

* ``THEMASK_OPS_CACHE``: where libraries are kept (default ``$XDG_CACHE_HOME/themask/ops`` or ``~/.cache/themask/ops``);
* ``THEMASK_OPS_BUILD=0``: never compile, use what was built ahead of time;
* ``CXX``: the C++ compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 900


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
        ahead: how to build it ahead of time, for an error message.
    """

    name: str
    sources: tuple[Path, ...]
    units: tuple[Unit, ...]
    link: tuple[str, ...] = ()
    ahead: str = ''

    def file_name(self, compiler: str) -> str:
        """The name of the built file; ``compiler`` identifies the compiler's version."""
        sources = (part for path in sorted(self.sources) for part in (path.name, path.read_bytes()))
        flags = (flag for unit in self.units for flag in unit.flags)
        return f'{self.name}-{_digest([platform.machine(), *sources, *flags])}-{compiler}.so'


def cache_dir() -> Path:
    """The folder of the built libraries."""
    own = os.environ.get('THEMASK_OPS_CACHE')
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'themask' / 'ops'


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
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f'{command[0]} does not run: {error}') from error


def compile_library(library: Library, compiler: Sequence[str], target: Path, flags: Sequence[str] = ()) -> None:
    """Compile the units side by side, link them, and put the library at `target` in one step.

    Args:
        library: what to compile.
        compiler: the compiler's command.
        target: the library's path; written by rename, so a reader never sees half of it.
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


def cached_library(library: Library, compiler: Sequence[str] | None, allow_build: bool = True) -> Path:
    """The built library, building it where it is missing.

    Of several processes that start together one builds and the others wait for it; if it fails, they fail with it
    instead of trying in turn.

    Args:
        library: what it is made of.
        compiler: the compiler's command; None finds what another machine with the same sources built into a shared
            folder.
        allow_build: False only looks into the cache.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    folder = cache_dir()
    if compiler is None:
        found = sorted(folder.glob(library.file_name('*')))
        if found:
            return found[-1]
        raise BuildError('there is no C++ compiler (install g++, or set CXX)')
    target = folder / library.file_name(_digest([output([*compiler, '--version'])]))
    if target.exists():
        return target
    if not allow_build:
        raise BuildError(f'{target} is not built and THEMASK_OPS_BUILD=0 forbids building; {library.ahead}')
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
                compile_library(library, compiler, target)
            except BuildError as error:
                failure.write_text(str(error))
                raise
            failure.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f'{folder} cannot be written ({error}); set THEMASK_OPS_CACHE to a folder that can') from error
    return target


def loaded(made_of: Callable[[], Library], load: Callable[[Path], ctypes.CDLL]) -> ctypes.CDLL | BuildError:
    """A library for ctypes, built where it is missing; what went wrong where that fails.

    Args:
        made_of: says what it is made of.
        load: loads the built file and declares its functions.
    """
    try:
        return load(cached_library(made_of(), find_cxx(), building_allowed()))
    except (RuntimeError, OSError) as error:  # no compiler; a file that cannot be read or loaded
        return BuildError(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the libraries of some modules and says where they are; the exit status is 1 if one could not be built."""
    parser = argparse.ArgumentParser(description='Builds native libraries ahead of time.')
    parser.add_argument('modules', metavar='MODULE', nargs='+', help='has a function made_of() -> Library')
    status = 0
    for name in parser.parse_args(arguments).modules:
        started = time.perf_counter()
        try:
            path = cached_library(importlib.import_module(name).made_of(), find_cxx())
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
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]}: {error}') from error
    if result.returncode:
        raise BuildError(f'{shlex.join(command)}\n{result.stderr.strip()[-2000:]}')


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if sys.platform == 'win32':
        raise BuildError('native libraries are not built on Windows')
    import fcntl

    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == '__main__':
    sys.exit(main())
