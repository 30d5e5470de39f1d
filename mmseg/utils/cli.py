"""How a command line ends: what its user can act on is one line and a status, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mmseg.utils.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OtherRankError, RunError
from mmseg.utils.launcher import detect_launcher

USER_ERRORS = (ConfigError, CheckpointError, DataError, NonFiniteLossError, OtherRankError, RunError, OSError)
INTERRUPTED = 130  # of a program that Ctrl-C has ended


def run_tool(run: Callable[[], int | None], failed: int = 1, parallel: bool = False) -> int:
    """Calls ``run`` and returns the exit status of the tool.

    Args:
        run: returns the status, or None for 0.
        failed: the status where an error of :data:`USER_ERRORS` ends it; its message goes to standard error.
        parallel: whether several processes of the tool share its work; any other tool refuses to be one of several,
            as each would write the same files.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a terminal that cannot show a letter ends no tool
            stream.reconfigure(errors='backslashreplace')
    try:
        launcher = detect_launcher()
        if launcher != 'none' and not parallel:
            raise ConfigError(f'this tool runs in one process, but {launcher} has started several; start it by itself')
        return run() or 0
    except BrokenPipeError:  # "tool | head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except USER_ERRORS as error:
        from mmseg.utils.dist import report_error  # imports torch, which not every tool needs

        report_error(error)
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED


def run_all(*steps: Callable[[], object]) -> None:
    """Runs every step, also after one that has failed: a result that cannot be written does not cost the others.

    The first error is raised at the end; what the others say is printed.
    """
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    if len(errors) > 1:
        from mmseg.utils.dist import describe

        for other in errors[1:]:
            print(f'error: {describe(other)}', file=sys.stderr)
    if errors:
        raise errors[0]
