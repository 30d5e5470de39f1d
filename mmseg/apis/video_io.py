"""Frames from video files, folders and cameras, and frames into videos and folders; nothing grows with their number.

A frame that cannot be decoded is reported and skipped.  It keeps its place in time, so the video that is
written runs in step with the one that was read.
"""

from __future__ import annotations

import glob
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import cv2
import numpy as np

from mmseg.datasets.pipelines.loading import read_frame
from mmseg.utils.errors import DataError
from mmseg.utils.logger import get_logger
from mmseg.utils.visual import write_picture

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
VIDEO_SUFFIXES = ('.mp4', '.mkv', '.mov')  # that can be written
DEFAULT_FPS = 15  # of VSPW; for frames in a folder, which do not say
_ENCODER = 'libx264'
_FRAGMENT_SECONDS = 2  # what a killed process may lose; also how finely a player can jump
_REPORTED = 20  # broken frames that are named; later ones are counted
_Item = TypeVar('_Item')


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        image: uint8 [H, W, 3] BGR.
        index: its position in the source; broken frames count.
        time: seconds since the first frame.
        name: stem of its file, or its position in six digits.
    """

    image: np.ndarray
    index: int
    time: Fraction
    name: str


class Source:
    """Frames of one size, in order; iterate once.

    Attributes:
        name: of the video, for file names.
        fps: frames per second; an average where the rate varies.
        time_base: unit of which all frame times are multiples.
        num_frames: how many there are, or None where nobody knows; an estimate for some video files.
        live: frames come by the clock, and those that are not fetched in time are lost.
        broken: number of frames that were skipped.
        broken_names: what was wrong with the first of them.
    """

    live = False

    def __init__(self, name: str, fps: Fraction, num_frames: int | None, time_base: Fraction | None = None) -> None:
        self.name = name
        self.fps = fps
        self.time_base = time_base or 1 / fps
        self.num_frames = num_frames
        self.broken = 0
        self.broken_names: list[str] = []

    def __iter__(self) -> Iterator[Frame]:
        shape: tuple[int, ...] | None = None
        for frame in self._frames():
            shape = shape or frame.image.shape
            if frame.image.shape == shape:
                yield frame
            else:
                got, first = ('x'.join(map(str, s[1::-1])) for s in (frame.image.shape, shape))
                self._skip(frame.name, f'it is {got}, the frames before are {first}')

    def _frames(self) -> Iterator[Frame]:
        raise NotImplementedError

    def _skip(self, name: str, why: object) -> None:
        """Reports a broken frame."""
        self.broken += 1
        message = f'{self.name}: frame {name} is skipped: {why}'
        if self.broken <= _REPORTED:
            self.broken_names.append(message)
            get_logger().warning(message)


class FolderSource(Source):
    """Image files as the frames of a video, in the natural order of their names (2 before 10).

    Args:
        paths: the files.
        name: of the video.
        fps: their rate, which files do not tell.
    """

    def __init__(self, paths: Sequence[Path], name: str, fps: Fraction) -> None:
        super().__init__(name, fps, len(paths))
        self._paths = sorted(paths, key=_natural)

    def _frames(self) -> Iterator[Frame]:
        for index, path in enumerate(self._paths):
            try:
                image = read_frame(str(path))
            except DataError as error:
                self._skip(path.name, error)
            else:
                yield Frame(image, index, index / self.fps, path.stem)


def _natural(path: Path) -> list[int | str]:
    """Sort key that takes digits in a name as a number."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', str(path))]


class VideoFileSource(Source):
    """A video file, decoded by PyAV; a rotation that players apply (phones held upright) is applied.

    Args:
        path: any video that FFmpeg reads.
        fps: a rate that replaces the file's own; every frame then lasts equally long.

    Raises:
        DataError: the file is no video.
    """

    def __init__(self, path: Path, fps: Fraction | None = None) -> None:
        self._av = import_av()
        self._path = path
        self._retimed = fps is not None
        with self._open() as container:
            stream = container.streams.video[0]
            rate = Fraction(fps or stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            num_frames = stream.frames or None
            if num_frames is None and container.duration:
                num_frames = round(container.duration / self._av.time_base * rate)
            super().__init__(path.stem, rate, num_frames, None if self._retimed else stream.time_base)

    def _open(self) -> Any:
        try:
            container = self._av.open(str(self._path))
        except (OSError, ValueError) as error:  # PyAV's errors are one or the other
            raise DataError(f'{self._path}: cannot be opened as a video: {error}') from error
        if not container.streams.video:
            container.close()
            raise DataError(f'{self._path}: holds no video stream')
        return container

    def _frames(self) -> Iterator[Frame]:
        reformatter = self._av.video.reformatter.VideoReformatter()
        index = 0
        start: Fraction | None = None
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = 'AUTO'
            for packet in _packets(container, stream, self._av):
                try:
                    decoded = packet.decode()
                except self._av.FFmpegError as error:
                    self._skip(f'{index:06d}', error)
                    index += 1
                    continue
                for raw in decoded:
                    if raw.is_corrupt:
                        self._skip(f'{index:06d}', 'the decoder marks it as corrupt')
                    else:
                        seconds = index / self.fps
                        if not self._retimed and raw.pts is not None:
                            start = raw.pts * raw.time_base if start is None else start
                            seconds = raw.pts * raw.time_base - start
                        image = reformatter.reformat(raw, format='bgr24').to_ndarray()
                        if raw.rotation % 90 == 0 and raw.rotation:
                            image = np.ascontiguousarray(np.rot90(image, raw.rotation // 90))
                        yield Frame(image, index, seconds, f'{index:06d}')
                    index += 1


def _packets(container: Any, stream: Any, av: ModuleType) -> Iterator[Any]:
    """Packets of a stream; where the file is cut off, what came before counts."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        get_logger().warning(f'{container.name}: reading stops early: {error}')


class CameraSource(Source):
    """A camera; frames come until the reader stops.

    Args:
        number: of the camera, from 0.
        fps: a rate to ask the camera for.

    Raises:
        DataError: there is no such camera.
    """

    live = True

    def __init__(self, number: int, fps: Fraction | None = None) -> None:
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise DataError(f'camera {number} cannot be opened')
        if fps is not None:
            self._capture.set(cv2.CAP_PROP_FPS, float(fps))
        rate = Fraction(self._capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS).limit_denominator(1001)
        super().__init__(f'camera{number}', rate, None, Fraction(1, 1000))

    def _frames(self) -> Iterator[Frame]:
        start: float | None = None
        index = failed = 0
        try:
            while failed < 2 * self.fps:  # two seconds of nothing: it was unplugged
                done, image = self._capture.read()
                now = time.monotonic()
                start = now if start is None else start
                if done:
                    yield Frame(image, index, Fraction(round(1000 * (now - start)), 1000), f'{index:06d}')
                    failed = 0
                else:
                    self._skip(f'{index:06d}', 'the camera gave none')
                    failed += 1
                index += 1
        finally:
            self._capture.release()


def open_source(source: str | Path | int, fps: float | Fraction | None = None) -> Source:
    """Frames of whatever ``source`` names.

    Args:
        source: a video file, a folder of images, a pattern such as ``'frames/*.jpg'``, or the number of a camera.
        fps: frame rate; needed for images only (default 15), replaces a file's own.

    Raises:
        DataError: there is nothing of that name, or it holds no frames.
    """
    rate = None if fps is None else Fraction(fps).limit_denominator(100_000)
    if rate is not None and rate <= 0:
        raise DataError(f'frames per second: expected a positive number, got {fps}')
    text = str(source)
    path = Path(source) if not isinstance(source, int) else Path(text)
    if isinstance(source, int) or (text.isdigit() and not path.exists()):
        return CameraSource(int(text), rate)
    if path.is_file():
        return VideoFileSource(path, rate)
    if path.is_dir():
        files, name = list(path.iterdir()), path.resolve().name
    elif glob.has_magic(text):
        files, name = [Path(file) for file in glob.glob(text)], path.parent.name or 'frames'
    else:
        raise DataError(f"'{source}' is no file, folder, pattern of files or camera number")
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith('.')]
    if not files:
        raise DataError(f"'{source}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return FolderSource(files, name, rate or Fraction(DEFAULT_FPS))


class VideoWriter:
    """H.264 in a container by the suffix of the file; memory does not grow with the video.

    The file is written in fragments and finished when closed, so a process that is killed leaves a playable file, too.
    Odd sides grow by one pixel, because H.264 as every player knows it stores colour at half the resolution.

    Args:
        path: the file; folders are made.
        fps: nominal frames per second.
        time_base: unit of the times given to :meth:`write`.
        crf: constant quality, 0 (lossless) to 51.
    """

    def __init__(self, path: str | Path, fps: Fraction, time_base: Fraction | None = None, crf: int = 18) -> None:
        self._av = import_av()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = {} if path.suffix == '.mkv' else {'movflags': 'hybrid_fragmented'}
        self._container = self._av.open(str(path), 'w', options=flags)
        self._stream = self._container.add_stream(_ENCODER, rate=fps, options={'crf': str(crf), 'preset': 'veryfast'})
        self._stream.pix_fmt = 'yuv420p'
        self._stream.codec_context.gop_size = max(1, round(_FRAGMENT_SECONDS * fps))
        self._stream.codec_context.time_base = time_base or 1 / fps
        self._time_base = time_base or 1 / fps
        self._last = -1

    def write(self, image: np.ndarray, seconds: Fraction) -> None:
        """Adds a picture.

        Args:
            image: uint8 [H, W, 3] BGR, of one size in all calls.
            seconds: when it is shown; a time that is not later than the one before is moved behind it.
        """
        height, width = image.shape[:2]
        if height % 2 or width % 2:
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._last < 0:
            self._stream.height, self._stream.width = image.shape[:2]
        frame = self._av.VideoFrame.from_ndarray(image, format='bgr24')
        self._last = max(self._last + 1, round(seconds / self._time_base))
        frame.pts, frame.time_base = self._last, self._time_base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Writes what the encoder still holds and finishes the file."""
        if self._last >= 0:
            self._container.mux(self._stream.encode(None))
        self._container.close()


class FolderWriter:
    """Pictures as files.

    Args:
        folder: where they go; made if needed.
        suffix: ``.jpg`` or ``.png``.
    """

    def __init__(self, folder: str | Path, suffix: str = '.jpg') -> None:
        self._folder = Path(folder)
        self._suffix = suffix

    def write(self, image: np.ndarray, name: str) -> None:
        """Writes ``image`` (uint8 [H, W, 3] BGR) as ``<folder>/<name><suffix>``."""
        write_picture(self._folder / f'{name}{self._suffix}', image)


def prefetch(items: Iterable[_Item], depth: int = 8, newest: bool = False) -> Iterator[_Item]:
    """``items``, made ahead by a thread.

    Args:
        items: iterated in the thread; what it raises is raised here.
        depth: how many are made ahead.
        newest: where the reader is slower, drop the oldest instead of waiting (cameras).
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, block=not newest, timeout=0.1)
            except queue.Full:
                if newest:
                    _discard(ready)

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name='prefetch', daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
        thread.join()
        close = getattr(items, 'close', None)
        if close is not None:
            close()


def _discard(ready: queue.Queue[Any]) -> None:
    """Drops the oldest entry, if there still is one."""
    try:
        ready.get_nowait()
    except queue.Empty:
        return


class Background(Generic[_Item]):
    """Runs a function on items in a thread, in order; :meth:`put` waits while ``depth`` items are pending.

    Args:
        function: called with every item.  What it raises is raised once, by the next :meth:`put` or by :meth:`close`,
            and later items are dropped.
        depth: how many items may wait.
    """

    def __init__(self, function: Any, depth: int = 8) -> None:
        self._function = function
        self._pending: queue.Queue[tuple[bool, _Item | None]] = queue.Queue(depth)
        self._failed = False
        self._error: BaseException | None = None  # not yet raised
        self._thread = threading.Thread(target=self._work, name='background', daemon=True)
        self._thread.start()

    def put(self, item: _Item) -> None:
        """Hands one item over."""
        self._raise()
        self._pending.put((True, item))

    def close(self) -> None:
        """Waits until all items are done."""
        self._pending.put((False, None))
        self._thread.join()
        self._raise()

    def _work(self) -> None:
        while True:
            more, item = self._pending.get()
            if not more:
                return
            if not self._failed:
                try:
                    self._function(item)
                except BaseException as error:
                    self._failed, self._error = True, error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        DataError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("video files need PyAV: pip install 'themask[video]' (or: pip install 'av>=14')") from error
    return av
