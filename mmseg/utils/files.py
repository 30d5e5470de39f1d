"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` when the block ends well, and not at all when it does not.

    A file that stood there before is replaced in one step.  Folders are made.

    Args:
        path: the file.
        sync: have the data on disk before the name is there, so that a power cut leaves a whole file too; many small
            files that can be made again are faster without.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.part', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_atomically(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Writes ``content`` (text as UTF-8) with :func:`atomic_file`."""
    with atomic_file(path, sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
