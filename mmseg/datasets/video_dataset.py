"""Clips of labelled videos.

One class holds all behaviour: it lists videos, asks the clip sampler for frames, and runs the pipeline.  A concrete
data set is data: class names, a palette, whether raw label 0 is void, and a :class:`Layout` on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from torch.utils.data import Dataset

from mmseg.registry import DATASETS, PIPELINES, retired
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import UNKNOWN, VOID, max_pixels
from mmseg.utils.names import some

from .clip_sampler import can_draw, check_clips, cut_test_clips, frames_needed, sample_training_clip
from .labels import LabelMap
from .pipelines.compose import Compose
from .pipelines.loading import LoadAnnotations, LoadImageFromFile, load_labels
from .pipelines.motion import RandomMotion
from .pipelines.transform import Results
from .split import KINDS, Layout, Split, Unlabelled

_MAX_DRAWS = 100  # clips drawn for one training item before giving up
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
        name: as in the list of the split.
        frames: names in order, without suffix.
        labelled: positions of the frames that have labels, ascending; None: all of them, as far as is known.
    """

    name: str
    frames: list[str]
    labelled: tuple[int, ...] | None = None

    def has_labels(self, position: int) -> bool:
        """Whether a frame has labels."""
        return self.labelled is None or position in self.labelled


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
    ``label`` ([T,H0,W0] uint8 labels, 254 in frames without labels; ``None`` where the split has no masks),
    ``raw_label`` (the same, or what is in the files where labels differ from it by ``reduce_zero_label`` alone: the
    official VC compares these), ``video`` and ``frames`` (names), ``labelled`` (bool a frame), and ``skipped``; if
    that is not empty the clip could not be read and ``img``, ``img_metas``, ``label`` and ``raw_label`` are ``None``.

    Args:
        data_root: folder of the data set; ``~`` is the home folder.
        split: name of the split.
        pipeline: steps (see :mod:`mmseg.datasets.pipelines`).
        dilation: ascending offsets <= 0 of a training clip's frames to its current frame; ``[0]`` for single frames.
        test_size: frames of a test clip.
        classes: class names, or a file of them: one a line, or a ``classes.json``.  A part of the class's own names, in
            any order, makes void of the others.  Default ``CLASSES`` of the class.
        palette: [R,G,B] a class; default ``PALETTE`` of the class.  With it ``classes`` are names of one's own.
        layout: a :class:`Layout`, or the entries in which it differs from that of the class as a dict.
        reduce_zero_label: raw label 0 is void and 1..K are the classes; default that of the class.
        label_map: raw label -> index or name of a class, or None for void; several may become one class.  Goes before
            ``reduce_zero_label``; a raw label that it does not name is an error, unless it has the key ``'other'``.
        other: name of a class that collects the classes which ``classes`` leaves out.
        colours: masks hold the palette's colours (and black for void, if no class has it).
        colour_map: colour (R, G, B) -> class or None, where masks have other colours than the palette.
        decoder: what takes the class out of stored values: ``'cityscapes_instances'``, ``'vipseg'``,
            ``'red_channel'``, or another of the registry ``MASK_DECODERS``.
        unlabelled: a frame without a mask is an ``'error'``, a frame without labels (``'ignore'``: clips hold it, but
            it teaches and scores nothing), or it is left out (``'skip'``).
        void: in training, pixels of void are ``'negative'``, in no mask (as in the reference), or ``'ignore'``: they
            take no part.
        as_clip: an image instead of consecutive frames, for image data sets in clip training: the current frame
            ``'repeat'``-ed, or in ``'motion'`` (:class:`~mmseg.datasets.pipelines.motion.RandomMotion`).
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
    label_map: LabelMap | None = None
    colours = False
    decoder: str | None = None
    unlabelled: Unlabelled = 'error'
    void: Literal['negative', 'ignore'] = 'negative'
    ignore_index = VOID

    def __init__(
            self, data_root: str, split: str,
            pipeline: Sequence[Annotated[Mapping, PIPELINES] | Callable[[Results], Results]],
            dilation: Sequence[int] | int | None = None, test_size: int | None = None,
            classes: Sequence[str] | str | None = None, palette: Sequence[Sequence[int]] | None = None,
            layout: Annotated[Layout | Mapping[str, Any] | None, Layout] = None,
            reduce_zero_label: bool | None = None, label_map: LabelMap | None = None, other: str | None = None,
            colours: bool | None = None, colour_map: LabelMap | None = None, decoder: str | None = None,
            unlabelled: Unlabelled | None = None, void: Literal['negative', 'ignore'] | None = None,
            as_clip: Literal['repeat', 'motion'] | None = None,
            skip_short_videos: bool = False, skip_bad_clips: bool = False):
        self.dilation, self.test_size = check_clips(dilation, test_size)
        self.pipeline = Compose(pipeline)
        steps = (step for step in self.pipeline.transforms if isinstance(step, LoadAnnotations))
        load = next(steps, LoadAnnotations())
        self.files = Split.of(
            self, data_root, split, layout, unlabelled, classes=classes, palette=palette, label_map=label_map,
            other=other, reduce_zero_label=reduce_zero_label, colours=load.colours if colours is None else colours,
            colour_map=load.colour_map if colour_map is None else colour_map, decoder=decoder)
        self.data_root, self.split, self.layout = self.files.data_root, self.files.name, self.files.layout
        self.CLASSES, self.PALETTE = self.files.classes, self.files.palette
        self.labels, self.unlabelled = self.files.labels, self.files.unlabelled
        self.reduce_zero_label = self.labels.reduce_zero_label
        self.void = void or self.void
        self.as_clip = as_clip
        self.skip_bad_clips = skip_bad_clips
        max_pixels()  # a wrong limit is found here, and not in a worker
        self._check_pipeline(load, reduce_zero_label, label_map)
        if as_clip == 'motion':
            loaded = [isinstance(step, (LoadImageFromFile, LoadAnnotations)) for step in self.pipeline.transforms]
            self.pipeline.transforms.insert(len(loaded) - loaded[::-1].index(True), RandomMotion())
        self.has_masks = any(self.files.has('masks', name) for name in self.files.videos())
        self.videos, self.short_videos = self._list_videos(skip_short_videos)
        if self.is_training and not self.has_masks:
            raise DataError(f"split '{self.split}' of {self.data_root}: no masks in any video, but training needs "
                            'them; ' + self.files.instead('masks', self.videos[0].name))
        self.clips = None if self.test_size is None else [
            Clip(index, positions)
            for index, video in enumerate(self.videos)
            for positions in cut_test_clips(len(video.frames), self.test_size)
        ]

    def _check_pipeline(self, load: LoadAnnotations, reduce: bool | None, label_map: LabelMap | None) -> None:
        own: dict[str, Any] = {'colours': self.labels.colours}
        if label_map is None:
            own['reduce_zero_label'] = type(self).reduce_zero_label if reduce is None else reduce
        for key, value in own.items():
            asked = getattr(load, key)
            if asked is not None and asked != value:
                raise ConfigError(
                    f'LoadAnnotations.{key}={asked}, but {type(self).__name__} has {key}={value}: training and '
                    'evaluation labels would differ; leave it out of LoadAnnotations, or set it on the data set')

    def _list_videos(self, skip_short: bool) -> tuple[list[Video], list[str]]:
        needed = 1 if self.dilation is None or self.as_clip else frames_needed(self.dilation)
        videos: list[Video] = []
        short: list[Video] = []
        unlabelled: list[str] = []
        missing: list[str] = []
        for name in self.files.videos():
            frames = self.files.files('frames', name)
            if frames is None:
                missing.append(name)
                continue
            video = self._video(name, frames)
            if (self.is_training and video.labelled == ()) or (frames and not video.frames):
                unlabelled.append(name)
            elif can_draw(len(video.frames), needed, video.labelled if self.is_training else None):
                videos.append(video)
            else:
                short.append(video)
        if missing:
            raise DataError(
                f"split '{self.split}' of {self.data_root}: no frames of {len(missing)} videos: {some(missing)} "
                f"({self.files.instead('frames', missing[0])}); fetch them or take them out of the split file")
        if short and not (skip_short and videos):
            lengths = [f'{video.name} ({len(video.frames)} frames'
                       + ('' if video.labelled is None else f', {len(video.labelled)} of them labelled') + ')'
                       for video in short]
            empty = next((video.name for video in short if not video.frames), None)
            raise DataError(
                f"split '{self.split}' of {self.data_root}: {len(short)} videos have fewer than the {needed} frames "
                f'that a clip needs: {some(lengths)}; '
                + (f"{self.files.instead('frames', empty)}; " if empty is not None else '')
                + ('set skip_short_videos=True to leave them out' if videos else 'no other video is left'))
        if unlabelled and not videos:
            name = next(name for name in unlabelled if self.files.has('masks', name))
            frame, mask = ((self.files.files(kind, name) or [''])[0] for kind in KINDS)
            raise DataError(
                f"split '{self.split}' of {self.data_root}: no frame of {len(unlabelled)} videos has a mask: "
                f"{some(unlabelled)}; in '{name}' the first frame is '{frame}' and the first mask '{mask}': "
                'layout.frame_pattern and mask_pattern say what belongs together')
        return videos, [*(video.name for video in short), *unlabelled]

    def _video(self, name: str, frames: list[str]) -> Video:
        """A video whose masks are looked up where frames may lack one."""
        if self.unlabelled == 'error' or not self.has_masks:
            return Video(name, frames)
        masks = set(self.files.files('masks', name) or ())
        if self.unlabelled == 'skip':
            return Video(name, [frame for frame in frames if frame in masks])
        return Video(name, frames, tuple(i for i, frame in enumerate(frames) if frame in masks))

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

    def mask_of(self, video: str, frame: str) -> str | None:
        """As :meth:`mask_path`; None for a frame without labels."""
        path = self.mask_path(video, frame)
        return path if self.unlabelled == 'error' or os.path.exists(path) else None

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
        masks = [self.mask_path(video.name, video.frames[i]) if video.has_labels(i) else None for i in clip.positions]
        return dict(
            video=video.name, frames=[self.frame_path(video.name, frame) for frame in frames], masks=masks,
            num_classes=self.num_classes, label_rule=self.labels, reduce_zero_label=self.reduce_zero_label,
            void=self.void if self.is_training else 'negative', has_masks=self.has_masks)

    def _training_item(self, index: int) -> dict[str, Any]:
        """A clip of video ``index``, or of random other videos while a clip is all void or, if so asked, bad."""
        assert self.dilation is not None
        skipped: list[str] = []
        for _ in range(_MAX_DRAWS):
            video = self.videos[index]
            offsets = (0,) if self.as_clip else self.dilation
            positions = sample_training_clip(len(video.frames), offsets, video.labelled)
            if self.as_clip:
                positions *= len({*self.dilation, 0})
            try:
                item = self.pipeline(self._results(Clip(index, positions)))
            except DataError as error:
                if not self.skip_bad_clips:
                    raise
                skipped.append(str(error))
            else:
                label = item.get('gt_semantic_seg')
                if label is None or bool((label < UNKNOWN).any()):
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
            img=None, img_metas=None, label=None, raw_label=None, video=video.name, frames=frames,
            labelled=[self.has_masks and video.has_labels(position) for position in clip.positions], skipped=[])
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
        shape = found['img_metas'][0]['ori_shape'][:2]
        labels, compared = load_labels(results['masks'], self.labels, shape, results['video'])
        return found | {'label': np.stack(labels), 'raw_label': np.stack(compared)}
