"""Reading the frames and label maps of a clip, with errors that name the file, its video, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseg.datasets.labels import MAX_CLASSES, LabelMap, LabelRule
from mmseg.registry import PIPELINES, retired
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import UNKNOWN, VOID, jpeg_is_whole, read_frame, read_mask

from .transform import Results, Transform

__all__ = [
    'UNKNOWN', 'VOID', 'LoadAnnotations', 'LoadImageFromFile', 'jpeg_is_whole', 'load_labels', 'located', 'read_frame',
    'read_mask',
]

_REPAIR = 'restore the file, take its video out of the split file, or set skip_bad_clips=True'


@contextlib.contextmanager
def located(video: str | None, frame: Any) -> Iterator[None]:
    """Inside, an error of data names the frame; in a data set also the video, and what to do about it."""
    try:
        yield
    except DataError as error:
        if video is None:
            raise DataError(f'frame {frame}: {error}') from None
        raise DataError(f"video '{video}', frame {frame}: {error}; {_REPAIR}") from None


@PIPELINES.register_module()
@retired(
    to_float32=(False,), color_type=('color',), imdecode_backend=('cv2',), file_client_args=({'backend': 'disk'},))
class LoadImageFromFile(Transform):
    """Loads the frames of a clip.

    Reads ``results['frames']``: a list whose items are paths or [H,W,3] uint8 BGR arrays (frames already in memory), or
    one such item for a single image.  Writes ``img``, ``filename`` and ``ori_filename`` (of the last frame, ``None``
    for an array), ``all_names``, the shapes, and neutral ``scale_factor`` and ``img_norm_cfg``.  Where there are masks
    (``results['has_masks']``, or paths in ``results['masks']``) a frame that its EXIF orientation turns is an error.

    Raises:
        DataError: a file that cannot be read, or frames of different sizes.
    """

    def apply(self, results: Results) -> Results:
        """Adds the frames and what is known of them to ``results``."""
        frames = results['frames']
        single = isinstance(frames, (str, Path, np.ndarray))
        frames = [frames] if single else list(frames)
        video = results.get('video')
        turn = not results.get('has_masks', 'masks' in results)
        images: list[np.ndarray] = []
        paths: list[str | None] = []
        for index, frame in enumerate(frames):
            path = None if isinstance(frame, np.ndarray) else str(frame)
            if path is not None and path in paths:  # an image as a clip
                images.append(images[paths.index(path)])
                paths.append(path)
                continue
            name = f'#{index}' if path is None else Path(path).stem
            with located(video, name):
                image = _checked_array(frame) if path is None else read_frame(path, turn)
                if images and image.shape != images[0].shape:
                    raise DataError(
                        f'{path or name}: {_size(image)}, but {paths[0] or "frame #0"} of the same clip is '
                        f'{_size(images[0])}')
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

    Reads ``results['masks']``: paths, one a frame, and None for a frame without labels.  Where a data set gives them,
    ``label_rule`` says what the files mean, and with ``void='ignore'`` void becomes unknown.  Writes
    ``gt_semantic_seg``: [H,W] uint8, classes 0..K-1, 255 for void, 254 for unknown.

    Args:
        reduce_zero_label: raw 0 becomes void and the other values go down by one (255 stays).  ``None`` takes what the
            data set says.
        colours: masks hold the colours of the data set's palette.  The data set has the same argument, which testing
            follows, too.
        colour_map: colour (R, G, B) -> class, or None for void: where the colours are others than the palette's.

    Raises:
        DataError: a file that cannot be read, a label that no class has, or a mask of another size than its frame.
    """

    def __init__(
            self, reduce_zero_label: bool | None = None, colours: bool | None = None,
            colour_map: LabelMap | None = None):
        self.reduce_zero_label = reduce_zero_label
        self.colours = colours
        self.colour_map = colour_map

    def _rule(self, results: Results) -> LabelRule:
        if 'label_rule' in results:
            return results['label_rule']
        if self.colours or self.colour_map is not None:
            raise ConfigError('LoadAnnotations: colours need a data set, which has the palette and the classes')
        reduce = self.reduce_zero_label
        if reduce is None:
            reduce = results.get('reduce_zero_label', False)
        return LabelRule.plain(results.get('num_classes', MAX_CLASSES), reduce)

    def apply(self, results: Results) -> Results:
        """Adds the label maps to ``results``."""
        masks = results['masks']
        single = masks is None or isinstance(masks, (str, Path))
        shape = results['ori_shape'][:2] if 'ori_shape' in results else None
        labels, _ = load_labels([masks] if single else masks, self._rule(results), shape, results.get('video'))
        if results.get('void') == 'ignore':
            labels = [np.where(label == VOID, np.uint8(UNKNOWN), label) for label in labels]
        results['gt_semantic_seg'] = labels[0] if single else labels
        results['seg_fields'] = [*results.get('seg_fields', ()), 'gt_semantic_seg']
        return results


def load_labels(
        paths: Sequence[str | Path | None], rule: LabelRule, shape: tuple[int, int] | None = None,
        video: str | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Reads mask files; a frame without one is unknown everywhere.

    Args:
        paths: mask files; None where there is none.
        rule: what they mean.
        shape: height and width that the maps must have; needed where a file is None.
        video: name of the video, for errors.

    Returns:
        Labels, and what the video consistency compares (:meth:`~mmseg.datasets.labels.LabelRule.read`): one [H,W]
        uint8 array a path.

    Raises:
        DataError: see :class:`LoadAnnotations`.
    """
    read: dict[str | Path | None, tuple[np.ndarray, np.ndarray]] = {}
    for path in dict.fromkeys(paths):  # an image as a clip has one file
        if path is None:
            assert shape is not None
            unknown = np.broadcast_to(np.uint8(UNKNOWN), tuple(shape))
            read[path] = unknown, unknown
            continue
        with located(video, Path(path).stem):
            read[path] = label, _ = rule.read(str(path))
            if shape is not None and label.shape != tuple(shape):
                raise DataError(f'{path}: mask is {_size(label)}, its frame is {shape[1]}x{shape[0]}')
    return [read[path][0] for path in paths], [read[path][1] for path in paths]
