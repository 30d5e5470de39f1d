"""The linear layer of all parts: ``torch.nn.Linear``, on the CPU through the library that is fastest there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORTHWHILE = 2**24  # products; below, a convolution's longer way to its kernel costs more than it saves
_DTYPES = (torch.float32, torch.bfloat16)


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` over the last axis, the same sums as ``torch.nn.functional.linear``.

    Large float32 and bfloat16 products on the CPU are written as a 1x1 convolution over channels-last tokens.  PyTorch
    sends convolutions to oneDNN, which adds the bias in the same pass, and linear layers to BLAS, which copies the bias
    first and is tuned for one maker's processors (``python -m benchmarks.speed --part linear``).  In bfloat16 both go
    to oneDNN; there a convolution is faster only where tokens are many beside their channels: it rearranges the weights
    first.

    Args:
        x: ``[..., C]``.
        weight: ``[C', C]``.
        bias: ``[C']``.

    Returns:
        ``[..., C']``.
    """
    if (
        x.device.type != 'cpu'
        or torch.compiler.is_compiling()  # the compiler chooses the library itself
        or x.numel() * weight.shape[0] < _WORTHWHILE
        or not torch.backends.mkldnn.is_available()
        or (dtype := product_dtype(x)) not in _DTYPES
        or (dtype == torch.bfloat16 and 2 * x.numel() < x.shape[-1] ** 2)
    ):
        return F.linear(x, weight, bias)
    tokens = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(tokens, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """``torch.nn.Linear`` through :func:`linear`; the same parameters and names."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C']``."""
        return linear(x, self.weight, self.bias)
