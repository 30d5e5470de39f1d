"""Results of an evaluation as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmseg.utils.errors import DataError
from mmseg.utils.files import write_atomically

CSV_FILES = ('summary.csv', 'classes.csv', 'videos.csv')


@dataclass
class Results:
    """Scores as fractions; nan where nothing was counted.

    Attributes:
        summary: metric -> score over all frames.
        classes: one row a class: ``class``, ``IoU``, ``Acc``, ``Dice``, ``pixels`` (of the ground truth).
        videos: one row a video: ``video``, ``frames`` and the keys of ``summary``.
        confusion: int64 [K, K], rows = ground truth.
        frames: video -> one row a frame, in order: ``frame``, ``mIoU``, and ``consistency`` with the frame before.
        notes: sentences about scores that have no value.
    """

    summary: dict[str, float]
    classes: list[dict[str, Any]]
    videos: list[dict[str, Any]]
    confusion: np.ndarray
    frames: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def check_scored(self) -> None:
        """Raises :class:`DataError` where no pixel was scored: scores that do not exist are no result."""
        if not self.confusion.any():
            frames = sum(row['frames'] for row in self.videos)
            raise DataError(f'nothing was scored: {len(self.videos)} videos with {frames} frames hold no pixel whose '
                            'ground truth is a class')

    def as_dict(self) -> dict[str, Any]:
        """Everything but the confusion matrix and the frames, ready for JSON: nan becomes None."""
        return {**_plain(self.summary), 'per_class': [_plain(r) for r in self.classes],
                'per_video': [_plain(r) for r in self.videos]}

    def to_json(self, path: str | Path) -> None:
        """Writes :meth:`as_dict`."""
        write_atomically(path, json.dumps(self.as_dict(), indent=1))

    def to_csv(self, folder: str | Path) -> None:
        """Writes ``summary.csv``, ``classes.csv`` and ``videos.csv`` into ``folder``."""
        for name, rows in zip(CSV_FILES, ([self.summary], self.classes, self.videos)):
            text = io.StringIO(newline='')
            writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(Path(folder) / name, text.getvalue().encode(errors='backslashreplace'))

    def print(self, per_class: bool = False, per_video: bool = False) -> None:
        """Prints the summary, and on request the rows per class (those that occur) and per video, in per cent."""
        from mmseg.utils.console import table, table_console

        console = table_console()

        def show(title: str, rows: list[dict[str, Any]]) -> None:
            texts = isinstance(next(iter(rows[0].values())), str)
            shown = table(list(rows[0]), [list(map(_cell, row.values())) for row in rows], title, texts)
            for column in shown.columns:
                column.no_wrap = True
            console.print(shown)

        seen = [row for row in self.classes if not math.isnan(row['IoU'])]
        if per_class and seen:
            show('Classes', seen)
        if per_video and self.videos:
            show('Videos', self.videos)
        show('All frames, per cent', [self.summary])
        for note in self.notes:
            console.print(note, markup=False, highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return '-' if math.isnan(value) else f'{100 * value:.2f}'
    return f'{value:,}' if isinstance(value, int) else str(value)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
