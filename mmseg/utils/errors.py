"""Errors that a user can act on, and the nearest known name that they show."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config, an override or a component's arguments are wrong.

    The message names the key, where it stands, what was expected and the nearest known name.
    """


class DataError(RuntimeError):
    """A file of a data set is missing, unreadable or inconsistent.

    The message names the file, its video and frame, and what to do about it.
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, is not safe to read, or does not fit the model."""


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient became NaN or infinite."""


class RunError(RuntimeError):
    """An error that nobody expected ended a run; the message says where its traceback is."""


class OtherRankError(RuntimeError):
    """The run ends because of an error of another rank, which reports it."""


_NAMES_SHOWN = 60


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or the known names where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    more = f' and {len(known) - _NAMES_SHOWN} more' if len(known) > _NAMES_SHOWN else ''
    return f' (known: {", ".join(known[:_NAMES_SHOWN])}{more})' if known else ''
