"""Optional measures of consistency over time, beside the official VC: class-wise, as intersection over union.

They are not part of the VSPW benchmark.  Each takes the frames of a video in order and counts, per class, an
intersection and a union in pixels; a score is the mean over the classes with a non-empty union.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Protocol

import cv2
import numpy as np

from .confusion import LABELS, joint_histogram
from .video_consistency import ConstantRuns


class TemporalMeasure(Protocol):
    """A measure of one video.

    Attributes:
        areas: int64 [2, K]: intersection and union of each class so far.
    """

    areas: np.ndarray

    def push(self, gt: np.ndarray | None, pred: np.ndarray, image: np.ndarray | None) -> None:
        """Takes the next frame: labels uint8 [H, W] (void = the ignored label), picture uint8 [H, W, 3] BGR or None.

        A frame without labels has no ``gt``.
        """


class PersistentRegions:
    """VEC_n: IoU of the regions that persist over n frames.

    For each window of n frames (those of VC_n), the region of a class in the ground truth is where the ground truth is
    that class in all n frames, and likewise in the prediction.  VC_n gives every prediction that stays put full marks,
    right or wrong; here it must be the right class too, and rare classes count as much as frequent ones.  Pixels that
    are void in the window's last frame are left out.

    Args:
        n: length of a window, at least 2.
        num_classes: K, at most 254.
        ignore_index: the void label.
    """

    def __init__(self, n: int, num_classes: int, ignore_index: int) -> None:
        if num_classes > LABELS - 2:
            raise ValueError(f'VEC: at most {LABELS - 2} classes, got {num_classes}')
        self.n = n
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.areas = np.zeros((2, num_classes), np.int64)
        self._runs = ConstantRuns([n])
        self._held = np.zeros_like(self.areas)

    def push(self, gt: np.ndarray | None, pred: np.ndarray, image: np.ndarray | None = None) -> None:
        """Takes the next frame; the window that ends here counts once another frame has come (as in VC_n)."""
        self.areas += self._held
        if gt is None:  # no window holds this frame
            self._runs, self._held = ConstantRuns([self.n]), np.zeros_like(self.areas)
            return
        self._runs.push(gt, pred)
        constant = self._runs.constant(self.n)
        if constant is None:
            return
        changing, void = self.num_classes, self.num_classes + 1
        region, region_pred = np.where(constant, [gt, pred], np.uint8(changing))
        region[gt == self.ignore_index] = void
        counts = joint_histogram(region, region_pred)
        counts[void] = 0
        self._held = _areas(counts, self.num_classes)


class FlowConsistency:
    """TC: IoU between a prediction and the one before it, moved along the optical flow (Liu et al., ECCV 2020).

    The flow is OpenCV's DIS (Kroeger et al., ECCV 2016) between the frames at their size on disk, not FlowNet2 as in
    the paper, so the figures compare only with each other.  Occlusions are not masked, as in the paper.  The ground
    truth plays no part.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.areas = np.zeros((2, num_classes), np.int64)
        self._previous: tuple[np.ndarray, np.ndarray] | None = None

    def push(self, gt: np.ndarray | None, pred: np.ndarray, image: np.ndarray | None) -> None:
        """Takes the next frame."""
        if image is None:
            raise ValueError('TC follows the optical flow: it needs the frame itself beside its labels')
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        if self._previous is not None:
            flow: np.ndarray = _optical_flow().calc(grey, self._previous[0], None)  # type: ignore[call-overload]
            columns = flow[..., 0] + np.arange(grey.shape[1], dtype=np.float32)
            rows = flow[..., 1] + np.arange(grey.shape[0], dtype=np.float32)[:, None]
            outside = LABELS - 1
            moved = cv2.remap(self._previous[1], columns, rows, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT,
                              borderValue=outside)
            counts = joint_histogram(np.asarray(moved), pred)
            counts[outside] = 0
            self.areas += _areas(counts, self.areas.shape[1])
        self._previous = grey, pred


@functools.cache
def _optical_flow() -> cv2.DISOpticalFlow:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def _areas(counts: np.ndarray, num_classes: int) -> np.ndarray:
    """Intersection and union of each class, int64 [2, K], from joint counts."""
    hit = np.diag(counts)[:num_classes]
    return np.stack([hit, counts.sum(0)[:num_classes] + counts.sum(1)[:num_classes] - hit])


def mean_iou(areas: np.ndarray) -> float:
    """Mean over the classes with a non-empty union of ``areas`` [2, K]; nan where there is none."""
    hit, union = areas
    seen = union > 0
    return float((hit[seen] / union[seen]).mean()) if seen.any() else float('nan')


def temporal_measure(name: str, num_classes: int, ignore_index: int) -> Callable[[], TemporalMeasure] | None:
    """What makes the measure ``VEC<n>`` or ``TC`` for one video; None for another name."""
    window = re.fullmatch(r'VEC(\d+)', name)
    if window and int(window[1]) >= 2:
        return lambda: PersistentRegions(int(window[1]), num_classes, ignore_index)
    if name == 'TC':
        return lambda: FlowConsistency(num_classes)
    return None
