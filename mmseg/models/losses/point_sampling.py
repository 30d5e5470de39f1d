"""Random points on masks: where matching and mask losses look.

A mask loss on a few thousand points costs a fraction of one on every pixel, and trains as well when most of the points
lie where the mask is undecided (PointRend, arXiv 1912.08193; used so by Mask2Former, arXiv 2112.01527).  Points are
(x, y) in [0, 1), relative to the size of the map: the same points address a stride-4 prediction and a full-size label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg.kernels.layers import smallest
from mmseg.utils.seed import uniform


def random_points(rows: int, n: int, device: torch.device | str) -> Tensor:
    """Uniform points, float32 ``[rows, n, 2]`` in [0, 1).

    Every random point of matching and losses comes from here, looked up in this module at call time, so that a test (or
    a comparison with another implementation) can replace the function.
    """
    return uniform(rows, n, 2, device=device)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at points, zero outside (``align_corners=False``).

    Args:
        maps: float ``[R, C, h, w]``.
        points: float ``[R, N, 2]`` or ``[1, N, 2]`` (the same for all maps), (x, y) relative to the map's size.

    Returns:
        float ``[R, C, N]``.
    """
    grid = (2.0 * points).sub_(1.0)[:, :, None].expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, align_corners=False).squeeze(3)


def pixels_of(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of the pixel in which each point lies, int64 ``[...]``; points ``[..., 2]``."""
    column, row = points.unbind(-1)
    return (row * height).long().clamp_(max=height - 1), (column * width).long().clamp_(max=width - 1)


def sample_features(maps: Tensor, points: Tensor) -> list[Tensor]:
    """What :func:`sample_points` gives for many channels, one point after the other; without a gradient for points.

    Each point is a weighted sum of the rows of its four pixels, so a row is read at once.

    Args:
        maps: float32 ``[T, C, h, w]``; other layouts than channels-last are copied.
        points: float32 ``[P, 2]``, (x, y) relative to the map's size, the same for all maps.

    Returns:
        Of each map float32 ``[P, C]``: together they would be a copy of all.
    """
    height, width = maps.shape[2:]
    place = points * points.new_tensor([width, height]) - 0.5
    first = place.floor()
    corners = first[:, None] + first.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # [P, 4, 2]
    weights = (1 - (place[:, None] - corners).abs()).prod(2)
    limits = corners.new_tensor([width - 1, height - 1])
    inside = ((corners >= 0) & (corners <= limits)).all(2)
    pixel = corners.clamp(corners.new_zeros(2), limits).int()
    index = pixel[..., 1] * width + pixel[..., 0]
    rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
    weights = weights * inside
    return [F.embedding_bag(index, frame, mode='sum', per_sample_weights=weights) for frame in rows]


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points for a mask loss: most where the prediction is least certain, the rest anywhere.

    ``int(oversample_ratio * num_points)`` points are drawn; the ``int(importance_ratio * num_points)`` of them with the
    smallest absolute logit are kept, and a second draw fills up.

    Args:
        logits: float ``[R, h, w]``, one mask a row.
        num_points: points wanted a row.
        oversample_ratio: at least 1.
        importance_ratio: share of uncertain points, 0 to 1.

    Returns:
        float ``[R, num_points, 2]``.
    """
    rows, device = len(logits), logits.device
    num_uncertain = int(importance_ratio * num_points)
    candidates = random_points(rows, int(oversample_ratio * num_points), device)
    certainty = sample_points(logits[:, None], candidates)[:, 0].abs()
    kept = smallest(certainty, num_uncertain)
    points = candidates.gather(1, kept[..., None].expand(-1, -1, 2))
    if num_uncertain < num_points:
        points = torch.cat([points, random_points(rows, num_points - num_uncertain, device)], 1)
    return points
