"""Which frames or masks there are on disk: each folder is read once, however many videos share it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property

from mmseg.utils.errors import DataError
from mmseg.utils.names import natural_key, some

from .layout import Kind, Layout, video_and_frame

_SUFFIXES_SHOWN = 5
_PATHS_SHOWN = 3


class Folders:
    """Files of which each video has a folder.

    Args:
        data_root: folder of the data set.
        split: its name.
        layout: where files lie.
        kind: of the files.
    """

    def __init__(self, data_root: str, split: str, layout: Layout, kind: Kind) -> None:
        self.data_root, self.split, self.layout, self.kind = data_root, split, layout, kind
        self._pattern = layout.pattern(kind)
        self._keep = layout.max_gap is not None or layout.own_pattern(kind) is not None
        self._read: dict[str, dict[str, str]] = {}  # frame -> file's name, by video

    def folder(self, video: str) -> str:
        """Folder of a video."""
        return os.path.join(self.data_root, getattr(self.layout, self.kind).format(video=video, split=self.split))

    def files(self, video: str) -> Mapping[str, str] | None:
        """File of each frame below :meth:`folder`; None where that is missing."""
        if video in self._read:
            return self._read[video]
        names = visible(self.folder(video))
        if names is None:
            return None
        frames = self._frames(names, self.folder(video))
        if self._keep:  # otherwise a video is asked for once, and the name of a frame says that of its file
            self._read[video] = frames
        return frames

    def _frames(self, names: list[str], folder: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:
            match = self._pattern.fullmatch(name)
            if match is not None:
                _add(found, match['frame'], name, folder)
        return found

    def path(self, video: str, frame: str) -> str:
        """File of a frame."""
        name = frame + self.layout.suffix(self.kind)
        if self.layout.own_pattern(self.kind) is not None:
            name = (self.files(video) or {}).get(frame, name)
        return os.path.join(self.folder(video), name)

    def frame_name(self, path: str) -> str:
        """Name of the frame of a file."""
        found = self._pattern.fullmatch(os.path.basename(path))
        return found['frame'] if found else os.path.basename(path)

    def search(self) -> list[str]:
        """Names of all videos that have such files."""
        start, *rest = getattr(self.layout, self.kind).format(video='\0', split=self.split).split('\0')
        root, _, start = start.rpartition('/')
        inside = re.compile(re.escape(start) + '(?P<video>.+)' + '(?P=video)'.join(map(re.escape, rest)), re.DOTALL)
        found = []
        for folder, names in walk(os.path.join(self.data_root, root)):
            match = inside.fullmatch(folder)
            frames = self._frames(names, folder) if match else {}
            if match and frames:
                self._read[match['video']] = frames
                found.append(match['video'])
        return sorted(found, key=natural_key)

    def instead(self, video: str) -> str:
        """For an error about a folder without files: what was looked for there, and what there is."""
        folder = self.folder(video)
        names = visible(folder)
        if names is None:
            return f'{folder}: no such folder'
        return f'{folder}: no file {self.layout.describe(self.kind)}, {_suffixes(names)}'


class Tree:
    """Files of all videos in one folder, at any depth; the arguments are those of :class:`Folders`."""

    def __init__(self, data_root: str, split: str, layout: Layout, kind: Kind) -> None:
        self.root = os.path.normpath(os.path.join(data_root, getattr(layout, kind).format(video='', split=split)))
        self.layout, self.kind = layout, kind
        self._pattern = layout.pattern(kind)

    @cached_property
    def index(self) -> dict[str, dict[str, str]]:
        """Path below the root, by video and frame."""
        index: dict[str, dict[str, str]] = {}
        for folder, names in walk(self.root):
            for name in names:
                path = f'{folder}/{name}' if folder else name
                found = video_and_frame(path, self._pattern)
                if found is not None:
                    _add(index.setdefault(found[0], {}), found[1], path, self.root)
        return index

    def folder(self, video: str) -> str:
        """Folder that holds the files of a video; that of all files where it has none."""
        paths = self.index.get(video, {}).values()
        folders = {os.path.dirname(path) for path in paths}
        return os.path.join(self.root, os.path.commonpath(folders)) if folders else self.root

    def files(self, video: str) -> Mapping[str, str] | None:
        """Path of each frame below the root; None where there is no such video."""
        return self.index.get(video)

    def path(self, video: str, frame: str) -> str:
        """File of a frame; if there is none, a path at which there is nothing."""
        path = self.index.get(video, {}).get(frame)
        return os.path.join(self.root, path or f'{video}/{frame}{self.layout.suffix(self.kind)}')

    def frame_name(self, path: str) -> str:
        """Name of the frame of a file."""
        found = video_and_frame(os.path.relpath(path, self.root).replace(os.sep, '/'), self._pattern)
        return found[1] if found else os.path.basename(path)

    def search(self) -> list[str]:
        """Names of all videos that have such files."""
        return sorted(self.index, key=natural_key)

    def instead(self, video: str) -> str:
        """For an error about a video without files: what was looked for, and what there is."""
        if not os.path.isdir(self.root):
            return f'{self.root}: no such folder'
        wanted = self.layout.describe(self.kind)
        if self.index:
            return (f"{self.root}: no path that {wanted} is of the video '{video}'; there are files of "
                    f'{some(self.search(), _PATHS_SHOWN)}')
        paths = [f'{folder}/{name}' if folder else name for folder, names in walk(self.root) for name in names]
        there = f'there are {some(paths, _PATHS_SHOWN)}' if paths else 'it is empty'
        return f'{self.root}: no path {wanted}, {there}'


def _add(found: dict[str, str], frame: str, path: str, folder: str) -> None:
    if frame in found:
        raise DataError(f"{folder}: '{found[frame]}' and '{path}' would both be frame '{frame}' of one video; their "
                        'pattern must tell them apart')
    found[frame] = path


def _suffixes(names: list[str]) -> str:
    counts = Counter(os.path.splitext(name)[1] or 'names without a suffix' for name in names)
    there = ', '.join(f'{suffix} ({count})' for suffix, count in counts.most_common(_SUFFIXES_SHOWN))
    return f'there are {there}' if there else 'it is empty'


def visible(folder: str) -> list[str] | None:
    """Names in a folder, if it is there; hidden files are of other programs (``._1.png`` beside each file of macOS).

    Raises:
        DataError: it cannot be read.
    """
    try:
        return [name for name in os.listdir(folder) if not name.startswith('.')]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f'{folder}: cannot be read: {error.strerror}') from None


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder below ``root``, by its path from there with ``/``, and the names of the files in it.

    Links are followed, but no folder is read twice.

    Raises:
        DataError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = ['']
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(path) as found:
                entries = [entry for entry in found if not entry.name.startswith('.')]
            folders = {entry.name for entry in entries if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f'{path}: cannot be read: {error.strerror}') from None
        waiting += [f'{folder}/{name}' if folder else name for name in sorted(folders, reverse=True)]
        yield folder, sorted(entry.name for entry in entries if entry.name not in folders)
