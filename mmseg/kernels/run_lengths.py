"""The native form of the window counts: run lengths of all pixels in one pass of compiled code over each frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmseg.kernels.library import cpu_library
from mmseg.utils.images import as_label_map


def longest_run(lengths: Sequence[int]) -> int:
    """Comparisons with the frame before in the longest of some windows.

    Raises:
        ValueError: a window of fewer than 2 frames.
    """
    if any(n < 2 for n in lengths):
        raise ValueError(f'windows need at least 2 frames, got lengths {list(lengths)}')
    return max(lengths, default=2) - 1


class RunLengths:
    """For each pixel, for how long the ground truth, and both maps, have stayed the same; counts of what follows.

    Memory is two bits per pixel for every binary digit of the longest window, whatever the length of the video.

    Args:
        lengths: the window lengths n that will be asked for, each at least 2.

    Raises:
        BuildError: there is no native library.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.frames = 0
        self.lengths = tuple(lengths)
        self._planes = longest_run(lengths).bit_length()
        cpu_library()
        import torch  # here, so that the metrics start without it

        from mmseg.kernels.torch_ops import ops

        self._tensor, self._extend_runs = torch.from_numpy, ops.extend_runs.default
        self._runs = np.zeros((0, 0), np.uint8)
        self._previous: tuple[np.ndarray, np.ndarray] | None = None
        self._counts: dict[int, tuple[int, int]] = {}

    def push(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Takes the next frame of the video; both maps are uint8 [H, W] and are kept.

        Raises:
            ValueError: the maps are of another size than each other or the frame before.
        """
        gt, pred = (
            labels if labels.flags.writeable else labels.copy()  # torch warns of arrays that nobody may write
            for labels in (as_label_map(gt, 'ground truth'), as_label_map(pred, 'prediction'))
        )
        before = self._previous or (gt, pred)
        if not gt.shape == pred.shape == before[0].shape:
            raise ValueError(f'expected maps of one size, got {gt.shape} and {pred.shape} after {before[0].shape}')
        if self._previous is None:
            self._runs = np.zeros((-(-gt.size // 512), 128 * self._planes), np.uint8)
        else:
            tensors = map(self._tensor, (gt, before[0], pred, before[1], self._runs))
            counts = self._extend_runs(*tensors, [n - 1 for n in self.lengths])
            self._counts = dict(zip(self.lengths, map(tuple, counts.tolist())))
        self._previous = gt, pred
        self.frames += 1

    def count(self, n: int) -> tuple[int, int] | None:
        """Pixels constant in both maps, and in the ground truth, over the window of n frames that ends here.

        None while fewer than n frames have come.
        """
        return self._counts[n] if self.frames >= n else None

