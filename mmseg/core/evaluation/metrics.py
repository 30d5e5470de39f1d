"""Metrics of video semantic segmentation, streamed: no prediction is kept once it has been counted.

Frames may come in any order inside a video, and videos may be interleaved.  What does not depend on the order is
counted at once; the video consistency needs neighbours, so a frame waits until all frames before it have come.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmseg.utils.images import as_label_map
from mmseg.utils.names import natural_key

from .confusion import LABELS, class_scores, joint_histogram, mean_scores
from .results import Results
from .temporal import TemporalMeasure, mean_iou, temporal_measure
from .video_consistency import WindowCounts

Frame = int | str
_PAIR = 2  # frames of the window that says how consistent a frame is with the one before


@dataclass(frozen=True)
class ConsistencyOptions:
    """How VC_n is counted; the defaults are the official VSPW script.

    Attributes:
        lengths: the window lengths n.
        last_window: count the window that ends at the last frame too (L - n + 1 windows instead of L - n).
        min_frames: leave out videos with fewer frames; 17 is the variant that skips videos of <= 16 frames for VC8 too.
        remap_void: apply ``reduce_zero_label`` before the comparison, so that 0 (others) and 255 (void) are one label;
            the official script compares the labels as they stand in the files.
    """

    lengths: tuple[int, ...] = (8, 16)
    last_window: bool = False
    min_frames: int = 0
    remap_void: bool = False

    def __post_init__(self) -> None:
        if any(n < 2 for n in self.lengths):
            raise ValueError(f'VC: a window needs at least 2 frames, got lengths {list(self.lengths)}')
        if not isinstance(self.min_frames, int) or self.min_frames < 0:
            raise ValueError(f'min_frames: expected a whole number >= 0, got {self.min_frames!r}')
        for name in ('last_window', 'remap_void'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'{name}: expected True or False, got {getattr(self, name)!r}')


@dataclass
class _Frame:
    """A frame that waits for its turn; without ground truth it has no labels."""

    name: Frame
    compared: np.ndarray | None  # ground truth as VC compares it
    gt: np.ndarray | None
    pred: np.ndarray
    image: np.ndarray | None
    iou: float


@dataclass
class _Video:
    """What is known of a video that is not finished."""

    confusion: np.ndarray
    stream: WindowCounts | None
    extras: dict[str, TemporalMeasure]
    windows: dict[int, tuple[float, int]]  # n -> sum of ratios, in the order of the windows, and their number
    frames: int = 0
    per_frame: list[tuple[Frame, float, float]] = field(default_factory=list)
    seen: set[Frame] = field(default_factory=set)
    waiting: dict[Frame, _Frame | None] = field(default_factory=dict)
    next: int = 0
    shape: tuple[int, ...] | None = None

    def add(self, windows: Iterable[tuple[int, int, int]]) -> None:
        """Counts windows: (n, pixels constant in both, pixels constant in the ground truth)."""
        for n, both, constant in windows:
            if constant:
                ratio, number = self.windows[n]
                self.windows[n] = ratio + both / constant, number + 1


class StreamingMetrics:
    """mIoU, mIoU_vspw, fwIoU, aAcc, mAcc, mDice and VC_n from frames in any order.

    Memory: one label pair and its run lengths per open video, and the frames that came before their turn; of a finished
    video its counts.  A video is finished when all its frames have come (if ``videos`` gives them) or by
    :meth:`finish`; :meth:`compute` may be called at any time and looks at what has come so far.

    Args:
        num_classes: K; labels are 0..K-1 and ``ignore_index``.
        ignore_index: the label that is not scored.  The video consistency compares it like any other.
        reduce_zero_label: ground truth comes as in VSPW's files: 0 = others, 1..K = classes, 255 = void.
        consistency: how VC_n is counted; None leaves it out.
        videos: for each video its frames in order.  Needed only to stream VC for frames that are named by strings:
            without it they wait until the video is finished and are then taken in natural order
            (:func:`~mmseg.utils.names.natural_key`).  Integer frames are positions, taken in ascending order.
        class_names: names for the per-class results.
        extras: optional measures over time: ``VEC<n>`` and ``TC`` (:mod:`mmseg.core.evaluation.temporal`).
        per_frame: give the scores of every frame, too (:attr:`Results.frames`).

    Example:
        >>> metrics = StreamingMetrics(num_classes=2, consistency=None)
        >>> metrics.update('v', 0, np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
        >>> metrics.compute()['aAcc']
        1.0
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
        consistency: ConsistencyOptions | None = ConsistencyOptions(),
        videos: Mapping[str, Sequence[Frame]] | None = None,
        class_names: Sequence[str] | None = None,
        extras: Sequence[str] = (),
        per_frame: bool = False,
    ) -> None:
        if not 0 < num_classes < LABELS or not 0 <= ignore_index < LABELS:
            raise ValueError(f'labels are 8-bit: expected 1..255 classes and ignore_index 0..255, '
                             f'got {num_classes} and {ignore_index}')
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f'expected {num_classes} class names, got {len(class_names)}')
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.consistency = consistency or ConsistencyOptions(lengths=())
        self.class_names = tuple(class_names) if class_names else tuple(map(str, range(num_classes)))
        self._reduce = _reduce_table(ignore_index) if reduce_zero_label else None
        self._extras: dict[str, Callable[[], TemporalMeasure]] = {}
        for name in extras:
            measure = temporal_measure(name, num_classes, ignore_index)
            if measure is None:
                raise ValueError(f"'{name}' is no measure over time; expected VEC<n> (n >= 2) or TC")
            self._extras[name] = measure
        self._per_frame = per_frame
        self._lengths = {*self.consistency.lengths, *([_PAIR] if per_frame else [])}
        self._in_order = bool(self._extras or self._lengths)
        self._positions = {name: {f: i for i, f in enumerate(frames)} for name, frames in (videos or {}).items()}
        self._open: dict[str, _Video] = {}
        self._done: dict[str, dict[str, Any]] = {}

    @property
    def needs_images(self) -> bool:
        """Whether :meth:`update` needs the frames themselves."""
        return 'TC' in self._extras

    def update(self, video: str, frame: Frame, pred: np.ndarray, gt: np.ndarray | None,
               image: np.ndarray | None = None) -> None:
        """Counts one frame.

        Args:
            video: name of the video.
            frame: its position (int) or its name.
            pred: predicted labels [H, W], 0..K-1.
            gt: ground truth [H, W], 0..K-1 and ``ignore_index`` (or as in the files, with ``reduce_zero_label``); None
                for a frame without labels, which is not scored and lies in no window.
            image: the frame, uint8 [H, W, 3] BGR; only ``TC`` looks at it.

        Raises:
            ValueError: a label out of range, sizes that differ, or a frame that has come before.
        """
        where = f'{video}/{frame}'
        pred = as_label_map(pred, f'{where}: prediction')
        raw = None if gt is None else as_label_map(gt, f'{where}: ground truth')
        if raw is not None and raw.shape != pred.shape:
            raise ValueError(f'{where}: the prediction is {_size(pred)}, the ground truth {_size(raw)}')
        labels = raw if self._reduce is None or raw is None else self._reduce[raw]
        confusion = None if labels is None else self._scored(joint_histogram(labels, pred), where)
        state, position = self._arrive(video, frame)
        if confusion is not None:
            state.confusion += confusion
            state.frames += 1
        if self._in_order:
            if state.shape not in (None, pred.shape):
                raise ValueError(f'{where}: {_size(pred)}, but the frames before are {state.shape[1]}x{state.shape[0]}'
                                 '; video consistency needs one size per video')
            state.shape = pred.shape
            compared = _copy(labels if self.consistency.remap_void else raw)
            state.waiting[position] = _Frame(
                frame, compared, _copy(labels) if self._extras else compared, pred.copy(),
                _copy(image) if self.needs_images else None,
                mean_scores(confusion)['mIoU'] if self._per_frame and confusion is not None else math.nan)
        self._advance(video, state)

    def skip(self, video: str, frame: Frame) -> None:
        """Says that ``frame`` will not come; its neighbours are compared as if it were not in the video."""
        state, position = self._arrive(video, frame)
        state.waiting[position] = None
        self._advance(video, state)

    def finish(self, video: str) -> None:
        """Closes ``video`` and frees its maps; nothing happens if it is closed already."""
        if video in self._open:
            self._done[video] = self._record(self._open.pop(video))

    def compute(self) -> dict[str, float]:
        """The scores over all frames so far, as fractions; nan where nothing was counted.

        Keys: ``mIoU``, ``mIoU_vspw``, ``fwIoU``, ``aAcc``, ``mAcc``, ``mDice``, one ``VC<n>`` per window length, and
        the extras.
        """
        return self.results().summary

    def results(self) -> Results:
        """Summary, and scores per class, per video and, with ``per_frame``, per frame."""
        records = self.state()
        confusion = self._confusion(records.values())
        scores = class_scores(confusion)
        return Results(
            summary=self._scores(records.values()),
            classes=[{'class': name, **{key: of_classes[i].item() for key, of_classes in scores.items()}}
                     for i, name in enumerate(self.class_names)],
            videos=[{'video': name, 'frames': record['frames'], **self._scores([record])}
                    for name, record in records.items()],
            confusion=confusion, notes=self._notes(records.values()),
            frames={name: [dict(zip(('frame', 'mIoU', 'consistency'), row)) for row in record['per_frame']]
                    for name, record in records.items() if self._per_frame})

    def video_scores(self, video: str) -> dict[str, float]:
        """The scores of a finished video, with the keys of :meth:`compute`."""
        return self._scores([self._done[video]])

    def state(self) -> dict[str, Any]:
        """All counts so far as plain Python numbers, lists and dicts (JSON), for :meth:`merge` on another rank."""
        unfinished = {name: self._record(copy.deepcopy(state)) for name, state in self._open.items()}
        records = {**self._done, **unfinished}
        return {name: records[name] for name in sorted(records, key=natural_key)}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds the videos of another rank's :meth:`state`.

        Every result is then the same to the last digit, however the videos were divided: counts are integers, and
        ratios are summed per video in the order of its windows and over videos in the order of their names.

        Raises:
            ValueError: a video that this rank has seen too: the windows of a video need all its frames in one place.
        """
        twice = sorted(set(state) & (set(self._open) | set(self._done)))
        if twice:
            raise ValueError(f'video {twice[0]} was evaluated on two ranks; give whole videos to a rank')
        self._done.update(copy.deepcopy(dict(state)))

    def _arrive(self, video: str, frame: Frame) -> tuple[_Video, Frame]:
        """The state of the video, and the position of the frame (its name where the video has no list of frames)."""
        if video in self._done:
            raise ValueError(f'{video}/{frame}: the video is finished, no further frame can be counted')
        state = self._open.get(video) or self._new_video()
        if frame in state.seen:
            raise ValueError(f'{video}/{frame}: the frame has come before')
        position = self._positions.get(video, {frame: frame}).get(frame)
        if position is None:
            raise ValueError(f'{video}/{frame}: not among the frames given for this video')
        self._open[video] = state
        state.seen.add(frame)
        return state, position

    def _new_video(self) -> _Video:
        lengths = sorted(self._lengths)
        return _Video(
            confusion=np.zeros((self.num_classes, self.num_classes), np.int64),
            stream=WindowCounts(lengths, self.consistency.last_window) if lengths else None,
            extras={name: make() for name, make in self._extras.items()},
            windows=dict.fromkeys(lengths, (0.0, 0)))

    def _advance(self, video: str, state: _Video) -> None:
        """Counts the windows of all frames whose turn has come."""
        while state.next in state.waiting:
            self._count(state, state.waiting.pop(state.next))
            state.next += 1
        if video in self._positions and len(state.seen) == len(self._positions[video]):
            self.finish(video)

    def _count(self, state: _Video, frame: _Frame | None) -> None:
        if frame is None:
            return
        if state.stream is not None and frame.compared is None:
            state.add(state.stream.gap())
        elif state.stream is not None and frame.compared is not None:
            state.add(state.stream.push(frame.compared, frame.pred))
            if self._per_frame:
                both, constant = state.stream.runs.count(_PAIR) or (0, 0)
                state.per_frame.append((frame.name, frame.iou, both / constant if constant else math.nan))
        for measure in state.extras.values():
            measure.push(frame.gt, frame.pred, frame.image)

    def _record(self, state: _Video) -> dict[str, Any]:
        """The counts of a finished video; ``state`` is used up."""
        for position in sorted(state.waiting, key=_frame_order):
            self._count(state, state.waiting[position])
        if state.stream is not None:
            state.add(state.stream.close())
        used = np.flatnonzero(state.confusion)
        return {
            'frames': state.frames,
            'pairs': used.tolist(),
            'pixels': state.confusion.ravel()[used].tolist(),
            'windows': {str(n): sums for n, sums in state.windows.items()},
            'areas': {name: measure.areas.tolist() for name, measure in state.extras.items()},
            'per_frame': state.per_frame,
        }

    def _confusion(self, records: Iterable[Mapping[str, Any]]) -> np.ndarray:
        """The confusion matrix of some videos together, int64 [K, K]."""
        confusion = np.zeros((self.num_classes, self.num_classes), np.int64)
        for record in records:
            confusion.reshape(-1)[record['pairs']] += np.array(record['pixels'], np.int64)
        return confusion

    def _scores(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """The scores of some videos together."""
        records = list(records)
        scores = mean_scores(self._confusion(records))
        for n in self.consistency.lengths:
            sums = [r['windows'][str(n)] for r in records if r['frames'] >= self.consistency.min_frames]
            windows = sum(count for _, count in sums)
            scores[f'VC{n}'] = math.fsum(ratio for ratio, _ in sums) / windows if windows else math.nan
        for name in self._extras:
            areas = [np.array(r['areas'][name]) for r in records]
            scores[name] = mean_iou(sum(areas, np.zeros((2, self.num_classes), np.int64)))
        return scores

    def _notes(self, records: Iterable[Mapping[str, Any]]) -> list[str]:
        """Scores that do not exist, and why."""
        records = [record for record in records if record['frames']]
        return [f'VC{n} has no value: no video has {n + (not self.consistency.last_window)} labelled frames in a row'
                for n in self.consistency.lengths
                if records and not any(record['windows'][str(n)][1] for record in records)]

    def _scored(self, counts: np.ndarray, where: str) -> np.ndarray:
        """The scored part [K, K] of joint counts [256, 256]; a label outside it is an error."""
        counts[self.ignore_index] = 0
        classes, shift = self.num_classes, int(self._reduce is not None)
        outside = np.flatnonzero(counts[classes:].any(1))
        if outside.size:
            raise ValueError(f'{where}: the ground truth holds label {classes + int(outside[0]) + shift}; expected '
                             f'{shift}..{classes - 1 + shift} and {self.ignore_index}')
        outside = np.flatnonzero(counts[:, classes:].any(0))
        if outside.size:
            raise ValueError(f'{where}: the prediction holds label {classes + int(outside[0])}; '
                             f'expected 0..{classes - 1}')
        return counts[:classes, :classes]


def _copy(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array.copy()


def _frame_order(frame: Frame) -> tuple[bool, Any]:
    """Positions before names, each in their order."""
    return (True, natural_key(frame)) if isinstance(frame, str) else (False, frame)


def _reduce_table(ignore_index: int) -> np.ndarray:
    """Look-up table of ``reduce_zero_label``: 0 and 255 -> ``ignore_index``, else minus 1."""
    table = np.arange(LABELS, dtype=np.int64) - 1
    table[[0, LABELS - 1]] = ignore_index
    return table.astype(np.uint8)


def _size(labels: np.ndarray) -> str:
    return f'{labels.shape[1]}x{labels.shape[0]}'
