"""Tables in the terminal and in files; the one place that makes a console, since data must not be taken for markup."""

from rich.console import Console

_FILE_WIDTH = 160


def table_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that no table is cut.

    Text is shown as it is: a class may be named ``road [/main]``, ``[void]`` or ``:car:``.
    """
    console = Console(stderr=stderr, markup=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, markup=False, emoji=False, width=_FILE_WIDTH)
