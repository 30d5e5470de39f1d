"""A folder that belongs to one living process at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from mmseg.utils.errors import ConfigError

NAME = '.lock'
_held: dict[tuple[int, int], str] = {}  # lock files of this process, by device and inode


class FolderLock:
    """Holds ``<folder>/.lock`` until :meth:`release`, or until the process dies, however it dies.

    The lock is of POSIX (``fcntl.lockf``): it belongs to the process, not to the open file, so that forked workers that
    outlive a killed process do not hold it.  Such a lock is lost when its process closes the file anywhere, so nothing
    else here opens it.

    Args:
        folder: exists and can be written.

    Raises:
        ConfigError: another process holds it; the message says which.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / NAME
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, 'O_NOFOLLOW', 0), 0o666)
        status = os.fstat(self._file)
        self._key = status.st_dev, status.st_ino
        if self._key in _held:  # asking the system would be granted, and closing the file would free the first lock
            raise self._refusal(_held[self._key])
        if not _lock(self._file):
            holder = os.pread(self._file, 4096, 0).decode(errors='replace')
            os.close(self._file)
            raise self._refusal(holder)
        self._holder = json.dumps({
            'pid': os.getpid(), 'host': socket.gethostname(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._holder.encode(), 0)
        _held[self._key] = self._holder

    def _refusal(self, holder: str) -> ConfigError:
        try:
            by = '{host}, process {pid}, since {since}'.format_map(json.loads(holder))
        except (ValueError, KeyError, TypeError):
            by = 'another process'
        return ConfigError(
            f"'{self._path.parent}' is in use by another run ({by}); wait for its end, stop it, or choose another "
            '--work-dir')

    def release(self) -> None:
        """Lets others have the folder."""
        if _held.pop(self._key, None) is not None:
            os.close(self._file)


def _lock(file: int) -> bool:
    """Whether the lock is this process's now; where the system has no locks, it is."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks says something else
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True
