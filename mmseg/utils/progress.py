"""How far a loop over frames has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mmseg.utils.console import table_console


class Progress:
    """Steps, frames a second and the time left: a bar on standard error if that is a terminal, otherwise lines.

    Args:
        what: name of a step.
        total: number of steps, where it is known.
        say: takes a line; None shows nothing at all.
        interval: seconds between two lines.
    """

    def __init__(self, what: str, total: int | None, say: Callable[[str], None] | None, interval: float = 30) -> None:
        self.steps = self.frames = 0
        self._what, self._total, self._say, self._interval = what, total, say, interval
        console = table_console(stderr=True)
        self._bar = Bar(
            TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'),
            TimeRemainingColumn(), console=console, auto_refresh=False, disable=say is None or not console.is_terminal)
        self._task = self._bar.add_task(what, total=total, rate='')
        self._start = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def advance(self, frames: int = 1) -> None:
        """One more step, with ``frames`` frames."""
        self.steps += 1
        self.frames += frames
        if time.monotonic() - self._shown >= (self._interval if self._bar.disable else 0.1):
            self._show()

    def __exit__(self, *_: object) -> None:
        if self.steps:
            self._show()
        self._bar.stop()

    def _show(self) -> None:
        self._shown = time.monotonic()
        rate = f'{self.frames / max(self.seconds, 1e-9):.1f} frames/s'
        if not self._bar.disable:
            self._bar.update(self._task, completed=self.steps, rate=rate, refresh=True)
        elif self._say is not None:
            of, left = '', ''
            if self._total:
                of = f'/{self._total}'
                left = f', ETA {timedelta(seconds=round(self.seconds / self.steps * (self._total - self.steps)))}'
            self._say(f'{self._what} {self.steps}{of}, {rate}{left}')
