"""Clips of labelled videos.

One class holds all behaviour: it lists videos, asks the clip sampler for frames, and runs the pipeline.  A concrete
data set is data: class names, a palette, whether raw label 0 is void, and a :class:`Layout` on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch.utils.data import Dataset

from mmseg.registry import DATASETS, PIPELINES, retired
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import VOID, label_table, max_pixels, to_training_labels
from mmseg.utils.names import some

from .clip_sampler import check_clips, cut_test_clips, frames_needed, sample_training_clip
from .pipelines.compose import Compose
from .pipelines.loading import LoadAnnotations, load_labels, located
from .pipelines.transform import Results
from .split import Layout, Split

_MAX_DRAWS = 100  # clips drawn for one training item before giving up
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Video:
    """A video: its name and the names of its frames in order, without suffix."""

    name: str
    frames: list[str]


@dataclass(frozen=True)
class Clip:
    """A clip: index of its video and positions of its frames in it."""

    video: int
    positions: tuple[int, ...]


@DATASETS.register_module()
@retired(img_dir=(), ann_dir=(), test_mode=(), ignore_index=(VOID,))
class VideoDataset(Dataset):
    """Clips of the videos of one split.

    With ``dilation`` it is a training set: one item a video, a random clip of it.  With ``test_size`` it is a test set:
    one item a clip, and together they hold every frame exactly once.

    A training item is a dict with what the pipeline collects (``img`` [T,3,H,W] float32, ``gt_semantic_seg`` [T,1,H,W]
    int64, ``img_metas``) and ``skipped``, the errors of clips passed over on the way (list of str).

    A test item is a dict with ``img`` and ``img_metas`` (lists, one entry a view; each ``img`` [T,3,h,w] float32),
    ``label`` ([T,H0,W0] uint8 training labels, ``None`` where the split has no masks), ``raw_label`` (the same as it
    is in the files: the official VC compares these), ``video`` and ``frames`` (names), and ``skipped``; if that is
    not empty the clip could not be read and ``img``, ``img_metas``, ``label`` and ``raw_label`` are ``None``.

    Args:
        data_root: folder of the data set; ``~`` is the home folder.
        split: name of the split.
        pipeline: steps (see :mod:`mmseg.datasets.pipelines`).
        dilation: ascending offsets <= 0 of a training clip's frames to its current frame; ``[0]`` for single frames.
        test_size: frames of a test clip.
        classes: class names; default ``CLASSES`` of the class.
        palette: [R,G,B] a class; default ``PALETTE`` of the class.
        layout: a :class:`Layout`, or the entries in which it differs from that of the class as a dict.
        reduce_zero_label: raw label 0 is void and 1..K are the classes; default that of the class.
        skip_short_videos: leave out videos that are too short for a clip, instead of raising an error.
        skip_bad_clips: pass over clips with unreadable or inconsistent files, and list them in ``skipped``.

    Attributes:
        files: the :class:`~mmseg.datasets.split.Split`.
        videos: list of :class:`Video`.
        clips: list of :class:`Clip` of a test set; ``None`` for a training set.
        short_videos: names of the videos that were left out.
        has_masks: whether the split has masks.

    Raises:
        ConfigError: arguments that do not go together.
        DataError: missing folders or files, an empty split, videos too short for a clip, a training split without
            masks.
    """

    CLASSES: tuple[str, ...] = ()
    PALETTE: Sequence[Sequence[int]] = ()
    layout = Layout()
    reduce_zero_label = False
    ignore_index = VOID

    def __init__(
            self, data_root: str, split: str,
            pipeline: Sequence[Annotated[Mapping, PIPELINES] | Callable[[Results], Results]],
            dilation: Sequence[int] | int | None = None, test_size: int | None = None,
            classes: Sequence[str] | None = None, palette: Sequence[Sequence[int]] | None = None,
            layout: Annotated[Layout | Mapping[str, Any] | None, Layout] = None,
            reduce_zero_label: bool | None = None,
            skip_short_videos: bool = False, skip_bad_clips: bool = False):
        self.dilation, self.test_size = check_clips(dilation, test_size)
        self.files = Split.of(self, data_root, split, classes, palette, layout, reduce_zero_label)
        self.data_root, self.split, self.layout = self.files.data_root, self.files.name, self.files.layout
        self.CLASSES, self.PALETTE = self.files.classes, self.files.palette
        self.reduce_zero_label = self.files.reduce_zero_label
        self.skip_bad_clips = skip_bad_clips
        max_pixels()  # a wrong limit is found here, and not in a worker
        self.pipeline = Compose(pipeline)
        self._check_pipeline()
        self.videos, self.short_videos = self._list_videos(skip_short_videos)
        self.has_masks = any(self.files.has('masks', video.name) for video in self.videos)
        if self.is_training and not self.has_masks:
            raise DataError(f"split '{self.split}' of {self.data_root}: no masks in any video, but training needs "
                            'them; ' + self.files.instead('masks', self.videos[0].name))
        self.clips = None if self.test_size is None else [
            Clip(index, positions)
            for index, video in enumerate(self.videos)
            for positions in cut_test_clips(len(video.frames), self.test_size)
        ]

    def _check_pipeline(self) -> None:
        for step in self.pipeline.transforms:
            reduce = getattr(step, 'reduce_zero_label', None) if isinstance(step, LoadAnnotations) else None
            if reduce is not None and reduce != self.reduce_zero_label:
                raise ConfigError(
                    f'LoadAnnotations.reduce_zero_label={reduce}, but {type(self).__name__} has '
                    f'reduce_zero_label={self.reduce_zero_label}: training and '
                    'evaluation labels would differ; leave it out of LoadAnnotations, or set it on the data set')

    def _list_videos(self, skip_short: bool) -> tuple[list[Video], list[str]]:
        needed = 1 if self.dilation is None else frames_needed(self.dilation)
        videos: list[Video] = []
        short: list[Video] = []
        missing: list[str] = []
        for name in self.files.videos():
            frames = self.files.files('frames', name)
            if frames is None:
                missing.append(name)
                continue
            video = Video(name, frames)
            (videos if len(video.frames) >= needed else short).append(video)
        if missing:
            raise DataError(
                f"split '{self.split}' of {self.data_root}: no frames of {len(missing)} videos: {some(missing)} "
                f"({self.files.instead('frames', missing[0])}); fetch them or take them out of the split file")
        if short and not (skip_short and videos):
            lengths = [f'{video.name} ({len(video.frames)} frames)' for video in short]
            empty = next((video.name for video in short if not video.frames), None)
            raise DataError(
                f"split '{self.split}' of {self.data_root}: {len(short)} videos have fewer than the {needed} frames "
                f'that a clip needs: {some(lengths)}; '
                + (f"{self.files.instead('frames', empty)}; " if empty is not None else '')
                + ('set skip_short_videos=True to leave them out' if videos else 'no other video is left'))
        return videos, [video.name for video in short]

    @property
    def is_training(self) -> bool:
        """Whether items are random training clips."""
        return self.dilation is not None

    @property
    def num_classes(self) -> int:
        """Number of classes, void apart."""
        return len(self.CLASSES)

    def frame_path(self, video: str, frame: str) -> str:
        """File of a frame."""
        return self.files.path('frames', video, frame)

    def mask_path(self, video: str, frame: str) -> str:
        """File of a frame's mask."""
        return self.files.path('masks', video, frame)

    def frame_name(self, path: str) -> str:
        """Name of the frame whose file is ``path``."""
        return self.files.frame_name(path)

    def __len__(self) -> int:
        return len(self.videos) if self.clips is None else len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.clips is None:
            return self._training_item(index)
        return self._test_item(self.clips[index])

    def _results(self, clip: Clip) -> Results:
        """What the pipeline starts from."""
        video = self.videos[clip.video]
        frames = [video.frames[position] for position in clip.positions]
        return dict(
            video=video.name, frames=[self.frame_path(video.name, frame) for frame in frames],
            masks=[self.mask_path(video.name, frame) for frame in frames], num_classes=self.num_classes,
            reduce_zero_label=self.reduce_zero_label, has_masks=self.has_masks)

    def _training_item(self, index: int) -> dict[str, Any]:
        """A clip of video ``index``, or of random other videos while a clip is all void or, if so asked, bad."""
        assert self.dilation is not None
        skipped: list[str] = []
        for _ in range(_MAX_DRAWS):
            positions = sample_training_clip(len(self.videos[index].frames), self.dilation)
            try:
                item = self.pipeline(self._results(Clip(index, positions)))
            except DataError as error:
                if not self.skip_bad_clips:
                    raise
                skipped.append(str(error))
            else:
                label = item.get('gt_semantic_seg')
                if label is None or bool((label != VOID).any()):
                    return {**item, 'skipped': skipped}
            index = np.random.randint(len(self.videos))
        raise DataError(
            f"split '{self.split}' of {self.data_root}: none of {_MAX_DRAWS} clips drawn could be used: "
            f'{len(skipped)} could not be read and {_MAX_DRAWS - len(skipped)} hold void labels only; '
            'tools/check_dataset.py lists what is wrong' + (f'; the last error was: {skipped[-1]}' if skipped else ''))

    def _test_item(self, clip: Clip) -> dict[str, Any]:
        video = self.videos[clip.video]
        frames = [video.frames[position] for position in clip.positions]
        item: dict[str, Any] = dict(
            img=None, img_metas=None, label=None, raw_label=None, video=video.name, frames=frames, skipped=[])
        try:
            return item | self._views_and_labels(self._results(clip))
        except DataError as error:
            if not self.skip_bad_clips:
                raise
            return item | {'skipped': [str(error)]}

    def _views_and_labels(self, results: Results) -> dict[str, Any]:
        views = self.pipeline(results)
        found = {key: views[key] if isinstance(views['img'], list) else [views[key]] for key in ('img', 'img_metas')}
        if not self.has_masks:
            return found
        video, paths = results['video'], results['masks']
        raw = load_labels(paths, False, None, found['img_metas'][0]['ori_shape'][:2], video)
        table = label_table(self.reduce_zero_label, self.num_classes)
        labels = []
        for mask, path in zip(raw, paths):
            with located(video, Path(path).stem):
                labels.append(to_training_labels(mask, table, self.num_classes, path))
        return found | {'raw_label': np.stack(raw), 'label': np.stack(labels)}
