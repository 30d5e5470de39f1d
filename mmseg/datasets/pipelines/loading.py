"""Reading frames and label maps, with errors that name the file, its video, and what to do."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mmseg.registry import PIPELINES, retired
from mmseg.utils.errors import DataError

from .transform import Results, Transform

VOID = 255
_UNKNOWN_LABEL = 254  # label tables hold it for raw values that no class has
_JPEG_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')
_JPEG_END = b'\xff\xd9'
_REPAIR = 'restore the file, take its video out of the split file, or set skip_bad_clips=True'


watch: Callable[[str], None] | None = None
"""Called with each file before it is read; a loader notes so what it waits for."""


def _read(path: str) -> bytes:
    if watch is not None:
        watch(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    if not data:
        raise DataError(f'{path}: empty file (0 bytes)')
    return data


def jpeg_is_whole(data: bytes) -> bool:
    """Whether a JPEG stream reaches its end marker; a decoder fills a truncated one with grey and goes on.

    Markers are walked segment by segment, so an embedded thumbnail does not count, nor do bytes after the end.
    """
    if data.endswith(_JPEG_END):
        return True
    position = 2
    while True:
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return False
        if marker.group() == _JPEG_END:
            return True
        length = data[marker.end():marker.end() + 2]
        if len(length) < 2:
            return False
        position = marker.end() + int.from_bytes(length, 'big')


def read_frame(path: str) -> np.ndarray:
    """Reads an image as [H,W,3] uint8 BGR.

    Raises:
        DataError: the file is missing, empty, truncated, or no image.
    """
    data = _read(path)
    if data.startswith(b'\xff\xd8') and not jpeg_is_whole(data):
        raise DataError(f'{path}: truncated JPEG ({len(data)} bytes, no end marker)')
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise DataError(f'{path}: cannot be decoded: {error.err}') from None
    if image is None:
        raise DataError(f'{path}: not an image that OpenCV can decode')
    return image


def read_mask(path: str) -> np.ndarray:
    """Reads an 8-bit label image as [H,W] uint8: palette indices or grey values, as stored.

    Raises:
        DataError: the file is missing, empty, truncated, no image, or not 8-bit with one channel.
    """
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ('L', 'P'):
                raise DataError(f"{path}: expected an 8-bit image with one channel, got mode '{image.mode}'")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f'{path}: cannot be decoded: {error}') from None


def label_table(reduce_zero_label: bool, num_classes: int | None = None) -> np.ndarray:
    """Table [256] uint8 from raw label values to training labels.

    Args:
        reduce_zero_label: raw 0 is void and raw 1..K are the classes (VSPW); otherwise raw 0..K-1 are.
        num_classes: K; raw values that no class has become 254, the mark of an unknown label.  Without it every value
            is taken as it comes.
    """
    table = np.arange(256, dtype=np.uint8)
    if reduce_zero_label:
        table = (table - 1).astype(np.uint8)  # 0 wraps around to 255, void
    table[VOID] = VOID
    if num_classes is not None:
        if num_classes >= _UNKNOWN_LABEL:
            raise ValueError(f'8-bit label maps hold at most {_UNKNOWN_LABEL - 1} classes, got {num_classes}')
        table[(table >= num_classes) & (table != VOID)] = _UNKNOWN_LABEL
    return table


def to_training_labels(mask: np.ndarray, table: np.ndarray, num_classes: int | None, path: str) -> np.ndarray:
    """Maps raw label values by :func:`label_table`; [H,W] uint8, classes 0..K-1 and 255 for void.

    Raises:
        DataError: a value that no class has.
    """
    label = cv2.LUT(mask, table)
    if num_classes is not None and (label == _UNKNOWN_LABEL).any():
        values = np.unique(mask[label == _UNKNOWN_LABEL]).tolist()
        allowed = np.flatnonzero(table < num_classes)
        raise DataError(
            f'{path}: label out of range: {values}; the data set has {num_classes} classes, stored as '
            f'{allowed[0]}..{allowed[-1]}, and 255 for void')
    return label


def located(error: DataError, video: str | None, frame: Any) -> DataError:
    """The same error with the frame it was met in; in a data set also with the video, and what to do about it."""
    if video is None:
        return DataError(f'frame {frame}: {error}')
    return DataError(f"video '{video}', frame {frame}: {error}; {_REPAIR}")


@PIPELINES.register_module()
@retired(
    to_float32=(False,), color_type=('color',), imdecode_backend=('cv2',), file_client_args=({'backend': 'disk'},))
class LoadImageFromFile(Transform):
    """Loads the frames of a clip.

    Reads ``results['frames']``: a list whose items are paths or [H,W,3] uint8 BGR arrays (frames already in memory), or
    one such item for a single image.  Writes ``img``, ``filename`` and ``ori_filename`` (of the last frame, ``None``
    for an array), ``all_names``, the shapes, and neutral ``scale_factor`` and ``img_norm_cfg``.

    Raises:
        DataError: a file that cannot be read, or frames of different sizes.
    """

    def apply(self, results: Results) -> Results:
        """Adds the frames and what is known of them to ``results``."""
        frames = results['frames']
        single = isinstance(frames, (str, Path, np.ndarray))
        frames = [frames] if single else list(frames)
        video = results.get('video')
        images: list[np.ndarray] = []
        paths: list[str | None] = []
        for index, frame in enumerate(frames):
            in_memory = isinstance(frame, np.ndarray)
            path = None if in_memory else str(frame)
            name = f'#{index}' if path is None else Path(path).stem
            try:
                image = _checked_array(frame) if path is None else read_frame(path)
                if images and image.shape != images[0].shape:
                    raise DataError(
                        f'{path or name}: {_size(image)}, but {paths[0] or "frame #0"} of the same clip is '
                        f'{_size(images[0])}')
            except DataError as error:
                raise located(error, video, name) from None
            images.append(image)
            paths.append(path)
        shape = images[-1].shape
        results.update(
            img=images[0] if single else images,
            filename=paths[-1],
            ori_filename=None if paths[-1] is None else Path(paths[-1]).name,
            all_names=paths,
            ori_shape=shape, img_shape=shape, pad_shape=shape, scale_factor=1.0,
            img_norm_cfg=dict(mean=np.zeros(3, np.float32), std=np.ones(3, np.float32), to_rgb=False))
        return results


def _checked_array(frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError(f'expected a frame as uint8 [H,W,3] in BGR, got {frame.dtype} {list(frame.shape)}')
    return np.ascontiguousarray(frame)


def _size(image: np.ndarray) -> str:
    return f'{image.shape[1]}x{image.shape[0]}'


@PIPELINES.register_module()
@retired(imdecode_backend=('pillow',), file_client_args=({'backend': 'disk'},))
class LoadAnnotations(Transform):
    """Loads the label maps of a clip's frames.

    Reads ``results['masks']`` (paths, one a frame) and, where the data set gives them, ``num_classes`` and
    ``reduce_zero_label``.  Writes ``gt_semantic_seg``: [H,W] uint8, classes 0..K-1, 255 for void.

    Args:
        reduce_zero_label: raw 0 becomes void and the other values go down by one (255 stays).  ``None`` takes what the
            data set says.

    Raises:
        DataError: a file that cannot be read, a label that no class has, or a mask of another size than its frame.
    """

    def __init__(self, reduce_zero_label: bool | None = None):
        self.reduce_zero_label = reduce_zero_label

    def apply(self, results: Results) -> Results:
        """Adds the label maps to ``results``."""
        reduce = self.reduce_zero_label
        if reduce is None:
            reduce = results.get('reduce_zero_label', False)
        masks = results['masks']
        single = isinstance(masks, (str, Path))
        shape = results['ori_shape'][:2] if 'ori_shape' in results else None
        labels = load_labels(
            [masks] if single else masks, reduce, results.get('num_classes'), shape, results.get('video'))
        results['gt_semantic_seg'] = labels[0] if single else labels
        results['seg_fields'] = [*results.get('seg_fields', ()), 'gt_semantic_seg']
        return results


def load_labels(
        paths: list[str], reduce_zero_label: bool, num_classes: int | None = None,
        shape: tuple[int, int] | None = None, video: str | None = None) -> list[np.ndarray]:
    """Reads label maps and turns them into training labels.

    Args:
        paths: mask files.
        reduce_zero_label: see :func:`label_table`.
        num_classes: number of classes; without it the range is not checked.
        shape: height and width that the maps must have.
        video: name of the video, for errors.

    Returns:
        One [H,W] uint8 array a path.

    Raises:
        DataError: see :class:`LoadAnnotations`.
    """
    table = label_table(reduce_zero_label, num_classes)
    labels = []
    for path in map(str, paths):
        try:
            label = to_training_labels(read_mask(path), table, num_classes, path)
            if shape is not None and label.shape != tuple(shape):
                raise DataError(f'{path}: mask is {_size(label)}, its frame is {shape[1]}x{shape[0]}')
        except DataError as error:
            raise located(error, video, Path(path).stem) from None
        labels.append(label)
    return labels
