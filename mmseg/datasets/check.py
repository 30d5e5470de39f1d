"""Walks a data set and lists what is wrong with it, file by file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmseg.registry import DATASETS, check_arguments, find
from mmseg.utils.errors import ConfigError, DataError

from .clip_sampler import frames_needed
from .pipelines.loading import VOID, label_table, read_frame, read_mask, to_training_labels
from .video_dataset import Layout, has_files, list_files, read_split

UNREADABLE_FRAME = 'unreadable frame'
UNREADABLE_MASK = 'unreadable mask'
MISSING_MASK = 'missing mask'
MASK_WITHOUT_FRAME = 'mask without frame'
SIZE_MISMATCH = 'size mismatch'
LABEL_OUT_OF_RANGE = 'label out of range'
SHORT_VIDEO = 'short video'
MISSING_VIDEO = 'missing video'


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
        pixels: [256] int64, pixels of each training label (255 void); labels out of range are not counted.
    """

    split: str
    classes: tuple[str, ...]
    videos: int = 0
    frames: int = 0
    problems: list[Problem] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return dict(
            videos=self.videos, frames=self.frames, problems=[vars(problem) for problem in self.problems],
            pixels={name: int(count) for name, count in zip(self.classes, self.pixels)}, void=int(self.pixels[VOID]))


@dataclass(frozen=True)
class SplitToCheck:
    """A split and what is known of it.

    Attributes:
        data_root: folder of the data set.
        split: name of the split.
        classes: class names.
        layout: where files lie.
        reduce_zero_label: raw label 0 is void and 1..K are the classes.
        frames_needed: frames that a video must have.
        masks_needed: whether every split has masks; otherwise a split without any is fine.
    """

    data_root: str
    split: str
    classes: tuple[str, ...]
    layout: Layout
    reduce_zero_label: bool
    frames_needed: int = 1
    masks_needed: bool = False

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], where: str) -> list[SplitToCheck]:
        """The splits of a data set's config, wrappers opened.

        Raises:
            ConfigError: unknown type, or a data set whose files this module does not know.
        """
        if 'dataset' in cfg:
            return cls.from_config(cfg['dataset'], f'{where}.dataset')
        if 'datasets' in cfg:
            parts = enumerate(cfg['datasets'])
            return [s for i, part in parts for s in cls.from_config(part, f'{where}.datasets[{i}]')]
        component: Any = find(DATASETS, cfg.get('type'), where)
        if not hasattr(component, 'layout'):
            raise ConfigError(f'{where}.type: {cfg["type"]} is no VideoDataset; its files cannot be checked')
        layout = cfg.get('layout', component.layout)
        if isinstance(layout, Mapping):
            layout = Layout(**check_arguments(Layout, layout, f'{where}.layout'))
        dilation = cfg.get('dilation')
        if isinstance(dilation, int):
            dilation = [dilation]
        return [cls(
            str(cfg['data_root']), cfg['split'], tuple(cfg.get('classes') or component.CLASSES), layout,
            cfg.get('reduce_zero_label', component.reduce_zero_label),
            frames_needed=frames_needed(dilation) if dilation else 1, masks_needed=dilation is not None)]

    def folder(self, kind: str, video: str) -> str:
        """Folder of a video's ``'frames'`` or ``'masks'``."""
        return os.path.join(self.data_root, getattr(self.layout, kind).format(video=video, split=self.split))


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
        label = to_training_labels(mask, table, len(split.classes), path)
    except DataError as error:
        return None, [*problems, (LABEL_OUT_OF_RANGE, str(error))]
    return np.bincount(label.ravel(), minlength=256), problems


def _check_video(split: SplitToCheck, video: str, has_masks: bool) -> tuple[int, list[Problem], np.ndarray]:
    """Number of frames, problems, and pixels of each label of one video."""
    problems: list[Problem] = []
    pixels = np.zeros(256, np.int64)
    table = label_table(split.reduce_zero_label, len(split.classes))
    folders = {kind: split.folder(kind, video) for kind in ('frames', 'masks')}

    def report(kind: str, path: str, message: str) -> None:
        problems.append(Problem(kind, video, path, message))

    if not os.path.isdir(folders['frames']):
        report(MISSING_VIDEO, folders['frames'], f'{folders["frames"]}: no such folder')
        return 0, problems, pixels
    frames = list_files(folders['frames'], split.layout.frame_suffix)
    masks = list_files(folders['masks'], split.layout.mask_suffix) if os.path.isdir(folders['masks']) else []
    if len(frames) < split.frames_needed:
        report(SHORT_VIDEO, folders['frames'],
               f'{folders["frames"]}: {len(frames)} frames, a clip needs {split.frames_needed}')
    first: tuple[str, tuple[int, int]] | None = None
    there = set(masks)
    for name in frames:
        path = os.path.join(folders['frames'], name + split.layout.frame_suffix)
        size = None
        try:
            size = read_frame(path).shape[:2]
        except DataError as error:
            report(UNREADABLE_FRAME, path, str(error))
        if size is not None:
            first = first or (name, size)
            if size != first[1]:
                report(SIZE_MISMATCH, path,
                       f'{path}: {size[1]}x{size[0]}, but frame {first[0]} of the video is {first[1][1]}x{first[1][0]}')
        mask_path = os.path.join(folders['masks'], name + split.layout.mask_suffix)
        if name in there:
            counts, found = _check_mask(split, mask_path, table, size)
            for kind, message in found:
                report(kind, mask_path, message)
            if counts is not None:
                pixels += counts
        elif has_masks:
            report(MISSING_MASK, mask_path, f'{mask_path}: no such file, but its frame is there')
    for name in sorted(there - set(frames)):
        path = os.path.join(folders['masks'], name + split.layout.mask_suffix)
        report(MASK_WITHOUT_FRAME, path, f'{path}: its frame is missing')
    return len(frames), problems, pixels


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
    names = read_split(split.data_root, split.layout, split.split)
    on_start(len(names))
    has_masks = split.masks_needed or any(
        has_files(split.folder('masks', name), split.layout.mask_suffix) for name in names)
    results: dict[str, tuple[int, list[Problem], np.ndarray]] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = {pool.submit(_check_video, split, name, has_masks): name for name in names}
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            on_video()
    report = Report(split.split, split.classes, videos=len(names))
    for name in names:
        frames, problems, pixels = results[name]
        report.frames += frames
        report.problems += problems
        report.pixels += pixels
    return report


def count_by_kind(problems: list[Problem]) -> dict[str, int]:
    """Number of problems of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())
