"""What travels through a pipeline, and the base of its steps.

A pipeline passes one dict from step to step, with the keys of mmsegmentation 0.x: ``img``, ``gt_semantic_seg``,
``filename``, ``ori_shape``, ``img_shape``, ``pad_shape``, ``scale_factor``, ``flip``, ``img_norm_cfg``.  ``img`` is a
list of frames [H,W,3] and ``gt_semantic_seg`` the list of their label maps [H,W]; a bare array in their place is a clip
of one and comes back as a bare array.  So one class takes both: geometry is drawn once a clip, colour once
a frame (the idea of sam2's clip transforms).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np

Results = dict[str, Any]
Direction = Literal['horizontal', 'vertical']


@lru_cache(maxsize=64)
def _nearest(size: int, new_size: int) -> np.ndarray:
    """Index of the source pixel that OpenCV's nearest-neighbour resize shows at each of ``new_size`` positions.

    Resizing a ramp makes the table, so it holds the rule of the OpenCV at hand.
    """
    ramp = np.arange(size, dtype=np.float32)[None]
    table = cv2.resize(ramp, (new_size, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.intp)
    table.setflags(write=False)
    return table


@dataclass(frozen=True)
class LabelView:
    """A label map seen through a table of rows and a table of columns: geometry that has not touched a pixel yet.

    Nearest-neighbour resizing is separable and moves values without mixing them, so resizing, cropping and flipping are
    exact operations on the two tables, and only pixels that survive the crop are ever read.

    Attributes:
        source: [H,W] uint8.
        rows: [h] indices into the source's rows.
        cols: [w] indices into the source's columns.
    """

    source: np.ndarray
    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def of(cls, label: np.ndarray | LabelView) -> LabelView:
        """``label`` itself if it is a view, else the view that shows all of it."""
        if isinstance(label, LabelView):
            return label
        return cls(label, np.arange(label.shape[0]), np.arange(label.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is seen."""
        return len(self.rows), len(self.cols)

    def resize(self, width: int, height: int) -> LabelView:
        """As ``cv2.resize(..., interpolation=cv2.INTER_NEAREST)``."""
        rows, cols = (_nearest(n, m) for n, m in zip(self.shape, (height, width)))
        return replace(self, rows=self.rows[rows], cols=self.cols[cols])

    def crop(self, top: int, left: int, height: int, width: int) -> LabelView:
        """The window that starts at (``top``, ``left``); what lies outside the map is left out."""
        return replace(self, rows=self.rows[top:top + height], cols=self.cols[left:left + width])

    def flip(self, direction: str) -> LabelView:
        """Mirrored ``'horizontal'``-ly or ``'vertical'``-ly."""
        if direction == 'horizontal':
            return replace(self, cols=self.cols[::-1])
        return replace(self, rows=self.rows[::-1])

    def array(self) -> np.ndarray:
        """The [h,w] label map; a column is gathered as a row of the transpose, which copies whole lines."""
        rows = self.source.take(self.rows, axis=0)
        return cv2.transpose(cv2.transpose(rows).take(self.cols, axis=0))


def materialise(results: Results) -> Results:
    """Turns label views into plain arrays, in place; returns ``results``."""
    for key in results.get('seg_fields', ()):
        value = results[key]
        if isinstance(value, LabelView):
            results[key] = value.array()
        elif isinstance(value, list):
            results[key] = [v.array() if isinstance(v, LabelView) else v for v in value]
    return results


def map_frames(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of every frame of a clip, or of a bare array, which is a clip of one."""
    return [function(frame) for frame in value] if is_clip(value) else function(value)


def map_clip(results: Results, image: Callable[[np.ndarray], Any], label: Callable[[LabelView], Any]) -> None:
    """Replaces each frame of a clip by ``image(frame)``, and each label map by ``label(view of it)``."""
    results['img'] = map_frames(results['img'], image)
    for key in results.get('seg_fields', ()):
        results[key] = map_frames(results[key], lambda value: label(LabelView.of(value)))


def is_clip(value: Any) -> bool:
    """Whether ``value`` is a sequence of frames and not a bare frame."""
    return isinstance(value, Sequence)


def last_frame(value: Any) -> Any:
    """The last frame of a clip, or the bare array itself."""
    return value[-1] if is_clip(value) else value


class Transform(ABC):
    """A step of a pipeline.

    :meth:`apply` may leave labels as :class:`LabelView`; calling the object gives plain arrays.  :class:`Compose` calls
    ``apply`` on steps that derive from this class and hands plain arrays to any other callable, so a step of a user's
    own is a function from dict to dict and never meets a view.
    """

    @abstractmethod
    def apply(self, results: Results) -> Results:
        """Transforms ``results`` in place (arrays in it are replaced, not written to) and returns it."""

    def __call__(self, results: Results) -> Results:
        """:meth:`apply` on a shallow copy, with label maps as plain arrays.

        ``seg_fields`` lists the keys that hold label maps; without it they are ``gt_semantic_seg``, if there.
        """
        results = dict(results)
        results.setdefault('seg_fields', ['gt_semantic_seg'] if 'gt_semantic_seg' in results else [])
        return materialise(self.apply(results))
