"""Multi-scale deformable attention: one op; native where it can be, plain PyTorch everywhere else.

The formula is Deformable DETR's (Zhu et al., arXiv 2010.04159, eq. 3): ``sum over l, p of weight * bilinear(value_l,
location * size - 0.5)``, with zeros outside the map. The PyTorch forms are those that all others are checked against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmseg.kernels.torch_ops import ops, uses_native

SpatialShapes = Tensor | Sequence[Sequence[int]]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _shape_list(spatial_shapes: SpatialShapes, pixels: int) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.is_floating_point():
            raise ValueError(
                f'spatial_shapes must be [L, 2] integers, got {spatial_shapes.dtype} {list(spatial_shapes.shape)}'
            )
        spatial_shapes = spatial_shapes.tolist()
    try:
        shapes = [(h, w) for h, w in spatial_shapes]
    except (TypeError, ValueError):
        raise ValueError(f'spatial_shapes must be (h, w) pairs, got {spatial_shapes!r}') from None
    if not shapes or any(h < 1 or w < 1 for h, w in shapes):
        raise ValueError(f'spatial_shapes must hold sizes of at least 1, got {shapes}')
    total = sum(h * w for h, w in shapes)
    if total != pixels:
        raise ValueError(f'spatial_shapes {shapes} hold {total} pixels, but value has {pixels}')
    return shapes


def _check(name: str, tensor: Tensor, value: Tensor, expected: Sequence[int], layout: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f'{name} must be {layout} = {list(expected)}, got {list(tensor.shape)}')
    if tensor.dtype not in DTYPES:
        raise TypeError(f'{name} must be of a floating-point type, got {tensor.dtype}')
    if tensor.device != value.device:
        raise ValueError(f'{name} is on {tensor.device}, but value is on {value.device}')


def _check_value(
    value: Tensor, spatial_shapes: SpatialShapes, name: str, points: Tensor
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Checks `value` and `points`, whose argument is called `name`; (h, w) of the levels, and n, Q, M, L, P."""
    if value.dim() != 4:
        raise ValueError(f'value must be [N, S, M, D], got {list(value.shape)}')
    n, pixels, heads, width = value.shape
    shapes = _shape_list(spatial_shapes, pixels)
    if points.dim() != 6:
        raise ValueError(f'{name} must be [N, Q, M, L, P, 2], got {list(points.shape)}')
    if heads < 1 or width < 1:
        raise ValueError(f'value must have at least one head and one channel, got {list(value.shape)}')
    if points.shape[4] < 1:
        raise ValueError(f'{name} must hold at least one point, got {list(points.shape)}')
    sizes = n, points.shape[1], heads, len(shapes), points.shape[4]
    _check('value', value, value, value.shape, '[N, S, M, D]')
    _check(name, points, value, (*sizes, 2), '[N, Q, M, L, P, 2]')
    return shapes, sizes


@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    """Whether a device has autocast; a constant for the compiler, which could not trace the question in torch 2.11."""
    return torch.amp.is_autocast_available(device_type)


def _autocasts(device_type: str) -> bool:
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off where it is on; a device need not have it."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else contextlib.nullcontext()


def _call(
    value: Tensor, shapes: list[tuple[int, int]], reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    if uses_native(value.device.type):
        return ops.ms_deform_attn(value, [size for shape in shapes for size in shape], reference, points, weights)
    if _autocasts(value.device.type):  # the native op's autocast rule
        value, points, weights = (x if x.dtype == torch.float64 else x.float() for x in (value, points, weights))
        reference = reference if reference is None or reference.dtype == torch.float64 else reference.float()
    if reference is None:
        return ms_deform_attn_pytorch(value, shapes, points, weights)
    return ms_deform_attn_fused_pytorch(value, shapes, reference, points, weights)


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3).

    ``sum over l, p of weight * bilinear(value_l, location * size - 0.5)``, zero outside the map. A location that is
    far outside, infinite or NaN counts as outside. Sums are made in float32 (float64 for float64); inside autocast the
    inputs are cast to float32 (wrap the call in `without_autocast` to keep half precision inputs).

    Args:
        value: [N, S, M, D] float16, bfloat16, float32 or float64: the pixels of all levels, row by row, M heads.
        spatial_shapes: (h, w) of the L levels, sum of h * w = S; a tensor [L, 2] is copied to the host first.
        sampling_locations: [N, Q, M, L, P, 2], (x, y), 0..1 from edge to edge of the map.
        attention_weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M * D] of value's type.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or type; the message names it.
        BackendError: ``THEMASK_OPS_BACKEND`` names a backend that cannot serve the call.
    """
    shapes, sizes = _check_value(value, spatial_shapes, 'sampling_locations', sampling_locations)
    _check('attention_weights', attention_weights, value, sizes, '[N, Q, M, L, P]')
    return _call(value, shapes, None, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` of ``softmax(attention_logits)`` at ``reference + offset / (w, h)``, in one pass.

    Args:
        value: [N, S, M, D] as in `ms_deform_attn`.
        spatial_shapes: (h, w) of the L levels.
        reference_points: [N or 1, Q, L, 2], (x, y), 0..1.
        sampling_offsets: [N, Q, M, L, P, 2], (x, y) in pixels of the level.
        attention_logits: [N, Q, M, L * P]; the softmax runs over the last axis.

    Returns:
        [N, Q, M * D] of value's type.

    Raises:
        ValueError, TypeError, BackendError: as in `ms_deform_attn`.
    """
    shapes, sizes = _check_value(value, spatial_shapes, 'sampling_offsets', sampling_offsets)
    n, queries, heads, levels, points = sizes
    _check('attention_logits', attention_logits, value, (n, queries, heads, levels * points), '[N, Q, M, L * P]')
    items = 1 if reference_points.dim() == 4 and reference_points.shape[0] == 1 else n
    _check('reference_points', reference_points, value, (items, queries, levels, 2), '[N or 1, Q, L, 2]')
    return _call(value, shapes, reference_points, sampling_offsets, attention_logits)


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
