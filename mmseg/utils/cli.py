"""How a command line ends: what its user can act on is one line and a status, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mmseg.utils.dist import report_error
from mmseg.utils.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OtherRankError

USER_ERRORS = (ConfigError, CheckpointError, DataError, NonFiniteLossError, OtherRankError, OSError)
INTERRUPTED = 130  # of a program that Ctrl-C has ended


def run_tool(run: Callable[[], int | None], failed: int = 1) -> int:
    """Calls ``run`` and returns the exit status of the tool.

    Args:
        run: returns the status, or None for 0.
        failed: the status where an error of :data:`USER_ERRORS` ends it; its message goes to standard error.
    """
    try:
        return run() or 0
    except BrokenPipeError:  # "tool | head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except USER_ERRORS as error:
        report_error(error)
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED
