"""A trained model on one's own videos, of any length and size, with memory that does not grow.

Clips are cut from a stream of frames.  Offline, a clip looks both ways, and the clips are those of testing: blocks of
``stride * clip_len`` frames give ``stride`` clips whose frames are ``stride`` apart.  Clips may overlap; then the
scores of a frame are averaged over the clips that hold it.  Online, every frame is labelled when it comes, from a clip
of itself and past frames.  What the model computes for a frame alone is computed once, however many clips hold it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmseg.apis.inference import as_frame
from mmseg.apps.video_io import DEFAULT_FPS, Frame, Source, open_source, prefetch
from mmseg.core.precision import Precision
from mmseg.datasets.clip_sampler import TEST_STRIDE, cut_clips
from mmseg.datasets.labels import describe_labels
from mmseg.datasets.pipelines import Compose
from mmseg.datasets.pipelines.test_time_aug import flips_of
from mmseg.models.segmentors import Encoded, Scores
from mmseg.registry import DATASETS, find
from mmseg.utils.arguments import named_parameters
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.visual import Palette, colourise, legend, overlay

VIEWS = ('overlay', 'side-by-side', 'labels')
_PREPARED_AHEAD = 4
_LEGEND_ROWS = 3
_LEGEND_CELL = 160  # width of an entry, in pixels
_LEGEND_SECONDS = 1


def segment_video(
    model: Any,
    source: str | Path | int | Source | Iterable[np.ndarray],
    clip_len: int | None = None,
    stride: int | None = None,
    overlap: int = 0,
    online: bool = False,
    fps: float | None = None,
    dtype: str = 'float32',
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels the frames of a video one after the other; frames are read and prepared ahead in a thread.

    Args:
        model: a segmentor of :func:`mmseg.apis.init_segmentor`.
        source: a video file, a folder of images or a pattern such as ``'frames/*.jpg'``, the number of a camera, a
            :class:`~mmseg.apps.video_io.Source`, or an iterable of frames (uint8 [H, W, 3] BGR, PIL images or paths).
        clip_len: frames in a clip, T; default ``data.test.test_size`` of the model's config.
        stride: see :class:`VideoSegmenter`.
        overlap: likewise.
        online: likewise.
        fps: frame rate of images; see :func:`~mmseg.apps.video_io.open_source`.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Yields:
        The frame, uint8 [H, W, 3] BGR, and its labels, uint8 [H, W].

    Raises:
        DataError: the source is missing or holds no video, or something in memory is no frame.  Broken frames of files
            are reported and skipped.
        ConfigError: the options do not fit each other or the model.

    Example:
        >>> for frame, label in segment_video(model, 'street.mp4'):  # doctest: +SKIP
        ...     print(frame.shape, label.shape)
    """
    segmenter = VideoSegmenter(model, clip_len, stride, overlap, online, dtype)
    if isinstance(source, (str, Path, int)):
        source = open_source(source, fps)
    if not isinstance(source, Source):
        source = _InMemory(source)
    for frame, labels in segmenter(source):
        yield frame.image, labels


class _InMemory(Source):
    """Frames that the caller has."""

    def __init__(self, images: Iterable[Any]) -> None:
        if not isinstance(images, Iterable) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise DataError('source: expected a path, the number of a camera, or a list of frames, got '
                            f'{type(images).__name__}; wrap a single frame in []')
        super().__init__('frames', Fraction(DEFAULT_FPS), None)
        self._images = images

    def _frames(self) -> Iterator[Frame]:
        for index, image in enumerate(self._images):
            yield Frame(as_frame(image, f'frame #{index}'), index, index / self.fps, f'{index:06d}')


@dataclass
class _Slot:
    """A frame on its way through the clips.

    Attributes:
        frame: the frame.
        views: for every view of the test pipeline the input ``[3, h, w]``, on the CPU.
        flips: how each view is flipped.
        encoded: for every view what does not depend on other frames; None before it is needed.
        scores: for every view the sum of the scores over clips.
        clips: number of clips that were added.
        labels: uint8 ``[H, W]``, once all clips that hold the frame were added.
    """

    frame: Frame
    views: list[Tensor]
    flips: list[str | None]
    encoded: list[Encoded] | None = None
    scores: list[Scores] = field(default_factory=list)
    clips: int = 0
    labels: np.ndarray | None = None


class VideoSegmenter:
    """Labels a stream of frames clip by clip.

    Args:
        model: a segmentor with ``cfg``; put into eval mode.
        clip_len: frames in a clip, T; default ``data.test.test_size`` of the config, 1 where it has none.
        stride: frames from one frame of a clip to the next; default 3, as in testing.
        overlap: offline: how many of its T frames a clip shares with the next.
        online: label each frame from itself and past frames, without waiting for later ones.
        dtype: what the forward pass computes in.

    Raises:
        ConfigError: the options do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        clip_len: int | None = None,
        stride: int | None = None,
        overlap: int = 0,
        online: bool = False,
        dtype: str = 'float32',
    ) -> None:
        self.model = model.eval()
        self.clip_len = model.cfg.data.test.get('test_size', 1) if clip_len is None else clip_len
        self.stride = TEST_STRIDE if stride is None else stride
        self.overlap = overlap
        self.online = online
        if self.clip_len < 1 or self.stride < 1:
            raise ConfigError(f'clip length and stride must be at least 1, got {self.clip_len} and {self.stride}')
        if not 0 <= overlap < self.clip_len:
            raise ConfigError(f'overlap: expected 0..{self.clip_len - 1} (clip length - 1), got {overlap}')
        if online and overlap:
            raise ConfigError('overlap: online clips overlap as they must; leave it at 0')
        self._device = next(model.parameters()).device
        self._evaluation = functools.partial(Precision(self._device, dtype).evaluation, model)
        self._pipeline = Compose(model.cfg.data.test.pipeline)

    def __call__(
        self, source: Source, stopped: Callable[[], object] = bool
    ) -> Generator[tuple[Frame, np.ndarray], None, None]:
        """Yields every frame with its labels, uint8 [H, W] at the frame's size, in order.

        Args:
            source: the frames.
            stopped: see :func:`~mmseg.apps.video_io.prefetch`.
        """
        slots = prefetch(map(self._prepare, source), _PREPARED_AHEAD, source.live, stopped)
        with contextlib.closing(slots):  # type: ignore[type-var]
            yield from (self._online(slots) if self.online else self._offline(slots))

    def _prepare(self, frame: Frame) -> _Slot:
        item = self._pipeline({'frames': [frame.image]})
        views, metas = (value if isinstance(value, list) else [value] for value in (item['img'], item['img_metas']))
        return _Slot(frame, [view[0] for view in views], flips_of(metas))

    def _offline(self, slots: Iterable[_Slot]) -> Iterator[tuple[Frame, np.ndarray]]:
        for clips, finished in cut_clips(slots, self.clip_len, self.stride, self.overlap):
            for clip in clips:
                self._add_clip(clip)
            for slot in finished:
                yield slot.frame, self._label(slot) if slot.labels is None else slot.labels

    def _online(self, slots: Iterable[_Slot]) -> Iterator[tuple[Frame, np.ndarray]]:
        recent: deque[_Slot] = deque(maxlen=(self.clip_len - 1) * self.stride + 1)
        for slot in slots:
            recent.append(slot)
            slot.scores = self._scores(list(recent)[:: -self.stride][::-1])[-1]
            yield slot.frame, self._label(slot)

    def _add_clip(self, clip: Sequence[_Slot]) -> None:
        """Adds the scores of one clip to its frames; a frame that no other clip holds is labelled and let go."""
        for slot, scores in zip(clip, self._scores(clip)):
            if slot.clips:
                scores = [a._replace(maps=a.maps + b.maps) for a, b in zip(slot.scores, scores)]
            slot.scores = scores
            slot.clips += 1
            if not self.overlap:
                slot.labels, slot.encoded = self._label(slot), None

    @torch.no_grad()
    def _scores(self, clip: Sequence[_Slot]) -> list[list[Scores]]:
        """For each frame of a clip the scores ``[1, 1, K, h, w]`` of every view."""
        with self._evaluation():
            new = [slot for slot in clip if slot.encoded is None]
            views = [torch.stack(view).to(self._device) for view in zip(*(slot.views for slot in new))]
            for slot, *encoded in zip(new, *map(self.model.encode, views)):
                slot.encoded = encoded
            scores = []
            for view in zip(*(slot.encoded or () for slot in clip)):
                own, _ = self.model.scores_of(Encoded.join(view), len(clip))
                maps = own.maps.softmax(2) if self.overlap and self.model.score_kind == 'logits' else own.maps
                scores.append([own._replace(maps=each) for each in maps.split(1, 1)])
            return [list(views) for views in zip(*scores)]

    def _label(self, slot: _Slot) -> np.ndarray:
        """Labels of a frame from its scores, which are given up."""
        mean = [scores._replace(maps=scores.maps / slot.clips) if slot.clips > 1 else scores for scores in slot.scores]
        slot.scores = []
        return self.model.labels(mean, slot.frame.image.shape[:2], slot.flips)[0, 0].cpu().numpy()


def classes_of(model: Any) -> tuple[Sequence[str], Palette]:
    """Names and colours of the classes of a model: those of its checkpoint, or else of the data set of ``data.test``.

    Raises:
        ConfigError: the data set has fewer classes than the model.
    """
    names, palette = model.CLASSES, model.PALETTE
    if not names or not palette:
        cfg = model.cfg.data.test
        dataset: Any = find(DATASETS, cfg.type, 'data.test')
        names, palette = getattr(dataset, 'CLASSES', ()), getattr(dataset, 'PALETTE', ())
        if hasattr(dataset, 'label_map'):
            given: dict[str, Any] = {key: cfg.get(key) for key in named_parameters(describe_labels) if key in cfg}
            names, palette, _ = describe_labels(dataset, 'data.test', **given)
    if min(len(names), len(palette)) < model.num_classes:
        raise ConfigError(f'data.test: {len(names)} class names and {len(palette)} colours for a model of '
                          f'{model.num_classes} classes')
    return names, palette


class FrameView:
    """Draws frames and labels as pictures of one size.

    Args:
        names: of the classes.
        palette: [R, G, B] a class.
        kind: ``overlay``: colours over the frame; ``side-by-side``: frame and overlay; ``labels``: colours alone.
        opacity: share of the colours in the overlay.
        with_legend: add a strip with the classes in sight below the picture; a class keeps its place while it is in
            sight and for a second after.  Where there is no room for all, the largest are shown (now, or on the mean of
            about a second) and the others are counted.
        fps: frames per second, for the legend.

    Raises:
        ConfigError: an unknown kind, or an opacity outside 0..1.
    """

    def __init__(
        self,
        names: Sequence[str],
        palette: Palette,
        kind: str = 'overlay',
        opacity: float = 0.5,
        with_legend: bool = False,
        fps: float = DEFAULT_FPS,
    ) -> None:
        if kind not in VIEWS:
            raise ConfigError(f"unknown view '{kind}' (known: {', '.join(VIEWS)})")
        if not 0 <= opacity <= 1:
            raise ConfigError(f'opacity: expected 0..1, got {opacity}')
        self._names, self._palette = names, palette
        self._kind, self._opacity, self._with_legend = kind, opacity, with_legend
        self._stay = max(1, round(_LEGEND_SECONDS * fps))
        self._places: dict[int, int] = {}  # class -> its place in the legend
        self._seen: dict[int, int] = {}  # class -> number of the frame that showed it last
        self._shares = np.zeros(len(names))  # moving average of each class's share of the picture
        self._drawn = 0

    def __call__(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """uint8 [H', W', 3] BGR of a frame uint8 [H, W, 3] BGR and its labels uint8 [H, W]."""
        if self._kind == 'labels':
            picture = colourise(labels, self._palette)
        else:
            picture = overlay(image, labels, self._palette, self._opacity)
            if self._kind == 'side-by-side':
                picture = np.hstack([image, picture])
        self._drawn += 1
        return np.vstack([picture, self._legend(labels, picture.shape[1])]) if self._with_legend else picture

    def _legend(self, labels: np.ndarray, width: int) -> np.ndarray:
        """The strip, in places of equal size."""
        cell = min(width, _LEGEND_CELL)
        columns = width // cell
        room = _LEGEND_ROWS * columns
        shown, more = self._chosen(labels, room)
        if more:
            room -= 1  # the last place says so
        self._places = {c: place for c, place in self._places.items() if c in shown and place < room}
        free = sorted(set(range(room)) - set(self._places.values()), reverse=True)
        for label in shown:
            if label not in self._places:
                self._places[label] = free.pop()
        tiles = {place: legend([label], self._names, self._palette, cell) for label, place in self._places.items()}
        if more:
            tiles[room] = legend([], self._names, self._palette, cell, more)
        height = len(legend([0], self._names, self._palette, cell))
        strip = np.full((_LEGEND_ROWS * height, width, 3), 255, np.uint8)
        for place, tile in tiles.items():
            top, left = place // columns * height, place % columns * cell
            strip[top : top + height, left : left + cell] = tile
        return strip

    def _chosen(self, labels: np.ndarray, room: int) -> tuple[list[int], int]:
        """The classes in sight that are shown in ``room`` places, the largest first, and how many are not."""
        shares = np.bincount(labels.ravel(), minlength=256)[: len(self._names)] / labels.size
        self._shares += (shares - self._shares) / min(self._drawn, self._stay)
        self._seen |= dict.fromkeys(np.flatnonzero(shares).tolist(), self._drawn)
        in_sight = [label for label, seen in self._seen.items() if self._drawn - seen <= self._stay]
        in_sight.sort(key=lambda label: -max(shares[label], self._shares[label]))
        more = 0 if len(in_sight) <= room else len(in_sight) - room + 1
        return in_sight[: len(in_sight) - more], more
