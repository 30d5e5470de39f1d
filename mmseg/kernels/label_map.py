"""From scores at stride 4 to label maps, without a score map at full resolution.

A bilinear resize is linear and separable: rows and columns are each multiplied by a small matrix.  So a chain of
resizes is one matrix per axis, and so is the averaging of overlapping windows.  The product is made tile by tile, each
tile is reduced to labels while it is in the cache, and only the labels are kept.  The result is that of resizing step
by step and taking the argmax, up to the rounding of the products.

There are two forms, equal up to rounding.  The native op is for single views on the CPU: it skips the weights that are
zero, and keeps scores and argmax in registers.  The PyTorch form is for several views, for other devices, and for
machines without a compiler.  Both take scores that are NaN or beyond 1e38 for 1e38, and those
below -1e38 for -1e38, so that they spoil no pixel but their own, where a NaN wins as in ``argmax``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg.kernels import library
from mmseg.kernels.torch_ops import ops

_CPU_TILE = (32, 2**18)  # rows, scores: 1 MB of them stays in a second-level cache
_GPU_TILE = (128, 2**26)
_MIN_COLUMNS = 64
_LIMIT = 1e38  # sums of scores within it are finite; that of label_map_kernel.cpp


@dataclass
class ScoreView:
    """Scores of one view of some frames, and how they reach the size of the label maps.

    Attributes:
        scores: ``[N, K, h, w]``.
        rows: float32 ``[h, H]``: weight of each row of the scores in each row of the labels.
        columns: float32 ``[w, W]``.
    """

    scores: Tensor
    rows: Tensor
    columns: Tensor


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def resize_matrix(*sizes: int) -> Tensor:
    """Bilinear resizes (``align_corners=False``) of one axis from ``sizes[0]`` over each size to the last, in sequence.

    Returns:
        float32 ``[sizes[0], sizes[-1]]`` on the CPU, shared between calls: do not write to it.
    """
    matrix = torch.eye(sizes[0], device='cpu')[None]
    for size in sizes[1:]:
        matrix = F.interpolate(matrix, size=size, mode='linear', align_corners=False)
    return matrix[0]


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Where the windows of one axis begin: every ``stride``, the last one moved back to end at ``size``."""
    last = max(size - crop, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def window_matrix(size: int, crop: int, starts: Sequence[int], length: int) -> Tensor:
    """Averages overlapping windows on one axis.

    Args:
        size: of the axis.
        crop: pixels of a window (fewer where the axis is shorter).
        starts: its first pixel, for each window.
        length: scores of a window.

    Returns:
        float32 ``[len(starts) * length, size]``: weight of each score, windows one after the other, in each pixel.
    """
    crop = min(crop, size)
    matrix = torch.zeros(len(starts), length, size, device='cpu')
    for window, start in zip(matrix, starts):
        window[:, start : start + crop] = resize_matrix(length, crop)
    count = matrix.any(dim=1).sum(dim=0)
    return (matrix / count).flatten(0, 1)


def label_map(views: Sequence[ScoreView]) -> Tensor:
    """Most probable class of every pixel; with several views, by the mean of their softmaxed scores.

    Args:
        views: of the same frames, with the same classes and the same size of labels; 1 to 255 classes.

    Returns:
        uint8 ``[N, H, W]``; of equal scores the first class.

    Raises:
        ValueError: too many classes, or matrices of another size than the scores.
    """
    for view in views:
        if not 0 < view.scores.shape[1] < 256:
            raise ValueError(f'label maps are uint8 and hold 1 to 255 classes, got {view.scores.shape[1]}')
        if view.scores.shape[2:] != (len(view.rows), len(view.columns)):
            raise ValueError(
                f'scores {list(view.scores.shape)} do not fit matrices for {len(view.rows)} rows and '
                f'{len(view.columns)} columns')
    first = views[0]
    if len(views) == 1 and first.scores.device.type == 'cpu' and library.usable('cpu'):
        return ops.label_map(first.scores.detach(), first.rows, first.columns)
    return _label_map(views)


@torch.no_grad()
def _label_map(views: Sequence[ScoreView]) -> Tensor:
    """The PyTorch form."""
    first = views[0]
    size = (len(first.scores), first.rows.shape[1], first.columns.shape[1])
    labels = torch.empty(size, dtype=torch.uint8, device=first.scores.device)
    tiles = [_Tiles(view) for view in views]
    with torch.autocast(first.scores.device.type, enabled=False):
        for frame, out in enumerate(labels):
            for view in tiles:
                view.start(frame)
            _label_frame(tiles, out)
    return labels


def _label_frame(views: Sequence[_Tiles], out: Tensor) -> None:
    width = views[0].width
    for i, band in enumerate(out.split(views[0].height)):
        for left, tile in zip(range(0, band.shape[1], width), band.split(width, dim=1)):
            parts = [view.values(i, left, tile.shape[1]) for view in views]
            if len(parts) > 1:
                parts = [torch.stack([part.softmax(dim=1) for part in parts]).sum(dim=0)]
            tile.copy_(_argmax(parts[0]))


class _Tiles:
    """A view at the size of the labels, frame by frame and tile by tile, in memory that is used again."""

    def __init__(self, view: ScoreView) -> None:
        device = view.scores.device
        self.view = view
        self.height, budget = _CPU_TILE if device.type == 'cpu' else _GPU_TILE
        self.width = max(budget // (self.height * view.scores.shape[1]) // _MIN_COLUMNS, 1) * _MIN_COLUMNS
        self.bands = [_used(rows) for rows in view.rows.split(self.height, dim=1)]
        self.strips: dict[tuple[int, int], tuple[int, int]] = {}
        self.rows, self.columns = _on_device(view.rows, device).T, _on_device(view.columns, device)
        self.wide, self.full = torch.empty(0, device=device), torch.empty(0, device=device)

    def start(self, frame: int) -> None:
        """Goes to the first tile of a frame."""
        scores = self.view.scores[frame].transpose(0, 1)  # [h, K, w]: a band of rows is one block of memory
        copy = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).copy_(scores)
        self.scores = copy.nan_to_num_(_LIMIT).clamp_(-_LIMIT, _LIMIT)

    def values(self, i: int, start: int, width: int) -> Tensor:
        """Scores of ``width`` columns from ``start`` on in band ``i``, ``[rows, K, width]``, until the next call."""
        top, bottom = self.bands[i]
        if (start, width) not in self.strips:
            self.strips[start, width] = _used(self.view.columns[:, start : start + width])
        left, right = self.strips[start, width]
        columns = self.columns[left:right, start : start + width]
        rows = self.rows[i * self.height : (i + 1) * self.height, top:bottom]
        source = self.scores[top:bottom, :, left:right]
        # An emptied ``out`` keeps its memory; new pages for every tile would cost as much as the products.
        torch.mm(source.flatten(0, 1), columns, out=self.wide.resize_(0))
        torch.mm(rows, self.wide.view(len(source), -1), out=self.full.resize_(0))
        return self.full.view(len(rows), -1, width)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _on_device(matrix: Tensor, device: torch.device) -> Tensor:
    """The matrix on the model's device.

    Those of :func:`resize_matrix` are the same tensors in every call (tensors are told apart by identity), so a GPU
    gets them once: a copy in every call would make the host wait, and could not be part of a CUDA graph.
    """
    return matrix.to(device)


def _used(weights: Tensor) -> tuple[int, int]:
    """First and last + 1 row of ``weights`` that is not all zero."""
    rows = weights.any(dim=1).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]) + 1


def _argmax(values: Tensor) -> Tensor:
    """``values.argmax(dim=1)`` of ``[R, K, C]``.

    On the CPU through max pooling over K, whose channels-last kernel runs along C in vector registers and keeps the
    first of equal values: five times as fast.
    """
    if values.device.type != 'cpu':
        return values.argmax(dim=1)
    columns = values.unsqueeze(2).permute(0, 3, 1, 2)
    return F.max_pool2d(columns, (values.shape[1], 1), return_indices=True)[1][:, :, 0, 0]
