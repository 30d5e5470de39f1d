"""Video consistency (VC) over sliding windows, in one pass over the frames.

VC is the measure of VSPW (Miao et al., CVPR 2021): of the pixels whose ground truth stays the same over n frames, the
share whose prediction stays the same as well.  A pixel is constant over n frames when its n - 1 comparisons with the
frame before all hold.

There are two forms, equal to the bit.  The native one (:mod:`.run_lengths`) counts for how long each pixel has stayed
the same.  The NumPy one serves where there is no compiler, and whoever asks for the pixels themselves.  It keeps the
comparisons as bit maps (64 pixels a word); the conjunction over a run of m of them is built by doubling: a run of 2p is
two runs of p, and any m is covered by two overlapping runs of a power of two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmseg.kernels import run_lengths
from mmseg.kernels.library import BuildError


class ConstantRuns:
    """For each pixel, whether ground truth and prediction were constant over the last n frames.

    Memory is that of about ``4 * max(lengths)`` bit maps, whatever the length of the video.

    Args:
        lengths: the window lengths n that will be asked for, each at least 2.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        longest = run_lengths.longest_run(lengths)
        self.frames = 0
        self._previous: tuple[np.ndarray, np.ndarray] | None = None
        # _runs[k]: conjunctions of 2**k comparisons, newest last; bit maps [2 (gt, prediction), words]
        self._runs: list[deque[np.ndarray]] = [deque(maxlen=2**k + 1) for k in range(longest.bit_length())]

    def push(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Takes the next frame of the video; both maps are uint8 [H, W] and are kept, not copied."""
        if self._previous is not None:
            bits = _pack(gt == self._previous[0], pred == self._previous[1])
            for k, runs in enumerate(self._runs):
                runs.append(bits)
                half = 1 << k
                if len(runs) <= half:
                    break
                bits = bits & runs[-1 - half]
        self._previous = gt, pred
        self.frames += 1

    def constant(self, n: int) -> np.ndarray | None:
        """Bit maps uint64 [2 (ground truth, prediction), words] for the window of n frames that ends here.

        None while fewer than n frames have come.
        """
        if self.frames < n:
            return None
        k = (n - 1).bit_length() - 1
        runs = self._runs[k]
        overlap = n - 1 - (1 << k)
        return runs[-1] & runs[-1 - overlap] if overlap else runs[-1]

    def count(self, n: int) -> tuple[int, int] | None:
        """Pixels constant in both maps, and in the ground truth, over the window of n frames that ends here.

        None while fewer than n frames have come.
        """
        bits = self.constant(n)
        return None if bits is None else count_constant(bits)


def _pack(*maps: np.ndarray) -> np.ndarray:
    """Bool maps of equal size as bit maps uint64 [len(maps), words]; bits beyond the last pixel are 0."""
    used = -(-maps[0].size // 8)
    packed = np.zeros((len(maps), -(-used // 8) * 8), np.uint8)
    for row, flags in zip(packed, maps):
        row[:used] = np.packbits(flags)
    return packed.view(np.uint64)


def unpack(bits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The bool map [H, W] of one bit map of :meth:`ConstantRuns.constant`."""
    return np.unpackbits(bits.view(np.uint8), count=shape[0] * shape[1]).view(bool).reshape(shape)


def count_constant(bits: np.ndarray) -> tuple[int, int]:
    """Pixels of a window that are constant in both maps, and pixels constant in the ground truth."""
    both = np.bitwise_count(bits[0] & bits[1]).sum(dtype=np.int64)
    return int(both), int(np.bitwise_count(bits[0]).sum(dtype=np.int64))


class _Runs(Protocol):
    """What both forms have in common."""

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
        self.runs = _fastest_runs(self.lengths) if native else ConstantRuns(self.lengths)
        self._held: list[tuple[int, int, int]] = []

    def push(self, gt: np.ndarray, pred: np.ndarray) -> list[tuple[int, int, int]]:
        """Takes the next frame; returns (n, pixels constant in both, pixels constant in the ground truth) per window.

        A window is given out when its end is known not to be the last frame; :meth:`close` gives the rest.  Both maps
        are uint8 [H, W] and are kept, not copied.
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
    """The native form, or where there is none the other: the counts are the same, so nobody need be told."""
    try:
        return run_lengths.RunLengths(lengths)
    except BuildError:
        return ConstantRuns(lengths)
