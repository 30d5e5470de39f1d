"""The order of frames and videos by their names, the same in every part of the project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r'(\d+)', re.ASCII)


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key of a file's name: digits count as numbers, wherever they stand; ties are broken by the name itself.

    ``1, 2, 10`` and ``frame_1, frame_2, frame_10`` are in order, and names of digits come before those that begin with
    a letter.

    >>> sorted(['frame_10', 'frame_2', '010', '9'], key=natural_key)
    ['9', '010', 'frame_2', 'frame_10']
    """
    parts = [part for part in _NUMBER.split(name) if part]
    return tuple((0, int(part), '') if part[0] in '0123456789' else (1, 0, part) for part in parts), name


def some(names: Sequence[str], most: int = 10) -> str:
    """The first ``most`` names, and how many more there are."""
    more = len(names) - most
    return ', '.join(names[:most]) + (f' and {more} more' if more > 0 else '')


def order_changed(names: Iterable[str]) -> bool:
    """Whether an earlier release, in which only names of digits counted as numbers, ordered these frames otherwise.

    Clips that a run draws after a resume are then of other frames than without it.
    """
    names = list(names)
    earlier = sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    return sorted(names, key=natural_key) != earlier
