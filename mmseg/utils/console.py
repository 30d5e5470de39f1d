"""Tables in the terminal and in files."""

from rich.console import Console

_FILE_WIDTH = 160


def table_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that no table is cut."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_FILE_WIDTH)
