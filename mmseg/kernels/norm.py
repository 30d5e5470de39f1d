"""LayerNorm beside a residual sum, in both orders of a transformer's block."""

from __future__ import annotations

from torch import Tensor, nn


def pre_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The residual sum and its LayerNorm: ``s = x + branch``, ``norm(s)``.

    Args:
        norm: over the last axis.
        x: ``[..., C]``.
        branch: of the same shape; ``None``: ``s`` is ``x``.

    Returns:
        ``s``, and the LayerNorm in the type that products with it are computed in.
    """
    x = x if branch is None else x + branch
    return x, norm(x)


def post_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> Tensor:
    """The LayerNorm of the residual sum, ``norm(x + branch)``.

    Args:
        norm: over the last axis.
        x: ``[..., C]``.
        branch: of the same shape.

    Returns:
        ``[..., C]``.
    """
    return norm(x + branch)


def post_norm_and_cast(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`post_norm` for the next sum and for the next product.

    Returns:
        ``y``, and ``y`` in the type that products with it are computed in (the same tensor where that is its own).
    """
    y = norm(x + branch)
    return y, y
