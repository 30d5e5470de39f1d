"""Names of videos: read from lists, and made for the parts into which gaps cut a video."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mmseg.utils.errors import DataError
from mmseg.utils.files import decoded
from mmseg.utils.images import read_file
from mmseg.utils.names import natural_key, some

from .listing import visible


@dataclass(frozen=True)
class Part:
    """A part of a video, from one key of :func:`~mmseg.utils.names.natural_key` up to the next part's; None is open."""

    video: str
    start: Any
    stop: Any

    def __contains__(self, frame: str) -> bool:
        key = natural_key(frame)
        return (self.start is None or key >= self.start) and (self.stop is None or key < self.stop)


def cut_at_gaps(frames: Sequence[str], max_gap: int, video: str) -> list[list[str]]:
    """Runs of frames whose numbers, the last in their names, grow by no more than ``max_gap``.

    >>> cut_at_gaps(['1', '2', '9'], 1, 'a')
    [['1', '2'], ['9']]
    """
    runs: list[list[str]] = []
    last = None
    for frame in frames:
        numbers = re.findall(r'\d+', frame, re.ASCII)
        if not numbers:
            raise DataError(f"layout.max_gap needs a number in the name of every frame, and frame '{frame}' of video "
                            f"'{video}' has none")
        if last is None or int(numbers[-1]) - last > max_gap:
            runs.append([])
        runs[-1].append(frame)
        last = int(numbers[-1])
    return runs


def read_list(file: str, split: str) -> list[str]:
    """The videos that a text or JSON file names for a split.

    Raises:
        DataError: it is missing, cannot be read, names no video, or names one that leads out of the data set.
    """
    if not os.path.isfile(file):
        folder, suffix = os.path.dirname(file), os.path.splitext(file)[1]
        there = sorted(name for name in visible(folder) or () if name.endswith(suffix))
        raise DataError(f'{file}: no such split file; there are {there}')
    text = decoded(read_file(file), file)
    if file.endswith('.json'):
        named = [(name, file) for name in _json_names(text, file, split)]
    else:
        lines = enumerate(text.splitlines(), 1)
        named = [(line.strip(), f'{file}, line {number}') for number, line in lines if line.strip()]
    if not named:
        raise DataError(f'{file}: the split names no video; write one video a line')
    return [_video_name(name, where) for name, where in named]


def _json_names(text: str, file: str, split: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{file}: is no JSON: {error}') from None
    if isinstance(names, dict):
        if split not in names:
            raise DataError(f"{file}: has no split '{split}'; it has {some(list(names))}")
        names = names[split]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: expected a list of names of videos, or a dict of such lists by split, got "
                        f'{reprlib.repr(names)}')
    return names


def _video_name(name: str, where: str) -> str:
    """A name without needless slashes; results are written to folders of that name, so it must not lead elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts or not path.parts:
        raise DataError(f"{where}: the video name '{name}' leads out of the data set; write the name of a folder in "
                        "it, as 'video' or 'city/video'")
    return str(path)
