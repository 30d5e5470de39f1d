"""The two public functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import uses_native
from .library import ops
from .pytorch import ms_deform_attn_fused_pytorch, ms_deform_attn_pytorch

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


def _check_points(name: str, points: Tensor, value: Tensor, levels: int) -> None:
    if value.dim() != 4:
        raise ValueError(f'value must be [N, S, M, D], got {list(value.shape)}')
    if points.dim() != 6:
        raise ValueError(f'{name} must be [N, Q, M, L, P, 2], got {list(points.shape)}')
    n, pixels, heads, width = value.shape
    if heads < 1 or width < 1:
        raise ValueError(f'value must have at least one head and one channel, got {list(value.shape)}')
    if points.shape[4] < 1:
        raise ValueError(f'{name} must hold at least one point, got {list(points.shape)}')
    _check('value', value, value, (n, pixels, heads, width), '[N, S, M, D]')
    _check(name, points, value, (n, points.shape[1], heads, levels, points.shape[4], 2), '[N, Q, M, L, P, 2]')


@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    """Whether a device has autocast; a constant for the compiler, which could not trace the question in torch 2.11."""
    return torch.amp.is_autocast_available(device_type)


def _autocasts(device_type: str) -> bool:
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off where it is on; a device need not have it."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else contextlib.nullcontext()


def _autocast(value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The native ops' autocast rule for the PyTorch form: float32 inside an autocast region."""
    tensors = (value, *others)
    if not _autocasts(value.device.type):
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


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
    shapes = _shape_list(spatial_shapes, value.shape[1]) if value.dim() == 4 else []
    _check_points('sampling_locations', sampling_locations, value, len(shapes))
    _check('attention_weights', attention_weights, value, sampling_locations.shape[:-1], '[N, Q, M, L, P]')
    if uses_native(value.device.type):
        flat = [size for shape in shapes for size in shape]
        return ops.ms_deform_attn(value, flat, sampling_locations, attention_weights)
    value, sampling_locations, attention_weights = _autocast(value, sampling_locations, attention_weights)
    return ms_deform_attn_pytorch(value, shapes, sampling_locations, attention_weights)


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
    shapes = _shape_list(spatial_shapes, value.shape[1]) if value.dim() == 4 else []
    _check_points('sampling_offsets', sampling_offsets, value, len(shapes))
    n, queries, heads, levels, points, _ = sampling_offsets.shape
    _check('attention_logits', attention_logits, value, (n, queries, heads, levels * points), '[N, Q, M, L * P]')
    items = 1 if reference_points.dim() == 4 and reference_points.shape[0] == 1 else n
    _check('reference_points', reference_points, value, (items, queries, levels, 2), '[N or 1, Q, L, 2]')
    if uses_native(value.device.type):
        flat = [size for shape in shapes for size in shape]
        return ops.ms_deform_attn_fused(value, flat, reference_points, sampling_offsets, attention_logits)
    value, reference_points, sampling_offsets, attention_logits = _autocast(
        value, reference_points, sampling_offsets, attention_logits
    )
    return ms_deform_attn_fused_pytorch(value, shapes, reference_points, sampling_offsets, attention_logits)
