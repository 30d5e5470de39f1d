"""Where the files of a data set lie under its root, and what their paths say: the video, and the frame in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from mmseg.registry import check_arguments, config_key, config_path
from mmseg.utils.arguments import Count
from mmseg.utils.errors import ConfigError

Kind = Literal['frames', 'masks']
"""What a video has files of."""

_GLOB = re.compile(r'[*?[]')


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie under its root; ``{split}`` and ``{video}`` become names.

    Patterns are regular expressions of whole paths with ``/``.  Their group ``frame`` is the name of the frame, all
    other named groups are the name of the video, joined by ``/``; a mask belongs to the frame of the same names.

    Attributes:
        split_file: what names the videos: a text file with one a line; a ``.json`` file with a list, or a dict of
            lists by split; a glob, whose first wildcard begins the name; ``None`` for all videos that there are.
        frames: folder of a video's frames; without ``{video}``, the folder of all frames, at any depth.
        masks: folder of a video's masks, or of all masks.
        frame_suffix: what frame files end in; what is before it is the frame's name.  In a folder of all frames every
            file is a video of one frame, and what is before the suffix is the name of both.
        mask_suffix: what mask files end in.
        frame_pattern: instead of the suffix, pattern of a frame's path below its folder.
        mask_pattern: likewise, of a mask's.
        max_gap: cuts a video where the numbers of its frames, the last in their names, grow by more than this; a part
            is named ``<video>_<first frame>-<last frame>``.
        exclude: names or globs of videos, or of parts, to leave out.
    """

    split_file: str | None = '{split}.txt'
    frames: str = 'data/{video}/origin'
    masks: str = 'data/{video}/mask'
    frame_suffix: str = '.jpg'
    mask_suffix: str = '.png'
    frame_pattern: str | None = None
    mask_pattern: str | None = None
    max_gap: Count | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        where = config_path('layout')
        for key in ('frame_suffix', 'mask_suffix'):
            if '.' not in getattr(self, key):
                raise ConfigError(f"{where}.{key}: expected the end of a file name with its dot, as '.png' or "
                                  f"'_label.png', got '{getattr(self, key)}'")
        for key in ('split_file', 'frames', 'masks'):
            try:
                (getattr(self, key) or '').format(split='', video='')
            except (LookupError, ValueError, AttributeError):
                raise ConfigError(f"{where}.{key}: expected a path with {{split}} and {{video}} for names, got "
                                  f"'{getattr(self, key)}'") from None
        for kind in ('frames', 'masks'):
            self._check_pattern(kind, where)
        if self.is_tree('masks') and not self.mask_pattern and 'frame' in self.pattern('frames').groupindex:
            raise ConfigError(f"{where}.mask_pattern: masks '{self.masks}' lie in one folder, as the frames; give the "
                              'pattern of their paths, too')

    def _check_pattern(self, kind: Kind, where: str) -> None:
        key = f'{kind[:-1]}_pattern'
        try:
            groups = set(self.pattern(kind).groupindex)
        except re.error as error:
            raise ConfigError(f"{where}.{key}: '{getattr(self, key)}' is no regular expression: {error}") from None
        template = getattr(self, kind)
        if self.is_tree(kind) and groups <= {'frame'}:
            raise ConfigError(f"{where}.{key}: expected a named group for the video, as (?P<video>...), since {kind} "
                              f"'{template}' has no {{video}}, got '{getattr(self, key)}'")
        if not self.is_tree(kind) and groups != {'frame'}:
            raise ConfigError(f"{where}.{key}: expected the one named group (?P<frame>...), since the name of the "
                              f"folder '{template}' is that of the video, got '{getattr(self, key)}'")

    def changed(self, changes: Layout | Mapping[str, Any] | None) -> Layout:
        """This layout with some entries changed; another one as a whole where ``changes`` is a layout."""
        if changes is None or isinstance(changes, Layout):
            return changes or self
        with config_key('layout') as where:
            return replace(self, **check_arguments(Layout, changes, where))

    @property
    def is_glob(self) -> bool:
        """Whether ``split_file`` is a glob."""
        return self.split_file is not None and bool(_GLOB.search(self.split_file))

    def is_tree(self, kind: Kind) -> bool:
        """Whether all videos share one folder, and the paths of files in it say which is whose."""
        if '{video}' in getattr(self, kind):
            return False
        return kind == 'frames' or self.mask_pattern is not None or self.is_tree('frames')

    def suffix(self, kind: Kind) -> str:
        """What the files of ``kind`` end in, where they have no pattern."""
        return self.frame_suffix if kind == 'frames' else self.mask_suffix

    def own_pattern(self, kind: Kind) -> str | None:
        """The pattern of ``kind`` that was given."""
        return self.frame_pattern if kind == 'frames' else self.mask_pattern

    def pattern(self, kind: Kind) -> re.Pattern[str]:
        """Pattern of a path below the folder of ``kind``, with ``/`` in every system."""
        own = self.own_pattern(kind)
        if own is not None:
            return re.compile(own)
        name = '(?P<video>.+)' if self.is_tree(kind) else '(?P<frame>[^/]+)'
        no_mask = f'(?!.*{re.escape(self.mask_suffix)}$)' if kind == 'frames' and self._masks_look_like_frames else ''
        return re.compile(no_mask + name + re.escape(self.suffix(kind)), re.DOTALL)

    @property
    def _masks_look_like_frames(self) -> bool:
        longer = len(self.mask_suffix) > len(self.frame_suffix) and self.mask_suffix.endswith(self.frame_suffix)
        return longer and self.frames == self.masks

    def describe(self, kind: Kind) -> str:
        """What is looked for, for an error: ``ends in '.jpg' (layout.frame_suffix)``."""
        own = self.own_pattern(kind)
        if own is not None:
            return f"has the pattern '{own}' (layout.{kind[:-1]}_pattern)"
        return f"ends in '{self.suffix(kind)}' (layout.{kind[:-1]}_suffix)"

    def leaves_out(self, video: str) -> bool:
        """Whether ``exclude`` names a video."""
        return any(fnmatchcase(video, pattern) for pattern in self.exclude)


def before_glob(path: str) -> str:
    """The folders before the first wildcard; the whole path if it has none."""
    start, *rest = _GLOB.split(path, maxsplit=1)
    return start.rpartition('/')[0] if rest else start


def video_and_frame(path: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """What a path says by its named groups; None where the pattern is another one.

    Without a group ``frame`` the file is an image: a video of one frame, named by the last part of the video's name.
    """
    found = pattern.fullmatch(path)
    if found is None:
        return None
    groups = found.groupdict()
    frame = groups.pop('frame', None)
    video = '/'.join(value for value in groups.values() if value)
    return (video, frame or video.rpartition('/')[2]) if video else None
