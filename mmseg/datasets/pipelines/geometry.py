"""Geometry: sizes, windows and mirrors, drawn once a clip.

Draws and their order are those of mmsegmentation 0.x, so seeds mean what they meant there.  Sizes in configs are
(width, height) for scales, as in mmcv, and (height, width) for crops and padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Literal

import cv2
import numpy as np

from mmseg.registry import PIPELINES, retired
from mmseg.utils.arguments import Count, Label, Ratio, Share, Weight
from mmseg.utils.errors import ConfigError

from .loading import UNKNOWN, VOID
from .transform import Direction, LabelView, Results, Transform, last_frame, map_clip

_CROP_REDRAWS = 10
Scale = tuple[Ratio, Ratio]
Scales = Scale | Sequence[Scale] | None
Mode = Literal['range', 'value']


def _align(side: int, divisor: int) -> int:
    """The next multiple of ``divisor`` from ``side`` on."""
    return math.ceil(side / divisor) * divisor


def scale_list(value: Scales) -> list[tuple[int, int]]:
    """One scale or a list of scales as a list."""
    if value is None:
        return []
    if len(value) == 0:
        raise ConfigError('img_scale: expected (width, height) or a list of them, got an empty list')
    scales: Any = value if isinstance(value[0], Sequence) else [value]
    return [(int(w), int(h)) for w, h in scales]


def scaled(scales: Sequence[tuple[int, int]], ratio: float, results: Results) -> tuple[int, int]:
    """The first of ``scales``, or the frame's own size where there is none, times ``ratio``."""
    height, width = last_frame(results['img']).shape[:2]
    base = scales[0] if scales else (width, height)
    return int(base[0] * ratio), int(base[1] * ratio)


@PIPELINES.register_module()
@retired(process_clips=())
class Resize(Transform):
    """Resizes frames (bilinear) and label maps (nearest) to a drawn scale.

    The scale is, in this order: ``results['scale']`` where a test-time augmentation set it; ``img_scale`` times one
    uniform draw of ``ratio_range``; one of several ``img_scale``.  With ``keep_ratio`` it is a bound: the side lengths
    become int(side * s + 0.5) with s = min(long / max(h, w), short / min(h, w)).

    Args:
        img_scale: (width, height), or several of them; ``None`` with ``ratio_range`` takes the frame's own size.
        multiscale_mode: how one of several scales is drawn: ``'range'`` between the first two, ``'value'`` among all.
        ratio_range: (low, high) of the factor that multiplies ``img_scale``.
        keep_ratio: keep the aspect ratio.
        size_divisor: where given, a second resize takes both sides up to the next multiple of it.
    """

    def __init__(
            self, img_scale: Scales = None, multiscale_mode: Mode = 'range',
            ratio_range: tuple[Weight, Weight] | None = None,
            keep_ratio: bool = True, size_divisor: Count | None = None):
        self.img_scales = scale_list(img_scale)
        self.multiscale_mode = multiscale_mode
        self.ratio_range = ratio_range
        self.keep_ratio = keep_ratio
        self.size_divisor = size_divisor
        if ratio_range is not None and len(self.img_scales) > 1:
            raise ConfigError('Resize: ratio_range goes with one img_scale, not with several')
        if multiscale_mode == 'range' and len(self.img_scales) > 2:
            raise ConfigError("Resize: multiscale_mode='range' takes two scales; use 'value' to draw among more")

    def _draw(self, results: Results) -> tuple[int, int]:
        if self.ratio_range is not None:
            low, high = self.ratio_range
            return scaled(self.img_scales, np.random.random_sample() * (high - low) + low, results)
        if not self.img_scales:
            raise ConfigError("Resize: needs img_scale, ratio_range or a scale from MultiScaleFlipAug around it")
        if len(self.img_scales) == 1:
            return self.img_scales[0]
        if self.multiscale_mode == 'value':
            return self.img_scales[np.random.randint(len(self.img_scales))]
        long_sides, short_sides = zip(*((max(s), min(s)) for s in self.img_scales))
        long_side = np.random.randint(min(long_sides), max(long_sides) + 1)
        return long_side, np.random.randint(min(short_sides), max(short_sides) + 1)

    def _sizes(self, height: int, width: int, scale: tuple[int, int]) -> list[tuple[int, int]]:
        """The (width, height) of each resize, in order."""
        if self.keep_ratio:
            factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
            sizes = [(int(width * factor + 0.5), int(height * factor + 0.5))]
        else:
            sizes = [scale]
        if self.size_divisor:
            sizes.append((_align(sizes[0][0], self.size_divisor), _align(sizes[0][1], self.size_divisor)))
        return sizes

    def apply(self, results: Results) -> Results:
        """Resizes; writes ``scale``, ``scale_factor`` (w, h, w, h), ``img_shape`` and ``pad_shape``."""
        if 'scale' not in results:
            results['scale'] = self._draw(results)
        height, width = last_frame(results['img']).shape[:2]
        for size in self._sizes(height, width, results['scale']):
            resize = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_LINEAR)
            map_clip(results, resize, methodcaller('resize', *size))
        shape = last_frame(results['img']).shape
        factors = (shape[1] / width, shape[0] / height)
        results.update(
            img_shape=shape, pad_shape=shape, keep_ratio=self.keep_ratio,
            scale_factor=np.array(factors * 2, dtype=np.float32))
        return results


@PIPELINES.register_module(name=['AlignedResize', 'AlignedResize_clips'])
@retired(process_clips=())
class AlignedResize(Resize):
    """:class:`Resize` to a multiple of ``size_divisor`` 32, the backbone's last stride (SegFormer's test resize)."""

    def __init__(
            self, img_scale: Scales = None, multiscale_mode: Mode = 'range',
            ratio_range: tuple[Weight, Weight] | None = None,
            keep_ratio: bool = True, size_divisor: Count = 32):
        super().__init__(img_scale, multiscale_mode, ratio_range, keep_ratio, size_divisor)


@PIPELINES.register_module(name=['RandomCrop', 'RandomCrop_clips'])
@retired(ignore_index=(VOID,))
class RandomCrop(Transform):
    """Cuts one random window out of all frames of a clip.

    With ``cat_max_ratio`` < 1 the window is drawn anew, up to ten times, until the last frame shows at least two labels
    in it and none of them on ``cat_max_ratio`` or more of its labelled pixels.

    Args:
        crop_size: (height, width); a side larger than the frame's keeps the frame's.
        cat_max_ratio: largest share of one label.
    """

    def __init__(self, crop_size: tuple[Count, Count], cat_max_ratio: float = 1.0):
        self.height, self.width = crop_size
        self.cat_max_ratio = cat_max_ratio

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        top = np.random.randint(max(height - self.height, 0) + 1)
        left = np.random.randint(max(width - self.width, 0) + 1)
        return top, left, self.height, self.width

    def _is_mixed(self, label: np.ndarray) -> bool:
        counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        counts[[VOID, UNKNOWN]] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio)

    def apply(self, results: Results) -> Results:
        """Crops; writes ``img_shape``."""
        height, width = last_frame(results['img']).shape[:2]
        box = self._draw(height, width)
        if self.cat_max_ratio < 1 and 'gt_semantic_seg' in results:
            label = LabelView.of(last_frame(results['gt_semantic_seg']))
            for _ in range(_CROP_REDRAWS):
                if self._is_mixed(label.crop(*box).array()):
                    break
                box = self._draw(height, width)
        rows, columns = (slice(start, start + size) for start, size in zip(box[:2], box[2:]))
        map_clip(results, lambda image: image[rows, columns], methodcaller('crop', *box))
        results['img_shape'] = last_frame(results['img']).shape
        return results


@PIPELINES.register_module(name=['RandomFlip', 'RandomFlip_clips'])
class RandomFlip(Transform):
    """Mirrors all frames of a clip, or none.

    ``results['flip']`` and ``['flip_direction']`` decide where a test-time augmentation set them; otherwise one draw
    does.

    Args:
        prob: probability of a flip.
        direction: ``'horizontal'`` or ``'vertical'``.
    """

    def __init__(self, prob: Share | None = None, direction: Direction = 'horizontal'):
        self.prob = prob
        self.direction = direction

    def apply(self, results: Results) -> Results:
        """Flips; writes ``flip`` and ``flip_direction``."""
        if 'flip' not in results:
            if self.prob is None:
                raise ConfigError('RandomFlip: needs prob where no MultiScaleFlipAug decides')
            results['flip'] = bool(np.random.rand() < self.prob)
        direction = results.setdefault('flip_direction', self.direction)
        if results['flip']:
            code = 1 if direction == 'horizontal' else 0
            map_clip(results, lambda image: cv2.flip(image, code), methodcaller('flip', direction))
        return results


@PIPELINES.register_module(name=['Pad', 'Pad_clips'])
class Pad(Transform):
    """Pads frames and label maps at the bottom and the right.

    Args:
        size: (height, width) to reach.
        size_divisor: instead of ``size``: reach the next multiple of it.
        pad_val: value for frames.
        seg_pad_val: value for label maps; a frame without labels stays without any (254).
    """

    def __init__(
            self, size: tuple[Count, Count] | None = None, size_divisor: Count | None = None, pad_val: float = 0,
            seg_pad_val: Label = VOID):
        if (size is None) == (size_divisor is None):
            raise ConfigError('Pad: give either size or size_divisor')
        self.size = size
        self.size_divisor = size_divisor
        self.pad_val = pad_val
        self.seg_pad_val = seg_pad_val

    def apply(self, results: Results) -> Results:
        """Pads; writes ``pad_shape``, ``pad_fixed_size`` and ``pad_size_divisor``."""
        height, width = last_frame(results['img']).shape[:2]
        if self.size_divisor is not None:
            target = _align(height, self.size_divisor), _align(width, self.size_divisor)
        else:
            assert self.size is not None
            target = self.size
        bottom, right = target[0] - height, target[1] - width
        if min(bottom, right) < 0:
            raise ConfigError(f'Pad: size {tuple(target)} is smaller than the frame, {(height, width)}; crop before it')
        if bottom or right:
            pad = partial(
                cv2.copyMakeBorder, top=0, bottom=bottom, left=0, right=right, borderType=cv2.BORDER_CONSTANT)
            map_clip(results, partial(pad, value=[self.pad_val] * 3), lambda label: self._padded(label.array(), pad))
        results.update(
            pad_shape=last_frame(results['img']).shape, pad_fixed_size=self.size,
            pad_size_divisor=self.size_divisor)
        return results

    def _padded(self, label: np.ndarray, pad: Callable[..., np.ndarray]) -> np.ndarray:
        unlabelled = label.flat[0] == UNKNOWN and (label == UNKNOWN).all()
        return pad(label, value=[UNKNOWN if unlabelled else self.seg_pad_val])
