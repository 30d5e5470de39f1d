"""How a command line begins and ends: one parser, and one line and a status for what its user can act on."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from mmseg.utils.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OtherRankError, RunError
from mmseg.utils.launcher import PATIENCE, detect_launcher, is_first_of_machine

USER_ERRORS = (ConfigError, CheckpointError, DataError, NonFiniteLossError, OtherRankError, RunError, OSError)
INTERRUPTED = 130  # of a program that Ctrl-C has ended


class ArgumentParser(argparse.ArgumentParser):
    """The parser of all tools.

    Processes may share one command line: a usage error is printed once a machine.  ``~`` is the home folder also behind
    ``=``, where a shell leaves it as it is.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{'formatter_class': argparse.RawDescriptionHelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, with home folders filled in."""
        words = [re.sub(r'(^|=)(~/.*)', lambda m: m[1] + os.path.expanduser(m[2]), word)
                 for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends with status 2; the first process of the machine says why, and the others leave it the time to."""
        if not is_first_of_machine():
            time.sleep(2 * PATIENCE)
            self.exit(2)
        super().error(message)


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
