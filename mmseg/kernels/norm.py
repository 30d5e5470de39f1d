"""LayerNorm beside a residual sum, in both orders of a transformer's block.

Without gradients on an x86 processor the sum, its LayerNorm and the cast that autocast would make at the next product
are one pass over memory (:func:`mmseg.kernels.cpu_native.norm`) instead of three: the same numbers, to the rounding of
a sum over channels (``python -m benchmarks.speed --part norm``).  Everywhere else they are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmseg.kernels import cpu_native
from mmseg.kernels.autocast import product_dtype


def pre_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The residual sum and its LayerNorm: ``s = x + branch``, ``norm(s)``.

    Args:
        norm: over the last axis.
        x: ``[..., C]``.
        branch: of the same shape; ``None``: ``s`` is ``x``.

    Returns:
        ``s``, and the LayerNorm in the type that products with it are computed in.
    """
    if not _native(norm, x, branch):
        x = x if branch is None else x + branch
        return x, norm(x)
    low = product_dtype(x) != x.dtype
    total, out, out_low = _call(norm, x, branch, (branch is not None, not low, low))
    return x if total is None else total, _one(out_low if low else out)


def post_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> Tensor:
    """The LayerNorm of the residual sum, ``norm(x + branch)``.

    Args:
        norm: over the last axis.
        x: ``[..., C]``.
        branch: of the same shape.

    Returns:
        ``[..., C]``.
    """
    return _post_norm(norm, x, branch, low=False)[0]


def post_norm_and_cast(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`post_norm` for the next sum and for the next product.

    Returns:
        ``y``, and ``y`` in the type that products with it are computed in (the same tensor where that is its own).
    """
    return _post_norm(norm, x, branch, low=True)


def _post_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor, low: bool) -> tuple[Tensor, Tensor]:
    if not _native(norm, x, branch):
        y = norm(x + branch)
        return y, y
    low = low and product_dtype(x) != x.dtype
    _, out, out_low = _call(norm, x, branch, (False, True, low))
    return _one(out), _one(out_low if low else out)


def _native(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and cpu_native.serves_norm(x, branch, norm.weight, norm.bias)
        and product_dtype(x) in cpu_native.DTYPES
        and cpu_native.usable()
    )


def _call(
    norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, keep: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return cpu_native.norm(x, branch, norm.weight, norm.bias, norm.eps, keep)


def _one(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
