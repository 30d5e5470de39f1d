"""Walks a data set and lists what is wrong with it, file by file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np

from mmseg.datasets.clip_sampler import can_draw, check_clips, frames_needed
from mmseg.datasets.labels import UnknownLabelError, describe_labels
from mmseg.datasets.layout import Kind as FileKind
from mmseg.datasets.split import Split
from mmseg.registry import DATASETS, config_key, find
from mmseg.utils.arguments import named_parameters
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import VOID, read_frame
from mmseg.utils.names import natural_key

Kind = Literal[
    'unreadable frame', 'unreadable mask', 'missing mask', 'mask without frame', 'size mismatch', 'label out of range',
    'short video', 'missing video', 'unreadable folder', 'ambiguous order', 'gaps', 'same picture']
_WARNINGS: tuple[Kind, ...] = ('ambiguous order', 'gaps', 'same picture')


_OTHER_BITS = 6  # of 64, in pictures that are the same
_OTHER_GREY = 4  # mean difference of grey values, likewise
_FLAT = 4  # standard deviation of the grey values of a picture that shows something


@dataclass(frozen=True)
class Problem:
    """Something wrong: its kind, video, file or folder, and a sentence."""

    kind: Kind
    video: str
    path: str
    message: str


@dataclass
class Report:
    """What was found in a split.

    Attributes:
        split: its name.
        classes: class names.
        videos: number of videos.
        frames: number of frame files.
        labelled: number of frames with a mask that could be read.
        problems: in the order of the split, by file within a video.
        warnings: what is not wrong, but may surprise.
        pixels: [256] int64, pixels of each label (255 void); labels out of range are not counted.
        class_videos: [256] int64, videos in which each label occurs.
        raw: pixels of each value in the files, or colour (R, G, B), and its label, where a rule maps them.
        pictures: what the frames look like, to find them in other splits.
        gaps: for each video the frames after which numbers jump.
    """

    split: str
    classes: tuple[str, ...]
    videos: int = 0
    frames: int = 0
    labelled: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    class_videos: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    raw: Counter[tuple[Any, int]] = field(default_factory=Counter)
    pictures: list[Picture] = field(default_factory=list)
    gaps: dict[str, list[str]] = field(default_factory=dict)

    def add(self, video: Report) -> None:
        """Adds what was found in one of the videos."""
        self.frames += video.frames
        self.labelled += video.labelled
        self.problems += video.problems
        self.warnings += video.warnings
        self.pixels += video.pixels
        self.class_videos += video.pixels > 0
        self.raw += video.raw
        self.pictures += video.pictures
        self.gaps |= video.gaps

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return dict(
            videos=self.videos, frames=self.frames, labelled=self.labelled,
            problems=[vars(problem) for problem in self.problems],
            warnings=[vars(problem) for problem in self.warnings],
            pixels=dict(zip(self.classes, self.pixels.tolist())), void=int(self.pixels[VOID]),
            class_videos=dict(zip(self.classes, self.class_videos.tolist())),
            raw=[dict(raw=raw, label=label, pixels=count) for (raw, label), count in sorted(self.raw.items())])


@dataclass(frozen=True)
class Picture:
    """What a frame looks like.

    Attributes:
        video: its video.
        frame: its name.
        bits: signs of the lowest 8 x 8 frequencies, a perceptual hash (Zauner, 2010) that survives other compression.
        thumbnail: 16 x 16 grey values.
    """

    video: str
    frame: str
    bits: int
    thumbnail: np.ndarray

    @classmethod
    def of(cls, video: str, frame: str, pixels: np.ndarray) -> Picture:
        """The picture ``[H,W,3]`` uint8 BGR."""
        grey = cv2.cvtColor(cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        waves = cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
        waves[0] = 0  # the mean
        bits = int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), 'big')
        return cls(video, frame, bits, cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA))

    def is_like(self, other: Picture) -> bool:
        """Whether both are the same picture, but for compression."""
        if (self.bits ^ other.bits).bit_count() > _OTHER_BITS:
            return False
        return bool(cv2.absdiff(self.thumbnail, other.thumbnail).mean() <= _OTHER_GREY)


def same_pictures(reports: Sequence[Report]) -> None:
    """Adds a warning to the later of two splits that show the same picture: it would be tested on what it learnt.

    Pictures of one grey are left out: they are alike everywhere.
    """
    earlier: dict[tuple[int, int], list[tuple[str, Picture]]] = {}  # by each quarter of the bits
    for report in reports:
        own = [picture for picture in report.pictures if picture.thumbnail.std() > _FLAT]
        found: dict[tuple[str, str, str], list[Picture]] = {}
        for picture in own:
            alike = {(split, other.video): other for key in _quarters(picture.bits)
                     for split, other in earlier.get(key, ()) if split != report.split and picture.is_like(other)}
            for split, video in alike:
                found.setdefault((split, video, picture.video), []).append(picture)
        for (split, video, own_video), pictures in found.items():
            report.warnings.append(Problem('same picture', own_video, '', (
                f"{len(pictures)} frames of '{own_video}', the first {pictures[0].frame}, show the same as frames of "
                f"'{video}' in split '{split}'")))
        for picture in own:
            for key in _quarters(picture.bits):
                earlier.setdefault(key, []).append((report.split, picture))


def _quarters(bits: int) -> list[tuple[int, int]]:
    return [(i, bits >> 16 * i & 0xFFFF) for i in range(4)]


@dataclass(frozen=True)
class SplitToCheck:
    """A split and what its videos must have.

    Attributes:
        files: where its files lie, and its classes.
        frames_needed: frames that a video must have.
        masks_needed: whether every split has masks; otherwise a split without any is fine.
    """

    files: Split
    frames_needed: int = 1
    masks_needed: bool = False

    @classmethod
    def from_config(cls, cfg: Any, where: str) -> list[SplitToCheck]:
        """The splits of a data set's config, wrappers opened.

        Raises:
            ConfigError: unknown type, a data set whose files this module does not know, or values that the data set
                would refuse.
        """
        if isinstance(cfg, (list, tuple)):
            return [split for i, part in enumerate(cfg) for split in cls.from_config(part, f'{where}[{i}]')]
        if not isinstance(cfg, Mapping):
            raise ConfigError(f'{where}: expected the config of a data set, got {cfg!r}')
        for key in ('dataset', 'datasets'):
            if key in cfg:
                return cls.from_config(cfg[key], f'{where}.{key}')
        component: Any = find(DATASETS, cfg.get('type'), where)
        if not hasattr(component, 'layout'):
            raise ConfigError(f'{where}.type: {cfg["type"]} is no VideoDataset; its files cannot be checked')
        dilation, test_size = cfg.get('dilation'), cfg.get('test_size')
        with config_key(where):
            if dilation is not None or test_size is not None:
                dilation, _ = check_clips(dilation, test_size)
            options = (named_parameters(Split.of) | named_parameters(describe_labels)) - {'component', 'where'}
            given: dict[str, Any] = {key: cfg.get(key) for key in options}
            files = Split.of(component, **given)
        needed = frames_needed(dilation) if dilation and not cfg.get('as_clip') else 1
        return [cls(files, needed, masks_needed=dilation is not None)]


def _ambiguity(names: list[str]) -> str | None:
    """Why programs may disagree about the order of the frames ``names``, which stand in natural order."""
    for one, other in pairwise(names):
        if natural_key(one)[0] == natural_key(other)[0]:
            return f"frames '{one}' and '{other}' have the same number"
    if sorted(names) != names:
        return (f"frames '{names[0]}' to '{names[-1]}' are in natural order here (numbers as numbers), but programs "
                'that sort by letters see another order; write the numbers with leading zeros')
    return None


def _gaps(frames: list[str]) -> list[str]:
    """Frames after which the numbers in the names jump by more than most do."""
    numbers = [re.findall(r'\d+', frame, re.ASCII) for frame in frames]
    if len(frames) < 3 or not all(numbers):
        return []
    steps = [int(after[-1]) - int(before[-1]) for before, after in pairwise(numbers)]
    usual = max(Counter(steps).items(), key=lambda item: item[::-1])[0]
    return [frame for frame, step in zip(frames, steps) if step > usual]


def _check_video(split: SplitToCheck, video: str, has_masks: bool) -> Report:
    files = split.files
    report = Report(files.name, files.classes)

    def note(kind: Kind, path: str, message: str) -> None:
        (report.warnings if kind in _WARNINGS else report.problems).append(Problem(kind, video, path, message))

    def names_of(kind: FileKind) -> list[str] | None:
        try:
            return files.files(kind, video)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DataError as error:
            note('unreadable folder', files.folder(kind, video), str(error))
            return []

    folder = files.folder('frames', video)
    frames = names_of('frames')
    if frames is None:
        note('missing video', folder, files.instead('frames', video))
        return report
    report.frames = len(frames)
    masks = set(names_of('masks') or ())
    orphans = sorted(masks.difference(frames), key=natural_key)
    sparse = has_masks and files.unlabelled != 'error'
    if sparse and files.unlabelled == 'skip':
        frames = [name for name in frames if name in masks]
    labelled = [i for i, name in enumerate(frames) if name in masks] if sparse and split.masks_needed else None
    left_out = sparse and not masks  # the data set passes over such a video
    if not can_draw(len(frames), split.frames_needed, labelled) and not left_out and not report.problems:
        note('short video', folder, f'{folder}: {len(frames)} frames, a clip needs {split.frames_needed}'
             + ('' if labelled is None else ' that end or begin with one that has a mask')
             + ('' if frames else f'; {files.instead("frames", video)}'))
    ambiguity = _ambiguity(frames)
    if ambiguity:
        note('ambiguous order', folder, f'{folder}: {ambiguity}')
    gaps = _gaps(frames)
    if gaps:
        report.gaps[video] = gaps
    first: tuple[str, tuple[int, int]] | None = None
    for name in frames:
        path, mask_path = files.path('frames', video, name), files.path('masks', video, name)
        size: tuple[int, int] | None = None
        try:
            frame = read_frame(path, turn=not has_masks)
            height, width = size = frame.shape[:2]
            report.pictures.append(Picture.of(video, name, frame))
        except DataError as error:
            note('unreadable frame', path, str(error))
        else:
            first = first or (name, size)
            if size != first[1]:
                note('size mismatch', path,
                     f'{path}: {width}x{height}, but frame {first[0]} of the video is {first[1][1]}x{first[1][0]}')
        if name in masks:
            _check_mask(files, mask_path, size, note, report)
        elif has_masks and not sparse:
            note('missing mask', mask_path, f'{mask_path}: no such file, but its frame is there')
    for name in orphans:
        path = files.path('masks', video, name)
        note('mask without frame', path, f'{path}: its frame is missing')
    return report


def _check_mask(
    files: Split, path: str, size: tuple[int, int] | None, note: Callable[[Kind, str, str], None], report: Report
) -> None:
    """Counts the pixels of each label; ``size`` is that of the frame, where it can be read."""
    try:
        raw = files.labels.raw(path)
        mask = files.labels.labels_of(raw, path)
        if size is not None and mask.shape != size:
            note('size mismatch', path,
                 f'{path}: mask is {mask.shape[1]}x{mask.shape[0]}, its frame {size[1]}x{size[0]}')
        report.pixels += np.bincount(mask.ravel(), minlength=256)
        report.labelled += 1
        if not files.labels.as_stored:
            report.raw += files.labels.counts(raw)
    except DataError as error:
        note('label out of range' if isinstance(error, UnknownLabelError) else 'unreadable mask', path, str(error))


def _may_have_masks(files: Split, video: str) -> bool:
    try:
        return files.has('masks', video)
    except DataError:  # is listed when the video is checked
        return True


def check_split(
        split: SplitToCheck, workers: int = 1, track: Callable[..., Iterable[Any]] = lambda jobs, _: jobs) -> Report:
    """Reads every file of a split.

    Decoding runs outside Python's lock, so threads use all cores.

    Args:
        split: what to check.
        workers: threads.
        track: shows the progress of an iteration over videos, of which it gets the number.

    Raises:
        DataError: no such root or split file, or a split that names no video.
    """
    files = split.files
    names = files.videos()
    has_masks = split.masks_needed or any(_may_have_masks(files, name) for name in names)
    report = Report(files.name, files.classes, videos=len(names))
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        jobs = [pool.submit(_check_video, split, name, has_masks) for name in names]
        for job in track(as_completed(jobs), len(jobs)):
            job.result()  # raises an error as soon as it comes
    finally:  # after an error or a signal no other video is read, nor is one waited for
        pool.shutdown(wait=False, cancel_futures=True)
    for job in jobs:
        report.add(job.result())
    if report.gaps:
        video, frames = next(iter(report.gaps.items()))
        report.warnings.append(Problem('gaps', video, files.folder('frames', video), (
            f'frame numbers jump {sum(map(len, report.gaps.values()))} times, in {len(report.gaps)} of {len(names)} '
            f"videos, first in '{video}' after {frames[0]}; layout.max_gap cuts videos there")))
    return report
