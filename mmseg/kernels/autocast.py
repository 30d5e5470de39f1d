"""What autocast does to the inputs of products, for code that chooses kernels or casts early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_Casts = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]  # by id: a weight and its cast
_casts: ContextVar[_Casts | None] = ContextVar('casts of weights', default=None)


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which has the products, takes ``dtype`` on this processor; PyTorch's own form is slow."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    name = 'bf16' if dtype == torch.bfloat16 else 'fp16'
    return bool(getattr(torch.ops.mkldnn, f'_is_mkldnn_{name}_supported')())


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in: autocast casts float32."""
    device = x.device.type
    cast = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """``x`` as autocast casts it, for those whose several linear layers would each cast it anew; without gradients.

    With gradients ``x`` stays as it is, so that what comes back from the layers is summed in float32.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.amp.is_autocast_available(x.device.type):
        return x
    return x.to(product_dtype(x))


@contextlib.contextmanager
def weights_cast_once() -> Iterator[None]:
    """While this lasts no weight changes, and :func:`cast_weight` keeps what it cast (in this thread).

    Autocast itself keeps the casts of whole parameters that learn, but not of frozen ones, nor of views: a part of a
    parameter, or a matrix as a convolution takes it.
    """
    if _casts.get() is not None:
        yield
        return
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def cast_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A parameter as autocast would cast it for a product with ``x``; with gradients it stays as it is."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.dtype != torch.float32:
        return weight
    if (casts := _casts.get()) is None:
        return weight
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return weight
    dtype = torch.get_autocast_dtype(device)
    if product_dtype(x) != dtype:  # autocast leaves float64
        return weight
    key = id(weight), dtype
    if key not in casts:
        casts[key] = weight, weight.to(dtype)
    return casts[key][1]
