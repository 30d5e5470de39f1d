"""From scores at stride 4 to label maps, without a score map at full resolution.

A bilinear resize is linear and separable: rows and columns are each multiplied by a small matrix.  So a chain of
resizes is one matrix per axis, and so is the averaging of overlapping windows.  The product is made tile by tile, each
tile is reduced to labels while it is in the cache, and only the labels are kept.  The result is that of resizing step
by step and taking the argmax, up to the rounding of the products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_TILE = (16, 128)  # rows, columns: 1 MB of scores at 124 classes, about the size of a second-level cache
_GPU_TILE = (128, 4096)


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


@torch.no_grad()
def label_map(views: Sequence[ScoreView]) -> Tensor:
    """Most probable class of every pixel; with several views, by the mean of their softmaxed scores.

    Args:
        views: of the same frames, with the same classes and the same size of labels; at most 255 classes.

    Returns:
        uint8 ``[N, H, W]``.
    """
    first = views[0]
    num, classes = first.scores.shape[:2]
    if classes > 255:
        raise ValueError(f'label maps are uint8 and hold at most 255 classes, got {classes}')
    device = first.scores.device
    labels = torch.empty(num, first.rows.shape[1], first.columns.shape[1], dtype=torch.uint8, device=device)
    with torch.autocast(device.type, enabled=False):
        for frame, out in enumerate(labels):
            _fill_labels([(v.scores[frame].float(), v.rows, v.columns) for v in views], out)
    return labels


def _fill_labels(views: Sequence[tuple[Tensor, Tensor, Tensor]], out: Tensor) -> None:
    """Writes the labels of one frame; views are (scores ``[K, h, w]``, rows, columns)."""
    tile_height, tile_width = _CPU_TILE if out.device.type == 'cpu' else _GPU_TILE
    sources = [
        (scores.transpose(0, 1).contiguous(), rows.to(out.device), columns.to(out.device),
         _spans(rows, tile_height), _spans(columns, tile_width))
        for scores, rows, columns in views
    ]
    for i, bands in enumerate(out.split(tile_height)):
        for j, tile in enumerate(bands.split(tile_width, dim=1)):
            y, x = i * tile_height, j * tile_width
            values = []
            for scores, rows, columns, row_spans, column_spans in sources:
                (top, bottom), (left, right) = row_spans[i], column_spans[j]
                band = scores[top:bottom].flatten(0, 1)[:, left:right] @ columns[left:right, x : x + tile.shape[1]]
                band = band.view(bottom - top, -1)
                values.append((rows[top:bottom, y : y + tile.shape[0]].T @ band).view(len(tile), -1, tile.shape[1]))
            if len(values) > 1:
                values = [torch.stack([value.softmax(dim=1) for value in values]).sum(dim=0)]
            tile.copy_(_argmax(values[0]))


def _spans(matrix: Tensor, step: int) -> list[tuple[int, int]]:
    """First and last + 1 row of ``matrix`` that every ``step`` columns touch."""
    used = torch.stack([block.any(dim=1) for block in matrix.split(step, dim=1)]).int()
    ends = used.shape[1] - used.flip(1).argmax(dim=1)
    return list(zip(used.argmax(dim=1).tolist(), ends.tolist()))


def _argmax(values: Tensor) -> Tensor:
    """``values.argmax(dim=1)`` of ``[R, K, C]``.

    On the CPU through max pooling over K, whose channels-last kernel runs along C in vector registers and keeps the
    first of equal values: five times as fast.
    """
    if values.device.type != 'cpu':
        return values.argmax(dim=1)
    columns = values.unsqueeze(2).permute(0, 3, 1, 2)
    return F.max_pool2d(columns, (values.shape[1], 1), return_indices=True)[1][:, :, 0, 0]
