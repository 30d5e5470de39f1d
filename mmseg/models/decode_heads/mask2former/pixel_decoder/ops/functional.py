"""The two public functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .pytorch import ms_deform_attn_fused_pytorch, ms_deform_attn_pytorch

SpatialShapes = Tensor | Sequence[tuple[int, int]]


def _shape_list(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(h, w) for h, w in pairs]


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: [N, S, M, D], the levels' pixels one after the other.
        spatial_shapes: [L, 2] integers (h, w); a list avoids the copy from the device.
        sampling_locations: [N, Q, M, L, P, 2], (x, y), 0..1 from edge to edge of the map.
        attention_weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M * D].
    """
    return ms_deform_attn_pytorch(value, _shape_list(spatial_shapes), sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Multi-scale deformable attention from raw offsets and logits.

    Args:
        value: [N, S, M, D].
        spatial_shapes: [L, 2] integers (h, w); a list avoids the copy from the device.
        reference_points: [N or 1, Q, L, 2], (x, y), 0..1.
        sampling_offsets: [N, Q, M, L, P, 2], (x, y) in pixels of the level.
        attention_logits: [N, Q, M, L * P], before the softmax.

    Returns:
        [N, Q, M * D].
    """
    return ms_deform_attn_fused_pytorch(
        value, _shape_list(spatial_shapes), reference_points, sampling_offsets, attention_logits
    )
