"""Frames from video files, folders and cameras, and frames into videos and folders; nothing grows with their number.

A frame that cannot be decoded is reported and skipped.  It keeps its place in time, so the video that is
written runs in step with the one that was read.
"""

from __future__ import annotations

import contextlib
import glob
import io
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
from PIL import Image

from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import named_errors, user_path
from mmseg.utils.images import read_frame
from mmseg.utils.logger import get_logger
from mmseg.utils.names import natural_key
from mmseg.utils.signals import Interrupted

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
DEFAULT_FPS = 15  # of VSPW; for frames in a folder, which do not say
_KEY_FRAME_SECONDS = 2  # how finely a player can jump
_REPORTED = 20  # broken frames that are named; later ones are counted
_LOOK = 0.2  # seconds from one look to the next whether to go on waiting
_PATIENCE = 2.0  # seconds in which a thread ends that waits for nothing
_Item = TypeVar('_Item')

# Numbers of FFmpeg (AVCOL_*, AV_DISPOSITION_*), the same in all of its versions.
_BT709, _BT601, _UNKNOWN = 1, 6, 2
_MATRICES = (_BT709, 4, 5, _BT601, 7, 9)  # that it converts from and to
_SWS_MATRICES = {_BT601: 5}  # the conversion has a number of its own for this one
_LIMITED, _FULL = 1, 2
_ATTACHED_PICTURE = 0x400


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        image: uint8 [H, W, 3] BGR.
        index: its position in the source; broken frames count.
        time: seconds since the first frame.
        name: of its file (see :class:`FolderSource`), or its position in six digits.
    """

    image: np.ndarray
    index: int
    time: Fraction
    name: str


@dataclass(frozen=True)
class Display:
    """How a player shows the samples of a video; the numbers are FFmpeg's.

    Attributes:
        pixel_aspect: width of a pixel by its height.
        matrix: from Y'CbCr to R'G'B' (``AVCOL_SPC_*``); None for the usual one of the picture's size.
        value_range: limited (1) or full (2).
        primaries: of the colours (``AVCOL_PRI_*``).
        transfer: curve of the values (``AVCOL_TRC_*``).
    """

    pixel_aspect: Fraction = Fraction(1)
    matrix: int | None = None
    value_range: int = _LIMITED
    primaries: int = _UNKNOWN
    transfer: int = _UNKNOWN


def usual_matrix(width: int, height: int) -> int:
    """The matrix that players assume where a video does not say: BT.709 for HD, BT.601 for less."""
    return _BT709 if width >= 1280 or height >= 720 else _BT601


class Source:
    """Frames of one size, in order, to iterate over once.

    Attributes:
        name: of the video, for file names.
        files: that the frames are read from.
        display: how the frames are shown.
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
        self.files: list[Path] = []
        self.display = Display()
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

    A frame is called by the path of its file below the folder, without the suffix unless files differ in that alone.

    Args:
        paths: the files.
        name: of the video.
        fps: their rate, which files do not tell.
    """

    def __init__(self, paths: Sequence[Path], name: str, fps: Fraction) -> None:
        super().__init__(name, fps, len(paths))
        self.files = sorted(paths, key=lambda path: (natural_key(str(path.parent)), natural_key(path.name)))
        folder = os.path.commonpath([path.parent for path in self.files])
        names = [path.relative_to(folder) for path in self.files]
        stems = [str(path.with_suffix('')) for path in names]
        distinct = len({stem.casefold() for stem in stems}) == len(stems)
        self._names = stems if distinct else [str(path) for path in names]

    def _frames(self) -> Iterator[Frame]:
        for index, (path, name) in enumerate(zip(self.files, self._names)):
            try:
                image = read_frame(str(path))
            except DataError as error:
                self._skip(path.name, error)
            else:
                yield Frame(image, index, index / self.fps, name)


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
        self._errors = (self._av.FFmpegError, OSError, ValueError, EOFError, LookupError)  # that PyAV raises
        self._path = path
        self._retimed = fps is not None
        with self._opened() as (container, stream):
            rate = Fraction(fps or stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            num_frames = stream.frames or None
            if num_frames is None and container.duration:
                num_frames = round(container.duration / self._av.time_base * rate)
            super().__init__(path.stem, rate, num_frames, None if self._retimed else stream.time_base)
            self.files = [path]
            self.display = self._display_of(container, stream)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and the stream that a player shows, which cover art is not."""
        try:
            # Without "file:" a colon would mean a protocol; a title in another encoding is no reason to refuse a video.
            container = self._av.open(f'file:{self._path}', metadata_errors='replace')
        except self._errors as error:
            reason = getattr(error, 'strerror', None) or error
            raise DataError(f'{self._path}: cannot be opened as a video: {reason}') from error
        with container:
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise DataError(f'{self._path}: holds no video stream')
            best = container.streams.best('video')
            stream = best if best in streams else streams[0]
            if stream.codec_context is None:
                raise DataError(f'{self._path}: FFmpeg has no decoder for its video stream')
            yield container, stream

    def _display_of(self, container: Any, stream: Any) -> Display:
        codec = stream.codec_context
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if aspect != 1:
            with contextlib.suppress(*self._errors):
                first = next(container.decode(stream), None)
                if first is not None and first.rotation % 180:
                    aspect = 1 / aspect
        matrix = usual_matrix(codec.width, codec.height)
        if codec.format is None or codec.format.is_rgb:
            return Display(aspect, matrix)
        full = codec.color_range == _FULL or codec.format.name.startswith('yuvj')
        return Display(
            aspect, codec.colorspace if codec.colorspace in _MATRICES else matrix, _FULL if full else _LIMITED,
            codec.color_primaries, codec.color_trc)

    def _frames(self) -> Iterator[Frame]:
        reformat = self._av.video.reformatter.VideoReformatter().reformat
        start: Fraction | None = None
        for index, raw in enumerate(self._decoded()):
            name = f'{index:06d}'
            if isinstance(raw, Exception):
                self._skip(name, raw)
            elif raw.is_corrupt:
                self._skip(name, 'the decoder marks it as corrupt')
            else:
                seconds = index / self.fps
                if not self._retimed and raw.pts is not None:
                    start = raw.pts * raw.time_base if start is None else start
                    seconds = raw.pts * raw.time_base - start
                image = reformat(raw, format='bgr24', **self._colours(raw)).to_ndarray()
                quarters, rest = divmod(raw.rotation, 90)
                yield Frame(image if rest else np.ascontiguousarray(np.rot90(image, quarters)), index, seconds, name)

    def _decoded(self) -> Iterator[Any]:
        """Decoded frames, with an error in the place of a broken one; where the file is cut off, they end early."""
        with self._opened() as (container, stream):
            stream.thread_type = 'AUTO'
            try:
                for packet in container.demux(stream):
                    try:
                        decoded = packet.decode()
                    except self._errors as error:
                        decoded = [error]
                    yield from decoded
            except self._errors as error:
                get_logger().warning(f'{container.name}: reading stops early: {error}')

    def _colours(self, raw: Any) -> dict[str, int]:
        """What PyAV must know to convert a frame to R'G'B'."""
        matrix = raw.colorspace if raw.colorspace in _MATRICES else self.display.matrix
        if raw.format.is_rgb or matrix is None:
            return {}
        return dict(src_colorspace=_SWS_MATRICES.get(matrix, matrix), src_color_range=raw.color_range,
                    dst_colorspace=_SWS_MATRICES[_BT601])


def _is_cover(stream: Any) -> bool:
    disposition = getattr(stream, 'disposition', 0)  # an int, an enum in older versions of PyAV, or not told
    return bool(getattr(disposition, 'value', disposition) & _ATTACHED_PICTURE)


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
    rate = None if fps is None else _rate(fps)
    path = user_path(str(source))
    text = str(path)
    if isinstance(source, int) or (text.isdecimal() and not path.exists()):
        return CameraSource(int(text), rate)
    if path.is_file():
        return VideoFileSource(path, rate)
    if path.is_dir():
        files, name = list(path.iterdir()), path.resolve().name
    elif glob.has_magic(text):
        files, name = _matching(path), path.parent.name or 'frames'
    else:
        raise DataError(f"'{source}' is no file, folder, pattern of files or camera number")
    files = [file for file in files if not file.name.startswith('.')]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        others = ', '.join(sorted({file.suffix or file.name for file in files})[:5]) or 'nothing'
        raise DataError(f"'{source}' holds no images ({', '.join(IMAGE_SUFFIXES)}); there is {others}")
    return FolderSource(images, name, rate or Fraction(DEFAULT_FPS))


def _rate(fps: float | Fraction) -> Fraction:
    rate = Fraction(fps).limit_denominator(100_000) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise DataError(f'frames per second: expected a positive number, got {fps}')
    return rate


def _matching(pattern: Path) -> list[Path]:
    """Files that match; brackets in the name of a folder that exists are no pattern."""
    folder = next(parent for parent in pattern.parents if parent.exists() or parent == parent.parent)
    rest = pattern.relative_to(folder)
    return [folder / name for name in glob.glob(str(rest), root_dir=folder)]


# What a kill may lose: FFmpeg starts a new part of the file every half second, and hands every part over to the system.
_FLUSHED = {'flush_packets': '1'}
_FRAGMENTS = {'movflags': 'hybrid_fragmented+negative_cts_offsets', 'frag_duration': '500000', **_FLUSHED}
_CLUSTERS = {'cluster_time_limit': '500', **_FLUSHED}


@dataclass(frozen=True)
class _Container:
    """A kind of video file.

    Attributes:
        muxer: FFmpeg's name of the format.
        options: of the muxer.
        encoder: FFmpeg's name of the encoder.
        constant_rate: every frame lasts equally long.
        time_base: the unit of times, where the format has one of its own.
        keeps_aspect: pixels may be other than square.
    """

    muxer: str
    options: Mapping[str, str]
    encoder: str = 'libx264'
    constant_rate: bool = False
    time_base: Fraction | None = None
    keeps_aspect: bool = True


_CONTAINERS = {
    '.mp4': _Container('mp4', _FRAGMENTS),
    '.m4v': _Container('mp4', _FRAGMENTS),
    '.mov': _Container('mov', _FRAGMENTS),
    '.mkv': _Container('matroska', _CLUSTERS),
    '.avi': _Container('avi', _FLUSHED, constant_rate=True),
    '.ts': _Container('mpegts', _FLUSHED),
    '.webm': _Container('webm', _CLUSTERS, 'libvpx-vp9', keeps_aspect=False),
    '.gif': _Container('gif', _FLUSHED, 'gif', time_base=Fraction(1, 100), keeps_aspect=False),
}
VIDEO_SUFFIXES = tuple(_CONTAINERS)  # that can be written
_MAX_CRF = 51
_ENCODER_THREADS = 4  # every one holds a frame
_LOOKAHEAD_FPS = 15  # from here on, the dozen frames by which H.264 looks ahead are less than a second


def is_video(path: str | Path) -> bool:
    """Whether an output of that name is a video; with a slash at its end or without a suffix it is a folder.

    Raises:
        ConfigError: it has the suffix of something that cannot be written.
    """
    is_folder = str(path).endswith(('/', os.sep))
    path = user_path(path)
    if is_folder or path.is_dir() or not path.suffix:
        return False
    if path.suffix.lower() not in _CONTAINERS:
        raise ConfigError(f"{path}: '{path.suffix}' cannot be written; a video is one of {', '.join(VIDEO_SUFFIXES)}, "
                          'the name of a folder ends with a slash or has no dot')
    return True


def part_of(path: Path) -> Path:
    """The name under which a video grows until it is closed."""
    return path.with_name(f'{path.stem}.part{path.suffix}')


class VideoWriter:
    """A video in a container by the suffix of the file; memory does not grow with the video.

    It grows as ``<name>.part.<suffix>`` and takes its name when it is closed.  Until then it can be played, too: a
    process that is killed loses half a second and what the encoder holds, a dozen frames at most.  Odd sides grow by
    one pixel, because H.264 as every player knows it stores colour at half the resolution.

    Args:
        path: the file; folders are made.
        fps: nominal frames per second.
        time_base: unit of the times given to :meth:`write`.
        crf: constant quality, 0 (lossless) to 51.
        display: how players are to show the pictures.
        live: they may come much more slowly than ``fps`` says, so that the encoder must not hold any.

    Raises:
        ConfigError: an unknown suffix or quality.
    """

    def __init__(
        self, path: str | Path, fps: Fraction, time_base: Fraction | None = None, crf: int = 18,
        display: Display | None = None, live: bool = False
    ) -> None:
        self._av = import_av()
        self.path = user_path(path)
        if not is_video(self.path):
            raise ConfigError(f"{path}: expected a file with one of the suffixes {', '.join(VIDEO_SUFFIXES)}")
        if not 0 <= crf <= _MAX_CRF:
            raise ConfigError(f'crf: expected 0 (lossless) to {_MAX_CRF}, got {crf}')
        self._kind = _CONTAINERS[self.path.suffix.lower()]
        self._time_base = 1 / fps if self._kind.constant_rate else self._kind.time_base or time_base or 1 / fps
        self._display = display or Display()
        self._frames = 0
        self._last = -1
        self._file = _VideoFile(part_of(self.path))
        self._container = self._av.open(self._file, 'w', format=self._kind.muxer, options=dict(self._kind.options))
        options = self._encoder_options(crf, live or fps < _LOOKAHEAD_FPS)
        self._stream = self._container.add_stream(self._kind.encoder, rate=fps, options=options)
        self._codec = self._stream.codec_context
        self._codec.thread_count = _ENCODER_THREADS
        self._codec.gop_size = max(1, round(_KEY_FRAME_SECONDS * fps))
        self._codec.time_base = self._time_base

    def _encoder_options(self, crf: int, at_once: bool) -> dict[str, str]:
        if self._kind.encoder == 'libx264':
            options = {'crf': str(crf), 'preset': 'veryfast'}
            if self._kind.constant_rate:  # AVI has no place for times, so frames must come in order
                options['bf'] = '0'
            return {**options, 'tune': 'zerolatency'} if at_once else options
        if self._kind.encoder == 'libvpx-vp9':
            crf = round(crf * 63 / _MAX_CRF)
            return {'crf': str(crf), 'b': '0', 'deadline': 'realtime', 'cpu-used': '6', 'lag-in-frames': '0'}
        return {}

    def write(self, image: np.ndarray, seconds: Fraction) -> None:
        """Adds a picture.

        Args:
            image: uint8 [H, W, 3] BGR, of one size in all calls.
            seconds: when it is shown; a time that is not later than the one before is moved behind it.

        Raises:
            OSError: the disk is full, for instance; what was written before stays in the unfinished file.
            DataError: the encoder takes no picture of this size.
        """
        image = self._fitted(image)
        if not self._frames:
            self._set_up(*image.shape[1::-1])
        frame = self._encoded(image)
        self._last = max(self._last + 1, round(seconds / self._time_base))
        frame.pts, frame.time_base = self._last, self._time_base
        try:
            self._container.mux(self._stream.encode(frame))
        except self._av.FFmpegError as error:
            raise DataError(f'{self.path}: a picture of {image.shape[1]}x{image.shape[0]} cannot be written: '
                            f'{error.strerror}') from error
        self._frames += 1
        self._file.check()

    def close(self, whole: bool = True) -> None:
        """Finishes the file and gives it its name; one without a picture is taken away.

        Args:
            whole: false after an error: the file keeps the name of an unfinished one.

        Raises:
            OSError: it could not be written to its end.
        """
        try:
            with contextlib.closing(self._file):
                if self._frames:
                    self._container.mux(self._stream.encode(None))
                self._container.close()
        except self._av.FFmpegError as error:
            if whole:
                raise DataError(f'{self._file.path}: cannot be finished: {error.strerror}') from error
        if not self._frames or not self._file.path.stat().st_size:
            self._file.path.unlink()
        if whole:
            self._file.check()
        if whole and self._frames:
            os.replace(self._file.path, self.path)
        elif self._file.path.exists():
            get_logger().warning(f'{self._file.path}: holds what was written before the error')

    def _fitted(self, image: np.ndarray) -> np.ndarray:
        """With square pixels where the format has no others, and even sides."""
        aspect = self._display.pixel_aspect
        if aspect != 1 and not self._kind.keeps_aspect:
            image = cv2.resize(image, (max(1, round(image.shape[1] * aspect)), image.shape[0]))
        height, width = image.shape[:2]
        if (height % 2 or width % 2) and self._kind.encoder != 'gif':
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        return image

    def _set_up(self, width: int, height: int) -> None:
        """Tells the encoder what is known with the first picture."""
        display = self._display
        self._matrix = display.matrix or usual_matrix(width, height)
        self._stream.width, self._stream.height = width, height
        if self._kind.encoder == 'gif':
            self._stream.pix_fmt = 'pal8'
            return
        self._stream.pix_fmt = 'yuv420p'
        self._codec.sample_aspect_ratio = display.pixel_aspect if self._kind.keeps_aspect else Fraction(1)
        self._codec.colorspace, self._codec.color_range = self._matrix, display.value_range
        self._codec.color_primaries, self._codec.color_trc = display.primaries, display.transfer

    def _encoded(self, image: np.ndarray) -> Any:
        """The picture in the encoder's pixel format."""
        if self._kind.encoder == 'gif':
            indexed = Image.fromarray(image[..., ::-1]).quantize(256)
            palette = np.full((256, 4), 255, np.uint8)
            colours = np.array(indexed.getpalette('RGB'), np.uint8).reshape(-1, 3)
            palette[: len(colours), 1:] = colours
            return self._av.VideoFrame.from_ndarray((np.array(indexed), palette), format='pal8')
        return self._av.VideoFrame.from_ndarray(image, format='bgr24').reformat(
            format='yuv420p', src_colorspace=_SWS_MATRICES[_BT601],
            dst_colorspace=_SWS_MATRICES.get(self._matrix, self._matrix), dst_color_range=self._display.value_range)


class _VideoFile(io.FileIO):
    """A file for FFmpeg, which may crash after a write that fails: from the first error on, data are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._error: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, 'w')

    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left and self._error is None:
            with self._noted():
                left = left[super().write(left) :]
        return len(data)

    def close(self) -> None:
        """Puts the data on the disk, too."""
        if not self.closed:
            with self._noted():
                os.fsync(self.fileno())
            with self._noted():
                super().close()

    def check(self) -> None:
        """Raises the first error that has come."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            with named_errors(self.path):
                yield
        except OSError as error:
            self._error = self._error or error


def prefetch(
    items: Iterable[_Item], depth: int = 8, newest: bool = False, stopped: Callable[[], object] = bool
) -> Iterator[_Item]:
    """Computes ``items`` ahead, in a thread.

    Args:
        items: iterated in the thread; an error in it is raised here, after the items before it.
        depth: how many items may wait.
        newest: when ``depth`` items wait, drop the oldest (cameras) instead of pausing the thread.
        stopped: whether to give up, even while the thread waits for an input that has stalled.

    Raises:
        Interrupted: ``stopped`` says so.
    """
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()
    end: Future[None] = Future()

    def work() -> None:
        try:
            for item in items:
                while not room.acquire(blocking=not newest):
                    with contextlib.suppress(queue.Empty):
                        ready.get_nowait()
                        room.release()
                if stop.is_set():
                    return
                ready.put(item)
            end.set_result(None)
        except BaseException as error:
            end.set_exception(error)
        ready.put(end)

    thread = threading.Thread(target=work, name='prefetch', daemon=True)
    thread.start()
    try:
        while not stopped():
            try:
                item = ready.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if item is end:
                end.result()  # raises what the thread did
                return
            room.release()
            yield item
        raise Interrupted
    finally:
        stop.set()
        room.release()
        thread.join(_PATIENCE)
        close = getattr(items, 'close', None)
        if close is not None and not thread.is_alive():
            close()


class Background(Generic[_Item]):
    """Calls a function on items, in order, in a thread.

    Args:
        function: after an error in it, later items are dropped; the next :meth:`put` or :meth:`close` raises the error.
        depth: how many items may wait.
    """

    def __init__(self, function: Callable[[_Item], object], depth: int = 8) -> None:
        self._function = function
        self._depth = depth
        self._failed = False
        self._pending: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, 'background')

    def put(self, item: _Item) -> None:
        """Adds an item; waits while ``depth`` of them are pending."""
        self._wait(self._depth - 1)
        self._pending.append(self._thread.submit(self._call, item))

    def close(self) -> None:
        """Waits until all items are done."""
        with self._thread:
            self._wait(0)

    def _wait(self, most: int) -> None:
        """Until at most ``most`` items are pending; raises the error of one that is done."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()

    def _call(self, item: _Item) -> None:
        if not self._failed:
            self._failed = True  # unless the function returns
            self._function(item)
            self._failed = False


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        DataError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("video files need PyAV: pip install 'themask[video]' (or: pip install 'av>=15')") from error
    return av
