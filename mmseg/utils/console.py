"""Tables in the terminal and in files; the one place that makes a console, since data must not be taken for markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 160


def table_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that no table is cut.

    Text is shown as it is: a class may be named ``road [/main]``, ``[void]`` or ``:car:``.
    """
    console = Console(stderr=stderr, markup=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, markup=False, emoji=False, width=_FILE_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, texts: int = 1) -> Table:
    """A table whose first ``texts`` columns hold text, and the others numbers."""
    shown = Table(title=title, title_justify='left')
    for i, name in enumerate(columns):
        shown.add_column(name, justify='left' if i < texts else 'right')
    for row in rows:
        shown.add_row(*row)
    return shown
