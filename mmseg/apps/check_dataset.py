"""Walks a data set and lists what is wrong with it, file by file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from mmseg.datasets.clip_sampler import check_clips, frames_needed
from mmseg.datasets.split import Split
from mmseg.registry import DATASETS, find, standing_at
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import VOID, label_table, read_frame, read_mask, to_training_labels
from mmseg.utils.names import natural_key

UNREADABLE_FRAME = 'unreadable frame'
UNREADABLE_MASK = 'unreadable mask'
MISSING_MASK = 'missing mask'
MASK_WITHOUT_FRAME = 'mask without frame'
SIZE_MISMATCH = 'size mismatch'
LABEL_OUT_OF_RANGE = 'label out of range'
SHORT_VIDEO = 'short video'
MISSING_VIDEO = 'missing video'
UNREADABLE_FOLDER = 'unreadable folder'
AMBIGUOUS_ORDER = 'ambiguous order'

_WARNINGS = (AMBIGUOUS_ORDER,)


@dataclass(frozen=True)
class Problem:
    """Something wrong: its kind (a constant of this module), video, file or folder, and a sentence."""

    kind: str
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
        problems: in the order of the split, by file within a video.
        warnings: what is not wrong, but may surprise.
        pixels: [256] int64, pixels of each training label (255 void); labels out of range are not counted.
    """

    split: str
    classes: tuple[str, ...]
    videos: int = 0
    frames: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return dict(
            videos=self.videos, frames=self.frames, problems=[vars(problem) for problem in self.problems],
            warnings=[vars(problem) for problem in self.warnings],
            pixels={name: int(count) for name, count in zip(self.classes, self.pixels)}, void=int(self.pixels[VOID]))


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
        if isinstance(cfg, Mapping) and 'dataset' in cfg:
            return cls.from_config(cfg['dataset'], f'{where}.dataset')
        parts = cfg.get('datasets') if isinstance(cfg, Mapping) else cfg
        if isinstance(parts, (list, tuple)):
            inside = f'{where}.datasets' if isinstance(cfg, Mapping) else where
            return [s for i, part in enumerate(parts) for s in cls.from_config(part, f'{inside}[{i}]')]
        if not isinstance(cfg, Mapping):
            raise ConfigError(f'{where}: expected the config of a data set, got {cfg!r}')
        component: Any = find(DATASETS, cfg.get('type'), where)
        if not hasattr(component, 'layout'):
            raise ConfigError(f'{where}.type: {cfg["type"]} is no VideoDataset; its files cannot be checked')
        dilation, test_size = cfg.get('dilation'), cfg.get('test_size')
        with standing_at(where):
            if dilation is not None or test_size is not None:
                dilation, _ = check_clips(dilation, test_size)
            options = ('data_root', 'split', 'classes', 'palette', 'layout', 'reduce_zero_label')
            given: dict[str, Any] = {key: cfg.get(key) for key in options}
            files = Split.of(component, **given)
        return [cls(files, frames_needed(dilation) if dilation else 1, masks_needed=dilation is not None)]


def _check_mask(split: SplitToCheck, path: str, table: np.ndarray, size: tuple[int, int] | None) -> Any:
    """(pixels of each label or None, (kind, message) pairs) for a mask and the size of its frame."""
    problems = []
    try:
        mask = read_mask(path)
    except DataError as error:
        return None, [(UNREADABLE_MASK, str(error))]
    if size is not None and mask.shape != size:
        problems.append((
            SIZE_MISMATCH, f'{path}: mask is {mask.shape[1]}x{mask.shape[0]}, its frame {size[1]}x{size[0]}'))
    try:
        label = to_training_labels(mask, table, len(split.files.classes), path)
    except DataError as error:
        return None, [*problems, (LABEL_OUT_OF_RANGE, str(error))]
    return np.bincount(label.ravel(), minlength=256), problems


def _ambiguity(names: list[str]) -> str | None:
    """Why programs may disagree about the order of the frames ``names``, which stand in natural order."""
    for one, other in pairwise(names):
        if natural_key(one)[0] == natural_key(other)[0]:
            return f"frames '{one}' and '{other}' have the same number"
    if sorted(names) != names:
        return (f"frames '{names[0]}' to '{names[-1]}' are in natural order here (numbers as numbers), but programs "
                'that sort by letters see another order; write the numbers with leading zeros')
    return None


def _check_video(split: SplitToCheck, video: str, has_masks: bool) -> tuple[int, list[Problem], np.ndarray]:
    """Number of frames, problems, and pixels of each label of one video."""
    problems: list[Problem] = []
    pixels = np.zeros(256, np.int64)
    files = split.files
    table = label_table(files.reduce_zero_label, len(files.classes))

    def report(kind: str, path: str, message: str) -> None:
        problems.append(Problem(kind, video, path, message))

    def names_of(kind: str) -> list[str] | None:
        try:
            return files.files(kind, video)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DataError as error:
            report(UNREADABLE_FOLDER, files.folder(kind, video), str(error))
            return []

    folder = files.folder('frames', video)
    frames = names_of('frames')
    if frames is None:
        report(MISSING_VIDEO, folder, f'{folder}: no such folder')
        return 0, problems, pixels
    masks = names_of('masks') or []
    if len(frames) < split.frames_needed and not problems:
        report(SHORT_VIDEO, folder, f'{folder}: {len(frames)} frames, a clip needs {split.frames_needed}'
               + ('' if frames else f'; {files.instead("frames", video)}'))
    ambiguity = _ambiguity(frames)
    if ambiguity:
        report(AMBIGUOUS_ORDER, folder, f'{folder}: {ambiguity}')
    first: tuple[str, tuple[int, int]] | None = None
    there = set(masks)
    for name in frames:
        path = files.path('frames', video, name)
        size = None
        try:
            size = read_frame(path, turn=not has_masks).shape[:2]
        except DataError as error:
            report(UNREADABLE_FRAME, path, str(error))
        if size is not None:
            first = first or (name, size)
            if size != first[1]:
                report(SIZE_MISMATCH, path,
                       f'{path}: {size[1]}x{size[0]}, but frame {first[0]} of the video is {first[1][1]}x{first[1][0]}')
        mask_path = files.path('masks', video, name)
        if name in there:
            counts, found = _check_mask(split, mask_path, table, size)
            for kind, message in found:
                report(kind, mask_path, message)
            if counts is not None:
                pixels += counts
        elif has_masks:
            report(MISSING_MASK, mask_path, f'{mask_path}: no such file, but its frame is there')
    for name in sorted(there - set(frames), key=natural_key):
        path = files.path('masks', video, name)
        report(MASK_WITHOUT_FRAME, path, f'{path}: its frame is missing')
    return len(frames), problems, pixels


def _may_have_masks(files: Split, video: str) -> bool:
    try:
        return files.has('masks', video)
    except DataError:  # is listed when the video is checked
        return True


def check_split(
        split: SplitToCheck, workers: int = 1, on_start: Callable[[int], None] = lambda _: None,
        on_video: Callable[[], None] = lambda: None) -> Report:
    """Reads every file of a split.

    Decoding runs outside Python's lock, so threads use all cores.

    Args:
        split: what to check.
        workers: threads.
        on_start: called with the number of videos.
        on_video: called after every video.

    Returns:
        The :class:`Report`.

    Raises:
        DataError: no such root or split file, or a split that names no video.
    """
    names = split.files.videos()
    on_start(len(names))
    has_masks = split.masks_needed or any(_may_have_masks(split.files, name) for name in names)
    results: dict[str, tuple[int, list[Problem], np.ndarray]] = {}
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        jobs = {pool.submit(_check_video, split, name, has_masks): name for name in names}
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            on_video()
    finally:  # after an error or a signal no other video is read, nor is one waited for
        pool.shutdown(wait=False, cancel_futures=True)
    report = Report(split.files.name, split.files.classes, videos=len(names))
    for name in names:
        frames, problems, pixels = results[name]
        report.frames += frames
        for problem in problems:
            (report.warnings if problem.kind in _WARNINGS else report.problems).append(problem)
        report.pixels += pixels
    return report


def count_by_kind(problems: list[Problem]) -> dict[str, int]:
    """Number of problems of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())
