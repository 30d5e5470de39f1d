"""Writes pictures and their annotations as a data set in VSPW's layout."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from mmseg.apps.annotations.records import Annotation, Faults, Picture, Reader, load_json
from mmseg.datasets.labels import MAX_CLASSES, voc_colours
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting, umask, write_atomically, write_json
from mmseg.utils.images import VOID, read_frame
from mmseg.utils.names import natural_key, some
from mmseg.utils.visual import write_label_png, write_picture

_NUMBERED = re.compile(r'(?P<video>.*?)[-_. ]*(?P<frame>\d+)')
Track = Callable[[Sequence[Picture]], Iterable[Picture]]


@dataclass
class ImportReport:
    """What became of everything.

    Attributes:
        classes: names of the labels 0, 1, 2, ...
        frames: number of frames by video.
        splits: videos of each split.
        annotations: how many were drawn, and why others were not.
        pixels: of each class, and of void.
        faults: entries that were left out.
        notes: what may surprise.
    """

    classes: list[str]
    frames: Counter[str] = field(default_factory=Counter)
    splits: dict[str, list[str]] = field(default_factory=dict)
    annotations: Counter[str] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_annotations(
    reader: Reader, source: Path, out: Path, images: Path | None = None, *, video_of: str | None = None,
    split: str | None = None, seed: int = 0, background: str | None = None, copy: bool = False,
    keep_going: bool = False, track: Track = lambda pictures: pictures,
) -> ImportReport:
    """Reads annotations and writes the set; ``out`` is whole, or not there.

    Args:
        reader: of the format.
        source: file or folder with annotations.
        out: folder to make.
        images: folder of the images, where it is another than the format expects.
        video_of: regular expression with a group ``video``, and maybe ``frame``, that is searched for in an image's
            name.  By default a folder is a video, and so are images whose names differ in the number at their end.
        split: ``'train=0.8,val=0.2'``, or a JSON file with lists of videos; None: the format's own, or all ``train``.
        seed: of the draw of videos.
        background: class of all pixels without annotation; None makes them void.
        copy: copy images instead of linking them.
        keep_going: leave out what is wrong, instead of ending at the first.
        track: shows the progress.

    Raises:
        ConfigError: ``out`` holds something or lies in the source; an option that makes no sense.
        DataError: something is wrong with the input (without ``keep_going``), or nothing is left of it.
    """
    _check_place(out, {'source': source, 'folder of images': images})
    faults = Faults(keep_going)
    read = reader(source, images, faults)
    classes = list(read.classes)
    if background is not None and background not in classes:
        classes.insert(0, background)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise DataError(f'{source}: names {len(classes)} classes; 8-bit masks hold 1 to {MAX_CLASSES}')
    report = ImportReport(classes, annotations=Counter(f'ignored: {kind}' for kind in read.ignored.elements()))
    places = _places(list(read.pictures), video_of, faults)
    if not places:
        raise DataError(f'{source}: no image is left to write' + ''.join(f'\n  {fault}' for fault in faults.found[:10]))
    suffix = _common_suffix([picture for picture, *_ in places], report)
    with _whole_folder(out) as folder:
        painter = _Painter(report, faults, None if background is None else classes.index(background))
        of_picture = {id(picture): place for picture, *place in places}
        for picture in track([picture for picture, *_ in places]):
            video, frame = of_picture[id(picture)]
            image = folder / 'data' / video / 'origin' / f'{frame}{suffix}'
            _put(picture.image, image, copy)
            try:
                labels = painter.labels(picture, read_frame(str(image), turn=False).shape[:2])
            except DataError as error:
                faults.add(f'{picture.name}: {error}')
                image.unlink()
                continue
            write_label_png(folder / 'data' / video / 'mask' / f'{frame}.png', labels, voc_colours(len(classes)))
            report.frames[video] += 1
        if not report.frames:
            raise DataError(f'{source}: no image is left to write: {faults.found[0]}')
        written = [(picture, video) for picture, video, _ in places if report.frames[video]]
        report.splits = _splits(written, split, seed)
        _finish(folder, report)
    report.faults = faults.found
    return report


def import_video(
    source: Path, out: Path, every: int = 1, track: Callable[[Iterable[int]], Iterable[int]] = lambda n: n
) -> ImportReport:
    """Writes every ``every``-th frame of a video file as a set without masks, for those who will label it.

    Raises:
        ConfigError: ``every`` is no whole number from 1 on; see also :func:`import_annotations`.
        DataError: the video cannot be read.
    """
    from mmseg.apps.video_io import open_source

    if every < 1:
        raise ConfigError(f'--every: expected a whole number >= 1, got {every}')
    _check_place(out, {'video': source})
    report = ImportReport([])
    video = source.stem
    with _whole_folder(out) as folder:
        frames = iter(open_source(source))
        for number in track(range(10**9)):
            frame = next(frames, None)
            if frame is None:
                break
            if number % every == 0:
                write_picture(folder / 'data' / video / 'origin' / f'{number:08d}.jpg', frame.image)
                report.frames[video] += 1
        if not report.frames:
            raise DataError(f'{source}: has no frame')
        report.splits = {'train': [video]}
        write_atomically(folder / 'train.txt', f'{video}\n')
    return report


class _Painter:
    """Draws annotations, and counts what becomes of them."""

    def __init__(self, report: ImportReport, faults: Faults, background: int | None) -> None:
        self.report, self.faults = report, faults
        self.empty = VOID if background is None else background

    def labels(self, picture: Picture, size: tuple[int, int]) -> np.ndarray:
        """The label map of a picture of ``size`` (height, width), uint8 ``[H, W]``."""
        if picture.labels is not None:
            labels = picture.labels()
            if labels.shape != size:
                raise DataError(f'its mask is {labels.shape[1]}x{labels.shape[0]}, the image {size[1]}x{size[0]}')
            labels = np.where(labels == VOID, np.uint8(self.empty), labels)
            self.report.annotations['label maps'] += 1
        else:
            labels = self._drawn(picture, size)
        self.report.pixels += np.bincount(labels.ravel(), minlength=256)
        return labels

    def _drawn(self, picture: Picture, size: tuple[int, int]) -> np.ndarray:
        labels = np.full(size, self.empty, np.uint8)
        owner = np.zeros(size, np.int32)  # number of the annotation on top
        count = self.report.annotations
        drawn = 0
        for annotation in picture.annotations:
            mask = self._mask(annotation, size)
            if mask is None:
                continue
            drawn += 1
            labels[mask], owner[mask] = self.report.classes.index(annotation.label), drawn
        visible = int((np.bincount(owner.ravel(), minlength=drawn + 1)[1:] > 0).sum())
        count['drawn'] += visible
        count['hidden by others'] += drawn - visible
        return labels

    def _mask(self, annotation: Annotation, size: tuple[int, int]) -> np.ndarray | None:
        if annotation.draw is None:
            self.report.annotations[f'without an area ({annotation.kind})'] += 1
            return None
        try:
            if annotation.label not in self.report.classes:
                raise ValueError(f"its label '{annotation.label}' is none of the classes")
            mask = annotation.draw(*size)
        except (ValueError, TypeError) as error:
            self.faults.add(f'{annotation.where}: {error}')
            self.report.annotations['wrong'] += 1
            return None
        if not mask.any():
            self.report.annotations['smaller than a pixel'] += 1
            return None
        return mask


def _check_place(out: Path, inputs: dict[str, Path | None]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'{out}: is there already; give a new folder')
    refuse_overwriting({'OUT': out}, inputs)
    for name, path in inputs.items():
        if path is not None and path.is_dir() and path.resolve() in out.resolve().parents:
            raise ConfigError(f'OUT: {out} lies in the {name}, {path}, and would be taken for a part of it')


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the name ``out`` when the block ends well, and is gone when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'{out.name}.part.', dir=out.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~umask())
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _places(pictures: list[Picture], video_of: str | None, faults: Faults) -> list[tuple[Picture, str, str]]:
    """Video and frame of each picture; two pictures of one name are a fault."""
    named = list(_by_pattern(pictures, video_of, faults) if video_of else _by_name(pictures))
    splits: dict[str, set[str | None]] = {}
    for picture, video, _ in named:
        splits.setdefault(video, set()).add(picture.split)
    named = [(picture, f'{video}_{picture.split}' if len(splits[video]) > 1 else video, frame)
             for picture, video, frame in named]
    taken: dict[tuple[str, str], str] = {}
    places = []
    for picture, video, frame in named:
        if taken.setdefault((video, frame), picture.name) != picture.name or (
                (picture, video, frame) in places):
            faults.add(f"{picture.name}: is frame '{frame}' of video '{video}', and so is {taken[video, frame]}")
        else:
            places.append((picture, video, frame))
    return places


def _by_pattern(pictures: list[Picture], video_of: str, faults: Faults) -> Iterator[tuple[Picture, str, str]]:
    try:
        pattern = re.compile(video_of)
    except re.error as error:
        raise ConfigError(f"--video-of: '{video_of}' is no regular expression: {error}") from None
    if 'video' not in pattern.groupindex:
        raise ConfigError(f"--video-of: '{video_of}' needs a group named video, as in '(?P<video>.+)_(?P<frame>\\d+)'")
    for picture in pictures:
        found = pattern.search(picture.name)
        if found is None or not _is_name(found['video']):
            faults.add(f"{picture.name}: --video-of '{video_of}' finds no video in it")
        else:
            frame = found.groupdict().get('frame') or PurePosixPath(picture.name).stem
            yield picture, found['video'], frame


def _is_name(name: str | None) -> bool:
    return bool(name) and '..' not in PurePosixPath(name or '').parts and not (name or '').startswith('/')


def _by_name(pictures: list[Picture]) -> Iterator[tuple[Picture, str, str]]:
    """Videos by folder, or by what stands before the number at the end of a name; others are videos of one frame."""
    parsed = []
    for picture in pictures:
        path = PurePosixPath(picture.name.replace('\\', '/'))
        folder = '/'.join(part for part in path.parts[:-1] if part not in ('..', '/', 'images'))
        number = _NUMBERED.fullmatch(path.stem)
        parsed.append((picture, picture.video or folder, number['video'] if number else '', path.stem))
    numbers = Counter(prefix for *_, prefix, _ in parsed)
    for picture, video, prefix, stem in parsed:
        yield picture, video or (prefix if numbers[prefix] > 1 and prefix else stem), stem


def _common_suffix(pictures: list[Picture], report: ImportReport) -> str:
    """The suffix of most images, under which all are written: a data set has one, and readers go by the content."""
    suffixes = Counter(PurePosixPath(picture.name).suffix.lower() or '.jpg' for picture in pictures)
    (suffix, number), *others = suffixes.most_common()
    if others:
        report.notes.append(f'{len(pictures) - number} images that are no {suffix} files are named so, since a data '
                            'set has one suffix; what is in them stays as it is')
    return suffix


def _put(image: Path | bytes, target: Path, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        write_atomically(target, image, sync=False)
        return
    if not copy:
        with contextlib.suppress(OSError):  # another file system
            os.link(image.resolve(), target)
            return
    shutil.copyfile(image, target)


def _splits(written: list[tuple[Picture, str]], split: str | None, seed: int) -> dict[str, list[str]]:
    videos = sorted({video for _, video in written}, key=natural_key)
    if split is None:
        own = {video: picture.split for picture, video in written}
        return {name: [video for video in videos if (own[video] or 'train') == name]
                for name in dict.fromkeys(own[video] or 'train' for video in videos)}
    if split.endswith('.json'):
        return _listed_splits(Path(split), videos)
    shares = {}
    for part in split.split(','):
        name, _, share = part.strip().partition('=')
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = float('nan')
    add_up = abs(sum(shares.values()) - 1) < 1e-6
    if not add_up or not all(name and 0 < share <= 1 for name, share in shares.items()):
        raise ConfigError("--split: expected shares of videos that add up to 1, as 'train=0.8,val=0.2', got "
                          f"'{split}'")
    drawn = random.Random(seed).sample(videos, len(videos))
    sizes = np.diff(np.round(np.cumsum([0, *shares.values()]) * len(videos)).astype(int))
    while len(videos) >= len(sizes) and not sizes.all():  # no split is empty where that can be
        sizes[sizes.argmax()] -= 1
        sizes[sizes.argmin()] += 1
    ends = [0, *np.cumsum(sizes).tolist()]
    return {name: sorted(drawn[a:b], key=natural_key) for name, a, b in zip(shares, ends, ends[1:])}


def _listed_splits(file: Path, videos: list[str]) -> dict[str, list[str]]:
    listed = load_json(file, dict)
    for name, own in listed.items():
        unknown = [video for video in own if video not in videos] if isinstance(own, list) else [repr(own)]
        if unknown:
            raise ConfigError(f"--split: {file}, '{name}': there are no videos {some(list(map(str, unknown)))}; the "
                              f'videos are {some(videos)}')
    return listed


def _finish(folder: Path, report: ImportReport) -> None:
    """Lists of videos and classes, which come last."""
    listed = {video for videos in report.splits.values() for video in videos}
    left = [video for video in report.frames if report.frames[video] and video not in listed]
    if left:
        report.notes.append(f'{len(left)} videos are in no split: {some(left)}')
    empty = [name for name, videos in report.splits.items() if not videos]
    if empty:
        report.notes.append(f'no video is left for {some(empty)}: there are {len(report.frames)} in all')
    palette = voc_colours(len(report.classes))
    write_json(folder / 'classes.json', {'classes': report.classes, 'palette': palette})
    for name, videos in report.splits.items():
        write_atomically(folder / f'{name}.txt', ''.join(f'{video}\n' for video in videos))


