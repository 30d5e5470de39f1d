"""One logger for the package: rank 0 prints and writes the file, the other ranks print errors only."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mmseg.utils.dist import is_main_process

NAME = 'mmseg'
_FORMAT = '%(asctime)s - %(name)s - %(levelname)s - %(message)s'


def get_logger() -> logging.Logger:
    """The package's logger."""
    return logging.getLogger(NAME)


def setup_logger(log_file: str | Path | None = None, level: str = 'INFO') -> logging.Logger:
    """Sends the package's messages to standard output and, on rank 0, to ``log_file``.

    Calling it again replaces the earlier handlers.

    Args:
        log_file: text file, opened for appending; its folder must exist.
        level: lowest level that rank 0 shows (``DEBUG`` .. ``ERROR``).
    """
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    main = is_main_process()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_file is not None and main:
        handlers.append(logging.FileHandler(log_file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level if main else logging.ERROR)
    logger.propagate = False
    return logger
