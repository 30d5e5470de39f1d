"""Colour: distortion for training and normalisation, as tables over the 256 values of a byte.

Every step of the distortion works on bytes: it takes a byte to float32, clips to 0..255 and truncates back.  So a step
is a table of 256 bytes, made with that very arithmetic, and looking bytes up in it gives the same result bit for bit;
neighbouring steps are one table.  Only the turns to HSV and back (OpenCV's 8-bit rounding) lie between.
"""

from __future__ import annotations

import cv2
import numpy as np

from mmseg.registry import PIPELINES
from mmseg.utils.arguments import Weight
from mmseg.utils.errors import ConfigError

from .transform import Results, Transform, map_frames

_BYTES = np.arange(256, dtype=np.uint8)
_HUES = 180  # OpenCV stores a hue in half degrees


def _linear_table(factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Table [256] of uint8(clip(x * factor + offset, 0, 255)) in float32, truncated."""
    values = _BYTES.astype(np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


def _in_hsv(image: np.ndarray, hue: np.ndarray | None = None, saturation: np.ndarray | None = None) -> np.ndarray:
    """Turns to HSV, looks hue and saturation up, and turns back."""
    tables = np.stack([_BYTES if hue is None else hue, _BYTES if saturation is None else saturation, _BYTES], -1)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


@PIPELINES.register_module(name=['PhotoMetricDistortion', 'PhotoMetricDistortion_clips'])
class PhotoMetricDistortion(Transform):
    """Random brightness, contrast, saturation and hue, each with probability 0.5 (the SSD recipe).

    Contrast comes right after brightness or last, at random.  Frames must be uint8 BGR.

    Args:
        brightness_delta: brightness changes by -delta..delta.
        contrast_range: (low, high) of the contrast factor.
        saturation_range: (low, high) of the saturation factor.
        hue_delta: hue turns by -delta..delta-1 half degrees.
        per_clip: draw once a clip, not once a frame.
    """

    def __init__(
            self, brightness_delta: float = 32, contrast_range: tuple[Weight, Weight] = (0.5, 1.5),
            saturation_range: tuple[Weight, Weight] = (0.5, 1.5), hue_delta: int = 18, per_clip: bool = False):
        self.brightness_delta = brightness_delta
        self.contrast_low, self.contrast_high = contrast_range
        self.saturation_low, self.saturation_high = saturation_range
        self.hue_delta = hue_delta
        self.per_clip = per_clip

    def _contrast(self) -> np.ndarray | None:
        if np.random.randint(2):
            return _linear_table(factor=np.random.uniform(self.contrast_low, self.contrast_high))
        return None

    def draw(self) -> tuple[np.ndarray | None, ...]:
        """Draws one distortion: tables for (values before HSV, saturation, hue, values after HSV), ``None`` = none."""
        before = after = saturation = hue = None
        if np.random.randint(2):
            before = _linear_table(offset=np.random.uniform(-self.brightness_delta, self.brightness_delta))
        contrast_first = np.random.randint(2) == 1
        if contrast_first:
            contrast = self._contrast()
            if contrast is not None:
                before = contrast if before is None else contrast[before]
        if np.random.randint(2):
            saturation = _linear_table(factor=np.random.uniform(self.saturation_low, self.saturation_high))
        if np.random.randint(2):
            turn = np.random.randint(-self.hue_delta, self.hue_delta)
            hue = ((_BYTES.astype(int) + turn) % _HUES).astype(np.uint8)
        if not contrast_first:
            after = self._contrast()
        return before, saturation, hue, after

    @staticmethod
    def distort(image: np.ndarray, tables: tuple[np.ndarray | None, ...]) -> np.ndarray:
        """Applies drawn tables to one frame; two turns through HSV where saturation and hue both change.

        OpenCV's 8-bit HSV loses up to a few grey levels each way, so one turn would not give the recorded numbers.
        """
        before, saturation, hue, after = tables
        if image.dtype != np.uint8:
            raise ConfigError(
                f'PhotoMetricDistortion: works on uint8 frames, got {image.dtype}; put it before Normalize')
        if before is not None:
            image = cv2.LUT(image, before)
        if saturation is not None:
            image = _in_hsv(image, saturation=saturation)
        if hue is not None:
            image = _in_hsv(image, hue=hue)
        return image if after is None else cv2.LUT(image, after)

    def apply(self, results: Results) -> Results:
        """Distorts every frame by a draw of its own, or all by one."""
        shared = self.draw() if self.per_clip else None
        results['img'] = map_frames(
            results['img'], lambda image: self.distort(image, self.draw() if shared is None else shared))
        return results


@PIPELINES.register_module(name=['Normalize', 'Normalize_clips'])
class Normalize(Transform):
    """(value - mean) / std per channel, in float32, with BGR turned to RGB first.

    In a config ``mean`` and ``std`` are left out: :func:`mmseg.config.load_config` takes them from the backbone.

    Args:
        mean: per channel, in the order after the turn.
        std: likewise.
        to_rgb: turn BGR to RGB.
    """

    def __init__(
            self, mean: tuple[float, float, float] | None = None, std: tuple[float, float, float] | None = None,
            to_rgb: bool = True):
        if mean is None or std is None:
            raise ConfigError('Normalize: mean and std are missing; load_config takes them from the backbone, other '
                              'programs give them')
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.array(std, dtype=np.float32)
        self.to_rgb = to_rgb
        if (self.std <= 0).any():
            raise ConfigError(f'Normalize: needs three means and three positive deviations, got {mean} and {std}')
        table = self._normalize(np.repeat(_BYTES[:, None], 3, axis=1).astype(np.float32))
        self.table = table[None]  # [1,256,3], channels in output order

    def _normalize(self, values: np.ndarray) -> np.ndarray:
        """The plain arithmetic on float32 values [...,3] in output order."""
        difference = (values.astype(np.float64) - self.mean).astype(np.float32)
        return (difference * (1 / self.std.astype(np.float64))).astype(np.float32)

    def _frame(self, image: np.ndarray) -> np.ndarray:
        if self.to_rgb:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return cv2.LUT(image, self.table) if image.dtype == np.uint8 else self._normalize(image)

    def apply(self, results: Results) -> Results:
        """Normalises; writes ``img_norm_cfg``."""
        results['img'] = map_frames(results['img'], self._frame)
        results['img_norm_cfg'] = dict(mean=self.mean, std=self.std, to_rgb=self.to_rgb)
        return results
