"""MSDeformAttn in plain PyTorch: the form every other backend is checked against, and the one that always works.

The formula is Deformable DETR's (Zhu et al., arXiv 2010.04159, eq. 3): ``sum over l, p of weight * bilinear(value_l,
location * size - 0.5)``, with zeros outside the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are made in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ms_deform_attn_pytorch(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample `value` at the locations and sum the samples by weight; shapes as in `ms_deform_attn`."""
    n, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    dtype = arithmetic_dtype(value.dtype)
    # Nothing is sampled beyond half a pixel outside [0, 1]. Pulling such locations (and NaN and infinities, which
    # fail the comparison) to -1 keeps grid_sample away from undefined float-to-int casts and NaN gradients.
    locations = sampling_locations.to(dtype)
    locations = torch.where((locations > -1) & (locations < 2), locations, -1.0)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, N*M, Q, P, 2]
    weights = attention_weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # [L, N*M, 1, Q, P]

    out = value.new_zeros((n * heads, width, queries), dtype=dtype)
    levels = value.to(dtype).split([h * w for h, w in spatial_shapes], dim=1)
    for (h, w), level, grid, weight in zip(spatial_shapes, levels, grids, weights):
        image = level.permute(0, 2, 3, 1).reshape(n * heads, width, h, w)
        sampled = F.grid_sample(image, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        out = out + (sampled * weight).sum(-1)
    return out.view(n, heads * width, queries).transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_fused_pytorch(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Softmax and location arithmetic, then `ms_deform_attn_pytorch`; shapes as in `ms_deform_attn_fused`."""
    dtype = arithmetic_dtype(value.dtype)
    # Filled on the device: a copy from the host would wait for it, and a CUDA graph could not hold it.
    sizes = torch.cat([value.new_full((1, 1), size, dtype=dtype) for h, w in spatial_shapes for size in (w, h)])
    sizes = sizes.view(-1, 2)
    locations = reference_points.to(dtype)[:, :, None, :, None] + sampling_offsets.to(dtype) / sizes[:, None]
    weights = attention_logits.to(dtype).softmax(-1).view(sampling_offsets.shape[:-1])
    return ms_deform_attn_pytorch(value, spatial_shapes, locations, weights)
