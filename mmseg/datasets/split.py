"""One split of a data set: where its files lie, in which order, and what the labels in them mean."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, get_args

from mmseg.registry import config_path
from mmseg.utils.arguments import annotations_of, check_value
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.names import natural_key, some

from .labels import LabelRule, describe_labels
from .layout import Kind, Layout, before_glob
from .listing import Folders, Tree
from .video_names import Part, cut_at_gaps, read_list

KINDS: tuple[Kind, ...] = get_args(Kind)
Unlabelled = Literal['error', 'ignore', 'skip']


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
            layout: Layout | Mapping[str, Any] | None = None, unlabelled: Unlabelled | None = None,
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

    @cached_property
    def _kinds(self) -> dict[Kind, Folders | Tree]:
        return {kind: (Tree if self.layout.is_tree(kind) else Folders)(self.data_root, self.name, self.layout, kind)
                for kind in KINDS}

    def folder(self, kind: Kind, video: str) -> str:
        """Folder of a video's ``'frames'`` or ``'masks'``."""
        return self._kinds[kind].folder(self._whole(video))

    def suffix(self, kind: Kind) -> str:
        """What the files of ``'frames'`` or ``'masks'`` end in."""
        return self.layout.suffix(kind)

    def path(self, kind: Kind, video: str, frame: str) -> str:
        """File of a frame, or of its mask."""
        return self._kinds[kind].path(self._whole(video), frame)

    def frame_name(self, path: str) -> str:
        """Name of the frame whose file is ``path``."""
        return self._kinds['frames'].frame_name(path)

    @property
    def file(self) -> str | None:
        """The file that names the videos; None where they are searched for."""
        listed = self.layout.split_file
        if listed is None or self.layout.is_glob:
            return None
        return os.path.join(self.data_root, listed.format(split=self.name, video=''))

    def is_there(self) -> bool:
        """Whether there is a list of this split, or the folder in which its videos are searched for."""
        if self.file is not None:
            return os.path.isfile(self.file)
        searched = (self.layout.split_file if self.layout.is_glob else None) or self.layout.frames
        folder = before_glob(searched.replace('{video}', '*')).format(split=self.name)
        return os.path.isdir(os.path.join(self.data_root, folder))

    def inputs(self, name: str = '') -> dict[str, str]:
        """What :func:`~mmseg.utils.files.refuse_overwriting` must know of the split.

        Args:
            name: of a file; with it the folders of the videos count for no more than their files of this name.
        """
        what = 'file' if name else 'folder'
        found = {} if self.file is None else {self.file: f"list of split '{self.name}'"}
        for video in self.videos():
            for kind, files in self._kinds.items():
                found.setdefault(os.path.join(self.folder(kind, video), name), f"{what} of the {kind} of '{video}'")
                if isinstance(files, Tree) and not name:  # what is written there would be taken for a part of the data
                    found.setdefault(os.path.join(files.root, video), f"folder of all {kind} with '{video}' in it")
        return {label: path for path, label in found.items()}

    def videos(self) -> list[str]:
        """Names of the videos, or of the parts into which ``max_gap`` cuts them.

        They are in the order of the list, or in natural order where they are searched for.  Blank lines, CRLF line
        ends, and a missing final newline are harmless; a repeated name counts once.

        Raises:
            DataError: the root or the list is missing or cannot be read, it names no video, or names one that does not
                lie below the root.
        """
        if not os.path.isdir(self.data_root):
            raise DataError(f'{self.data_root}: no such folder; set data_root to the data set (data/README.md shows '
                            'its layout)')
        return self._kept([name for video in self._listed for name in self._parts.get(video, [video])])

    @cached_property
    def _listed(self) -> list[str]:
        """The videos, not yet cut."""
        if self.layout.is_glob:
            names = self._globbed()
        elif self.file is not None:
            names = read_list(self.file, self.name)
        else:
            names = self._kinds['frames'].search()
            if not names:
                raise DataError(f"split '{self.name}' of {self.data_root} has no frames; "
                                + self._kinds['frames'].instead(''))
        return self._kept(list(dict.fromkeys(names)))

    def _globbed(self) -> list[str]:
        listed = self.layout.split_file or ''
        pattern = listed.format(split=glob.escape(self.name), video='')
        first = len(PurePosixPath(before_glob(listed).format(split=self.name, video='')).parts)
        paths = [PurePath(path) for path in glob.glob(pattern, root_dir=self.data_root, recursive=True)]
        found = ['/'.join([*path.parts[first:-1], self._without_suffix(path)]) for path in paths]
        if not found:
            raise DataError(f'{os.path.join(self.data_root, pattern)}: nothing has such a name (layout.split_file)')
        return sorted(found, key=natural_key)

    def _without_suffix(self, path: PurePath) -> str:
        if os.path.isdir(os.path.join(self.data_root, path)):
            return path.name
        shorter = path.name.removesuffix(self.layout.frame_suffix)
        return path.stem if shorter == path.name else shorter

    def _kept(self, names: list[str]) -> list[str]:
        kept = [name for name in names if not self.layout.leaves_out(name)]
        if not kept:
            raise DataError(f"split '{self.name}' of {self.data_root}: layout.exclude leaves out all {len(names)} "
                            f'videos: {some(names)}')
        return kept

    @cached_property
    def _parts(self) -> dict[str, dict[str, Part]]:
        """Of each video that is cut, its parts by name."""
        if self.layout.max_gap is None:
            return {}
        parts = {}
        for video in self._listed:
            runs = cut_at_gaps(self._frames_of(video), self.layout.max_gap, video)
            if len(runs) > 1:
                starts = [None, *(natural_key(run[0]) for run in runs[1:]), None]
                parts[video] = {f'{video}_{run[0]}-{run[-1]}': Part(video, *bounds)
                                for run, bounds in zip(runs, pairwise(starts))}
        return parts

    def _frames_of(self, video: str) -> list[str]:
        return sorted(self._kinds['frames'].files(video) or (), key=natural_key)

    @cached_property
    def _part(self) -> dict[str, Part]:
        found = {name: part for parts in self._parts.values() for name, part in parts.items()}
        twice = min(found.keys() & set(self._listed), default=None) if found else None
        if twice is not None:
            raise DataError(f"{self.data_root}: a part of the video '{found[twice].video}', cut at its gaps, would "
                            f"have the name of the video '{twice}'; rename or exclude one of them")
        return found

    def _whole(self, video: str) -> str:
        """The video of which this is a part, or itself."""
        part = self._part.get(video)
        return part.video if part else video

    def files(self, kind: Kind, video: str) -> list[str] | None:
        """Names in natural order, without suffix, of a video's frames or masks; None where their folder is missing.

        Raises:
            DataError: the folder cannot be read.
        """
        names = self._kinds[kind].files(self._whole(video))
        if names is None:
            return None
        part = self._part.get(video)
        return sorted((name for name in names if part is None or name in part), key=natural_key)

    def has(self, kind: Kind, video: str) -> bool:
        """Whether a video has frames, or masks."""
        return bool(self.files(kind, video))

    def instead(self, kind: Kind, video: str) -> str:
        """For an error about a video without frames or masks: what was looked for, and what there is."""
        return self._kinds[kind].instead(self._whole(video))
