"""Files that are either whole or not there, and that take the place of nothing their owner needs."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mmseg.utils.errors import ConfigError, DataError

_MARKS = {  # at the start of a text file -> its encoding; that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32',
    codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16',
}


@contextlib.contextmanager
def atomic_file(path: str | Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` when the block ends well, and not at all when it does not.

    An earlier file is replaced in one step.  Folders are made.

    Args:
        path: the file.
        sync: have the data on disk before the name is there, so that a power cut leaves a whole file too; many small
            files that can be made again are faster without.

    Raises:
        OSError: with the name of the file (a full disk, a folder that cannot be written).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path, instead=True):
        handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.part', dir=path.parent)
    try:
        with named_errors(path), os.fdopen(handle, 'wb') as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        with named_errors(path, instead=True):
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_atomically(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Writes ``content`` (text as UTF-8) with :func:`atomic_file`."""
    with atomic_file(path, sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path | None, value: Any) -> None:
    """Writes plain values with :func:`atomic_file`, where a path is given."""
    if path is not None:
        write_atomically(path, json.dumps(value, indent=1) + '\n')


@contextlib.contextmanager
def named_errors(path: str | Path, instead: bool = False) -> Iterator[None]:
    """Gives an ``OSError`` without a name (a full disk) that of the file being written; ``instead`` of any other."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (instead or error.filename is None):
            error.filename, error.filename2 = str(path), None
        raise


def user_path(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder, unless there is something of that very name."""
    path = Path(path)
    return path if not str(path).startswith('~') or path.exists() else Path(os.path.expanduser(path))


def refuse_overwriting(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Refuses an output that is one of the inputs, also by another name or through links.

    Args:
        outputs: option (``'--out'``) -> file or folder that would be written; None where there is none.
        inputs: what it is (``'input'``, ``'checkpoint'``) -> file or folder that is read.

    Raises:
        ConfigError: naming both.
    """
    sources = {_identity(source): name for name, source in inputs.items() if source is not None}
    for option, output in outputs.items():
        name = sources.get(_identity(output)) if output is not None else None
        if name is not None:
            raise ConfigError(f"{option}: '{output}' is the {name} and would be overwritten; choose another name")


def _identity(path: str | Path) -> tuple[int, int] | str:
    """What two names of one file have in common."""
    path = user_path(path)
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:  # it does not exist (yet)
        return os.path.realpath(path)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without the white space around them and a mark before them.

    Raises:
        DataError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    lines = decoded(Path(path).read_bytes(), path).splitlines()
    return [line.strip() for line in lines if line.strip()]


def decoded(data: bytes, path: str | Path) -> str:
    """The text of a UTF-8 file, without a mark before it.

    Raises:
        DataError: it is of another encoding, which is named, or holds zero bytes.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise DataError(f'{path}: is {encoding} text; save it as UTF-8')
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b'\n') + 1
        raise DataError(f'{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 (Latin-1 or another '
                        'encoding of one byte a letter?); save it as UTF-8') from None
    if '\0' in text:
        raise DataError(f'{path}: holds zero bytes (UTF-16 text, or no text at all); save it as UTF-8')
    return text


def umask() -> int:
    """What the process takes away from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
