"""One split of a data set: where its files lie, in which order, and what the labels in them mean."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmseg.registry import check_arguments, config_key, config_path
from mmseg.utils.arguments import annotations_of, check_value
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import decoded
from mmseg.utils.images import read_file
from mmseg.utils.names import natural_key

from .labels import LabelRule, describe_labels

_SUFFIXES_SHOWN = 5

Unlabelled = Literal['error', 'ignore', 'skip']


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie under its root; ``{split}`` and ``{video}`` become names.

    Attributes:
        split_file: text file with one video a line.
        frames: folder of a video's frames.
        masks: folder of a video's masks, whose file names are those of the frames but for the suffix.
        frame_suffix: what frame files end in.
        mask_suffix: what mask files end in.
    """

    split_file: str = '{split}.txt'
    frames: str = 'data/{video}/origin'
    masks: str = 'data/{video}/mask'
    frame_suffix: str = '.jpg'
    mask_suffix: str = '.png'

    def __post_init__(self) -> None:
        where = config_path('layout')
        for key in ('frame_suffix', 'mask_suffix'):
            if '.' not in getattr(self, key):
                raise ConfigError(f"{where}.{key}: expected the end of a file name with its dot, as '.png' or "
                                  f"'_label.png', got '{getattr(self, key)}'")
        for key in ('split_file', 'frames', 'masks'):
            try:
                getattr(self, key).format(split='', video='')
            except (LookupError, ValueError, AttributeError):
                raise ConfigError(f"{where}.{key}: expected a path with {{split}} and {{video}} for names, got "
                                  f"'{getattr(self, key)}'") from None

    def changed(self, changes: Layout | Mapping[str, str] | None) -> Layout:
        """This layout with some entries changed; another one as a whole where ``changes`` is a layout."""
        if changes is None or isinstance(changes, Layout):
            return changes or self
        with config_key('layout') as where:
            return replace(self, **check_arguments(Layout, changes, where))


@dataclass(frozen=True)
class Split:
    """What a data set's class and config say of one split.

    Attributes:
        data_root: folder of the data set.
        name: of the split.
        layout: where files lie.
        classes: class names.
        palette: [R,G,B] a class.
        labels: what the values in mask files mean.
        unlabelled: what a frame without a mask is, where others have one: an error; a frame without labels, to
            ``'ignore'`` where labels are wanted; or a frame to ``'skip'`` as if it were not there.
    """

    data_root: str
    name: str
    layout: Layout
    classes: tuple[str, ...]
    palette: Sequence[Sequence[int]]
    labels: LabelRule
    unlabelled: Unlabelled = 'error'

    @classmethod
    def of(
            cls, component: Any, data_root: str | Path, split: str,
            layout: Layout | Mapping[str, str] | None = None, unlabelled: Unlabelled | None = None,
            **labels: Any) -> Split:
        """The split that a config describes; what it leaves out is that of ``component``, a class of data sets.

        Args:
            component: the class, or one of its objects.
            data_root: folder of the data set.
            split: name of the split.
            layout: where files lie, as far as it differs.
            unlabelled: what a frame without a mask is.
            **labels: see :func:`~mmseg.datasets.labels.describe_labels`.

        Raises:
            ConfigError: naming the key.
        """
        where = config_path(getattr(component, '__name__', type(component).__name__))
        if not data_root:
            raise ConfigError(f'{where}.data_root: expected the folder of the data set, got {data_root!r}')
        if not split:
            raise ConfigError(f"{where}.split: expected the name of a split, as 'train', got {split!r}")
        given = dict(data_root=data_root, split=split, layout=layout, unlabelled=unlabelled, **labels)
        annotations = annotations_of(cls.of) | annotations_of(describe_labels)
        for key, value in given.items():
            check_value(value, annotations[key], f'{where}.{key}')
        return cls(
            os.path.expanduser(data_root), split.removesuffix('.txt'), component.layout.changed(layout),
            *describe_labels(component, where, **labels), unlabelled or component.unlabelled)

    def folder(self, kind: str, video: str) -> str:
        """Folder of a video's ``'frames'`` or ``'masks'``."""
        return os.path.join(self.data_root, getattr(self.layout, kind).format(video=video, split=self.name))

    def suffix(self, kind: str) -> str:
        """What the files of ``'frames'`` or ``'masks'`` end in."""
        return self.layout.frame_suffix if kind == 'frames' else self.layout.mask_suffix

    def path(self, kind: str, video: str, frame: str) -> str:
        """File of a frame, or of its mask."""
        return os.path.join(self.folder(kind, video), frame + self.suffix(kind))

    @property
    def file(self) -> str:
        """The text file that names the videos."""
        return os.path.join(self.data_root, self.layout.split_file.format(split=self.name, video=''))

    def inputs(self, name: str = '') -> dict[str, str]:
        """What :func:`~mmseg.utils.files.refuse_overwriting` must know of the split.

        Args:
            name: of a file; with it the folders of the videos count for no more than their files of this name.
        """
        what = 'file' if name else 'folder'
        return {f"list of split '{self.name}'": self.file} | {
            f"{what} of the {kind} of '{video}'": os.path.join(self.folder(kind, video), name)
            for video in self.videos() for kind in ('frames', 'masks')}

    def videos(self) -> list[str]:
        """Names of the videos, in the order of the split file.

        Blank lines, CRLF line ends, and a missing final newline are harmless; a repeated name counts once.

        Raises:
            DataError: the root or the file is missing or cannot be read, it names no video, or names one that does not
                lie below the root.
        """
        root = Path(self.data_root)
        if not os.path.isdir(root):
            raise DataError(f'{root}: no such folder; set data_root to the data set (data/README.md shows its layout)')
        if not os.path.isfile(self.file):
            there = sorted(p.name for p in root.glob('*.txt'))
            raise DataError(f'{self.file}: no such split file; there are {there}')
        lines = enumerate(decoded(read_file(self.file), self.file).splitlines(), 1)
        named = [_video_name(line.strip(), f'{self.file}, line {number}') for number, line in lines if line.strip()]
        names = list(dict.fromkeys(named))
        if not names:
            raise DataError(f'{self.file}: the split names no video; write one video a line')
        return names

    def files(self, kind: str, video: str) -> list[str] | None:
        """Names in natural order, without suffix, of a video's frames or masks; None where their folder is missing.

        Raises:
            DataError: the folder cannot be read.
        """
        suffix = self.suffix(kind)
        names = _visible(self.folder(kind, video))
        return names and sorted((name[:-len(suffix)] for name in names if name.endswith(suffix)), key=natural_key)

    def has(self, kind: str, video: str) -> bool:
        """Whether a video has frames, or masks."""
        return bool(self.files(kind, video))

    def instead(self, kind: str, video: str) -> str:
        """For an error about a folder without frames or masks: what was looked for there, and what there is."""
        folder = self.folder(kind, video)
        names = _visible(folder)
        if names is None:
            return f'{folder}: no such folder'
        counts = Counter(os.path.splitext(name)[1] or 'names without a suffix' for name in names)
        there = ', '.join(f'{suffix} ({count})' for suffix, count in counts.most_common(_SUFFIXES_SHOWN))
        option = 'frame_suffix' if kind == 'frames' else 'mask_suffix'
        return (f"{folder}: no file ends in '{self.suffix(kind)}' (layout.{option}), "
                + (f'there are {there}' if there else 'it is empty'))


def _visible(folder: str) -> list[str] | None:
    """Names in a folder, if it is there; hidden files are of other programs (``._1.png`` beside each file of macOS)."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith('.')]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f'{folder}: cannot be read: {error.strerror}') from None


def _video_name(name: str, where: str) -> str:
    """A name without needless slashes; results are written to folders of that name, so it must not lead elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts or not path.parts:
        raise DataError(f"{where}: the video name '{name}' leads out of the data set; write the name of a folder in "
                        "it, as 'video' or 'city/video'")
    return str(path)
