"""A small synthetic data set in VSPW's format, made from a seed: the data of the demo and of end-to-end tests.

Textured things move and occlude each other over panning stuff.  The classes come in pairs that share a shape and differ
in colour and texture; about a third of the frames are blurred, noisy, low in contrast and of a false colour, each for
itself, so that such a frame does not tell which of a pair it shows, while a sharp frame of the same clip does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg.datasets.vspw import VSPWDataset
from mmseg.utils.files import atomic_file, write_atomically
from mmseg.utils.images import VOID

_SIZES = ((120, 160), (120, 160), (112, 168), (128, 152), (104, 160))  # height, width; a video has one
_BAD_SHARE = 0.34  # of the frames
_OTHERS = 0  # raw label of what belongs to no class


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    'stripes': lambda u, v: np.sign(np.sin(u)),
    'checks': lambda u, v: np.sign(np.sin(u) * np.sin(v)),
    'dots': lambda u, v: np.where(np.cos(u) + np.cos(v) > 0.6, 1.0, -0.45),
    'rings': lambda u, v: np.sign(np.sin(np.hypot(u, v))),
    'plain': lambda u, v: 0.15 * np.sin(u / 5) * np.cos(v / 5),
}
_Shape = tuple[float, float, float]  # width, height, and the p of the norm whose unit circle it is
_BOX, _ELLIPSE, _DISC, _DIAMOND = (1.35, 0.8, np.inf), (0.75, 1.3, 2), (1, 1, 2), (1.25, 1.25, 1)


@dataclass(frozen=True)
class _Look:
    """How a class looks: base colour (BGR), shape (None fills a region), texture and its period in pixels."""

    colour: tuple[int, int, int]
    shape: _Shape | None
    pattern: str
    period: float


# Neighbours in each table are a pair: the same shape, another colour and texture.
_UPPER = {
    'wall': _Look((130, 160, 195), None, 'checks', 13),
    'curtain': _Look((205, 160, 115), None, 'plain', 13),
}
_LOWER = {
    'grass': _Look((70, 150, 90), None, 'dots', 8),
    'sand': _Look((115, 105, 110), None, 'stripes', 11),
}
_THINGS = {
    'sofa': _Look((50, 50, 200), _BOX, 'stripes', 9),
    'train': _Look((60, 130, 190), _BOX, 'dots', 9),
    'person': _Look((50, 85, 125), _ELLIPSE, 'checks', 11),
    'cat': _Look((120, 60, 75), _ELLIPSE, 'plain', 11),
    'lamp': _Look((50, 200, 215), _DISC, 'rings', 10),
    'clock': _Look((190, 205, 95), _DISC, 'checks', 10),
    'tent': _Look((205, 90, 50), _DIAMOND, 'dots', 9),
    'pillow': _Look((190, 60, 160), _DIAMOND, 'rings', 9),
}
_LOOKS = {**_UPPER, **_LOWER, **_THINGS}
CLASS_IDS = {name: VSPWDataset.CLASSES.index(name) + 1 for name in _LOOKS}
"""Raw label of each of the 12 classes that occur, by name; their colours in VSPW's palette are far apart."""

SPLITS = {'train': (72, 12), 'val': (14, 20), 'test': (3, 12)}
"""Number of videos and of frames a video, by split; the test split has no masks."""


class _Surface:
    """One instance of a class: its texture and where it is."""

    def __init__(self, rng: np.random.Generator, name: str, height: int, width: int) -> None:
        self._size, self._label, self._look = (width, height), CLASS_IDS[name], _LOOKS[name]
        speed = rng.uniform(1.0, 3.5) if self._look.shape else rng.uniform(0.5, 2.0)
        heading = rng.uniform(0, 2 * np.pi)
        self._angle = rng.uniform(-0.35, 0.35)
        self._wave = 2 * np.pi / (self._look.period * rng.uniform(0.85, 1.15))
        self._colour = np.array(self._look.colour) + rng.uniform(-15, 15, 3)
        self._centre = rng.uniform((0.15 * width, 0.2 * height), (0.85 * width, 0.85 * height))
        self._velocity = speed * np.array([np.cos(heading), 0.6 * np.sin(heading)])
        self._radius = rng.uniform(17, 29)

    def paint(self, frame: np.ndarray, label: np.ndarray, region: np.ndarray | None = None) -> None:
        """Paints the surface over float32 BGR ``frame`` and ``label``, inside ``region`` or its own shape."""
        y, x = np.indices(label.shape, np.float32)
        x, y = x - self._centre[0], y - self._centre[1]
        cos, sin = np.cos(self._angle), np.sin(self._angle)
        u, v = cos * x + sin * y, cos * y - sin * x
        if self._look.shape:
            stretch_u, stretch_v, norm = self._look.shape
            region = np.linalg.norm((u / stretch_u, v / stretch_v), norm, axis=0) < self._radius
            label[cv2.dilate(region.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)] = VOID
        texture = _PATTERNS[self._look.pattern](u[region] * self._wave, v[region] * self._wave)
        frame[region] = self._colour + 30 * texture[:, None]
        label[region] = self._label

    def move(self) -> None:
        """One frame on; things turn round at the border, so that they stay in the picture."""
        self._centre = self._centre + self._velocity
        for axis, size in enumerate(self._size if self._look.shape else ()):
            if not 0.1 * size < self._centre[axis] < 0.9 * size:
                self._velocity[axis] = np.copysign(self._velocity[axis], size / 2 - self._centre[axis])


def _degrade(rng: np.random.Generator, frame: np.ndarray) -> np.ndarray:
    """A bad frame: out of focus, low in contrast, of another brightness and colour, noisy."""
    frame = cv2.GaussianBlur(frame, None, rng.uniform(2.5, 4.0))  # type: ignore[call-overload]
    mean = frame.mean(axis=(0, 1))
    frame = mean + rng.uniform(0.25, 0.45) * (frame - mean) + rng.uniform(-25, 25) + rng.uniform(-35, 35, 3)
    return frame + rng.normal(0, rng.uniform(10, 18), frame.shape)


def render_video(
        rng: np.random.Generator, classes: tuple[str, ...], num_frames: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws one video.

    Args:
        rng: source of all that is random.
        classes: upper stuff, lower stuff, then the things from back to front.
        num_frames: length.

    Yields:
        A frame [H,W,3] uint8 BGR and its raw labels [H,W] uint8 (0 others, 255 void, 1..124).
    """
    height, width = _SIZES[rng.integers(len(_SIZES))]
    upper, lower, *things = [_Surface(rng, name, height, width) for name in classes]
    horizon = height * rng.uniform(0.3, 0.6)
    tilt, drift = rng.uniform(-0.12, 0.12), rng.uniform(-0.6, 0.6)
    border = int(rng.integers(1, 5))
    others = rng.random() < 0.25
    corner = rng.integers(0, (height - 22, width - 22))
    for index in range(num_frames):
        frame = np.empty((height, width, 3), np.float32)
        label = np.empty((height, width), np.uint8)
        line = horizon + drift * index + tilt * (np.arange(width) - width / 2)
        above = np.arange(height)[:, None] < line
        upper.paint(frame, label, above)
        lower.paint(frame, label, ~above)
        if others:
            window = slice(corner[0], corner[0] + 20), slice(corner[1], corner[1] + 20)
            frame[window] = 30
            label[window] = _OTHERS
        for thing in things:
            thing.paint(frame, label)
        label[:border] = label[-border:] = label[:, :border] = label[:, -border:] = VOID
        frame = cv2.GaussianBlur(frame, None, 0.6)  # type: ignore[call-overload]
        if rng.random() < _BAD_SHARE:
            frame = _degrade(rng, frame)
        else:
            frame = frame + rng.normal(0, 4, frame.shape)
        yield np.clip(frame, 0, 255).astype(np.uint8), label
        for surface in (upper, lower, *things):
            surface.move()


def _casts(rng: np.random.Generator, videos: int) -> list[tuple[str, ...]]:
    """The classes of every video, 3 to 6; each class comes up about equally often in a split."""
    def deck(names: dict[str, _Look]) -> Iterator[str]:
        while True:
            yield from rng.permutation(list(names))

    uppers, lowers, things = deck(_UPPER), deck(_LOWER), deck(_THINGS)
    casts = []
    for _ in range(videos):
        cast: dict[str, None] = {}
        number = int(rng.integers(1, 5))
        while len(cast) < number:
            cast[str(next(things))] = None
        casts.append((str(next(uppers)), str(next(lowers)), *cast))
    return casts


def write_mini_vspw(
        root: str | Path, seed: int = 0, splits: dict[str, tuple[int, int]] = SPLITS,
        progress: Callable[[str], None] = lambda _: None) -> None:
    """Writes the data set in VSPW's layout; the same seed gives the same files.

    The lists of videos are removed first and written last, that of the first split at the very end, so a data set that
    has it is whole.

    Args:
        root: folder, made if need be; folders of videos with the names of these are replaced.
        seed: any whole number >= 0.
        splits: videos and frames a video, by split; a split named ``test`` gets no masks.
        progress: called with the name of each finished video.
    """
    root = Path(root)
    names = {split: [f'{split}_{index:03d}' for index in range(videos)] for split, (videos, _) in splits.items()}
    for split in splits:
        (root / f'{split}.txt').unlink(missing_ok=True)
    for split, (_, frames) in splits.items():
        key = [seed, *split.encode()]
        for index, cast in enumerate(_casts(np.random.default_rng(key), len(names[split]))):
            folder = root / 'data' / names[split][index]
            if folder.exists():  # frames of another seed have other numbers
                shutil.rmtree(folder)
            _write_video(folder, np.random.default_rng([*key, index]), cast, frames, masks=split != 'test')
            progress(names[split][index])
    for split in reversed(list(names)):
        write_atomically(root / f'{split}.txt', '\n'.join(names[split]) + '\n', sync=False)


def _write_video(folder: Path, rng: np.random.Generator, cast: tuple[str, ...], frames: int, masks: bool) -> None:
    start = int(rng.integers(0, 500))
    for position, (frame, label) in enumerate(render_video(rng, cast, frames)):
        stem = f'{start + position:08d}'
        ok, data = cv2.imencode('.jpg', frame, [cv2.IMWRITE_JPEG_QUALITY, 92])
        assert ok
        write_atomically(folder / 'origin' / f'{stem}.jpg', data.tobytes(), sync=False)
        if masks:
            with atomic_file(folder / 'mask' / f'{stem}.png', sync=False) as file:
                Image.fromarray(label).save(file, 'PNG')
