"""One logger for the package: rank 0 prints and writes the file, the other ranks print errors only."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from mmseg.utils.dist import get_dist_info, is_main_process
from mmseg.utils.errors import ConfigError, nearest

NAME = 'mmseg'
_LEVELS = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')
_FORMAT = '%(asctime)s - %(name)s - %(levelname)s - %(message)s'


def get_logger() -> logging.Logger:
    """The package's logger."""
    return logging.getLogger(NAME)


class _LogFile(logging.FileHandler):
    """A file that says once that the disk is full, and not in a traceback for every message."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by ``logging`` where a message could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            print(f'cannot write {self.baseFilename}: {error}', file=sys.stderr)


def log_traceback(error: BaseException, folder: Path) -> Path | None:
    """Writes where ``error`` was raised to the log file alone, on ranks without one to a file of their own.

    Returns:
        The file; None where the log has not begun.
    """
    record = get_logger().makeRecord(
        NAME, logging.ERROR, __file__, 0, 'the run ends', (), (type(error), error, error.__traceback__))
    for handler in get_logger().handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)
            return Path(handler.baseFilename)
    if is_main_process() or not folder.is_dir():
        return None
    path = folder / f'error_rank{get_dist_info()[0]}.log'
    with contextlib.closing(_LogFile(path, encoding='utf-8')) as file:
        file.setFormatter(logging.Formatter(_FORMAT))
        file.handle(record)
    return path


class _Terminal(logging.StreamHandler):
    """Standard output; nothing is said of a reader (``| head``) that has read enough."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by ``logging`` where a message could not be written."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def setup_logger(log_file: str | Path | None = None, level: str = 'INFO') -> logging.Logger:
    """Sends the package's messages to standard output and, on rank 0, to ``log_file``.

    Calling it again replaces the earlier handlers.

    Args:
        log_file: text file, opened for appending; its folder must exist.
        level: lowest level that rank 0 shows (``DEBUG`` .. ``CRITICAL``).

    Raises:
        ConfigError: unknown ``level``.
    """
    if level not in _LEVELS:
        raise ConfigError(f"log_level: unknown level '{level}'{nearest(level.upper(), _LEVELS)}")
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # what a full disk has left unwritten
            handler.close()
    main = is_main_process()
    handlers: list[logging.Handler] = [_Terminal(sys.stdout)]
    if log_file is not None and main:
        handlers.append(_LogFile(log_file, encoding='utf-8'))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level if main else logging.ERROR)
    logger.propagate = False
    return logger
