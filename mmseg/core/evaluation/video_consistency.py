"""Video consistency (VC) over sliding windows, in one pass over the frames.

VC is the measure of VSPW (Miao et al., CVPR 2021): of the pixels whose ground truth stays the same over n frames, the
share whose prediction stays the same as well.  A pixel is constant over n frames when its n - 1 comparisons with the
frame before all hold.

Two forms give the same counts.  The native one is :mod:`mmseg.kernels.run_lengths`.  The NumPy one runs where there is
no compiler, and for callers that need the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmseg.kernels import run_lengths
from mmseg.kernels.library import BuildError


class ConstantRuns:
    """For each pixel, for how many comparisons ground truth and prediction have stayed the same.

    Args:
        lengths: the window lengths n that will be asked for, each at least 2.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.frames = 0
        self._longest = run_lengths.longest_run(lengths)
        self._previous = np.zeros(0, np.uint8)
        self._runs = np.zeros(0, np.uint8)

    def push(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Takes the next frame of the video; both maps are uint8 [H, W]."""
        maps = np.stack([gt, pred])
        if not self.frames:
            self._runs = np.zeros(maps.shape, np.min_scalar_type(self._longest))
        else:
            self._runs += (self._runs < self._longest).view(np.uint8)  # NumPy is slow with bool operands
            self._runs *= (maps == self._previous).view(np.uint8)
        self._previous = maps
        self.frames += 1

    def constant(self, n: int) -> np.ndarray | None:
        """Whether each pixel was constant in the window of n frames that ends here: bool [2 (gt, prediction), H, W].

        None while fewer than n frames have come.
        """
        return self._runs >= n - 1 if self.frames >= n else None

    def count(self, n: int) -> tuple[int, int] | None:
        """Pixels constant in both maps, and in the ground truth, over the window of n frames that ends here.

        None while fewer than n frames have come.
        """
        constant = self.constant(n)
        if constant is None:
            return None
        gt, pred = constant
        return int(np.count_nonzero(gt & pred)), int(np.count_nonzero(gt))


class _Runs(Protocol):
    """What both forms do."""

    def push(self, gt: np.ndarray, pred: np.ndarray) -> None: ...

    def count(self, n: int) -> tuple[int, int] | None: ...


class WindowCounts:
    """Counts of all windows of a video, given frame by frame.

    Args:
        lengths: window lengths n.
        last_window: whether the window that ends at the last frame counts.  The official script leaves it out
            (``range(L - n)``).
        native: False keeps to the NumPy form where the native one could be had.
    """

    def __init__(self, lengths: Sequence[int], last_window: bool = False, native: bool = True) -> None:
        self.lengths = tuple(lengths)
        self.last_window = last_window
        self._native = native
        self.runs = self._none()
        self._held: list[tuple[int, int, int]] = []

    def _none(self) -> _Runs:
        return _fastest_runs(self.lengths) if self._native else ConstantRuns(self.lengths)

    def gap(self) -> list[tuple[int, int, int]]:
        """As :meth:`push`, for a frame without labels, which no window may hold."""
        ready, self._held = self._held, []
        self.runs = self._none()
        return ready

    def push(self, gt: np.ndarray, pred: np.ndarray) -> list[tuple[int, int, int]]:
        """Takes the next frame; returns (n, pixels constant in both, pixels constant in the ground truth) per window.

        A window is given out when its end is known not to be the last frame; :meth:`close` gives the rest.  Both maps
        are uint8 [H, W] and must not change afterwards.
        """
        ready = self._held
        self.runs.push(gt, pred)
        counts = ((n, self.runs.count(n)) for n in self.lengths)
        self._held = [(n, *count) for n, count in counts if count is not None]
        return ready

    def close(self) -> list[tuple[int, int, int]]:
        """The windows that end at the last frame, if they count."""
        return self._held if self.last_window else []


def _fastest_runs(lengths: Sequence[int]) -> _Runs:
    """The native form where it can be built; its counts are the same, so nothing is said where it cannot."""
    try:
        return run_lengths.RunLengths(lengths)
    except BuildError:
        return ConstantRuns(lengths)
