"""What a reader of annotations gives: pictures, and what is annotated in them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmseg.utils.errors import DataError
from mmseg.utils.files import decoded
from mmseg.utils.images import read_file

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


@dataclass
class Annotation:
    """A labelled region.

    Attributes:
        label: name of its class.
        where: file and id, for messages.
        draw: (height, width) of the image -> its pixels, bool ``[H, W]``; raises ``ValueError`` for data that make no
            sense.  None where it has no area.
        kind: what it is, as ``'polyline'``.
    """

    label: str
    where: str
    draw: Callable[[int, int], np.ndarray] | None
    kind: str = 'polygon'


@dataclass
class Picture:
    """An image and its annotations.

    Attributes:
        name: its name in the set, with slashes and suffix.
        image: its file, or the content of one.
        annotations: in the order in which they are drawn; a later one covers an earlier one.
        split: where the format has splits.
        labels: reads a whole label map instead of annotations: values 0..K-1 and 255, uint8 ``[H, W]``.
        video: where the format has videos.
    """

    name: str
    image: Path | bytes
    annotations: list[Annotation] = field(default_factory=list)
    split: str | None = None
    labels: Callable[[], np.ndarray] | None = None
    video: str | None = None


@dataclass
class Faults:
    """What is wrong with the input; with ``keep_going`` it is collected, otherwise the first fault is an error."""

    keep_going: bool = False
    found: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """One fault, with file and id.

        Raises:
            DataError: unless ``keep_going``.
        """
        if not self.keep_going:
            raise DataError(f'{message} (--keep-going leaves such entries out and lists them)')
        self.found.append(message)


@dataclass
class Read:
    """What a reader gives.

    Attributes:
        classes: names, in the order of their labels.
        pictures: made one after the other.
        number: of pictures.
        inputs: files and folders that are read, beside the images.
        ignored: annotations that are not part of a picture, by what they are.
    """

    classes: list[str]
    pictures: Iterable[Picture]
    number: int
    inputs: list[Path]
    ignored: Counter[str] = field(default_factory=Counter)


class Reader(Protocol):
    """Reads a format: its source, the folder of images where it is another, and where faults go."""

    def __call__(self, source: Path, images: Path | None, faults: Faults) -> Read:
        """Pictures are made while they are iterated over; faults may come until then."""
        ...


def load_json(path: Path, kind: type | tuple[type, ...]) -> Any:
    """The content of a JSON file, a dict or a list as ``kind`` says.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(decoded(read_file(path), path))
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: is no JSON: {error}') from None
    if not isinstance(content, kind):
        raise DataError(f'{path}: expected a JSON {kind}, got {type(content).__name__}; is it of this format?')
    return content


class ImageFolder:
    """Finds images by the names that annotations give.

    Args:
        folder: searched with all folders below.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f'{folder}: no such folder of images; name it with --images')
        self.folder = folder
        self._by_name: dict[str, list[Path]] = {}
        for root, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            for name in sorted(files):
                if name.lower().endswith(IMAGES) and not name.startswith('.'):
                    self._by_name.setdefault(name, []).append(Path(root, name))

    def find(self, name: str, faults: Faults, where: str) -> Path | None:
        """The file of an image, by its path or bare name; None, and a fault, where there is none or two."""
        plain = name.replace('\\', '/')
        direct = self.folder / plain
        if '..' not in Path(plain).parts and not Path(plain).is_absolute() and direct.is_file():
            return direct
        found = self._by_name.get(plain.rsplit('/', 1)[-1], [])
        if len(found) == 1:
            return found[0]
        what = f'{len(found)} files of that name' if found else 'no such file'
        faults.add(f"{where}: the image '{name}' is not in {self.folder} ({what})")
        return None


def polygon_points(values: Any, where: str) -> np.ndarray:
    """Points ``[P, 2]`` of a flat list x, y, x, y, ... or a list of pairs.

    Raises:
        ValueError: fewer than three points, or no numbers.
    """
    try:
        points = np.asarray(values, float).reshape(-1, 2)
    except (TypeError, ValueError):
        raise ValueError('a polygon should be numbers x, y, x, y, ...') from None
    if len(points) < 3 or not np.isfinite(points).all():
        raise ValueError(f'a polygon needs at least three points of finite numbers, got {len(points)}')
    return points


def ordered(annotations: Sequence[tuple[float, Annotation]]) -> list[Annotation]:
    """Annotations by a key, the smallest first; those of one key keep their order."""
    return [annotation for _, annotation in sorted(annotations, key=lambda pair: pair[0])]


def unique(names: Iterable[str]) -> list[str]:
    """Names without repetitions, in their order."""
    return list(dict.fromkeys(names))


