"""The linear layer of all parts: ``torch.nn.Linear``, on the CPU through the library that is fastest there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.autocast import cast_weight, product_dtype
from mmseg.kernels.convolution import Activation, activate, convolve

_WORTHWHILE = 2**24  # products; below, a convolution's longer way to its kernel costs more than it saves
_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """``x @ weight.T + bias`` over the last axis, the same sums as ``torch.nn.functional.linear``.

    Large float32 and bfloat16 products on the CPU are written as a 1x1 convolution over channels-last tokens.  PyTorch
    sends convolutions to oneDNN, which adds the bias in the same pass, and linear layers to BLAS, which copies the bias
    first and is tuned for one maker's processors (``python -m benchmarks.speed --part linear``).  The tokens are one
    line of pixels: for a column whose length has a large prime factor oneDNN makes the gradient of the weights at half
    its rate.  In bfloat16 both go to oneDNN; there a convolution is faster only where tokens are many beside
    their channels: it rearranges the weights first.

    Args:
        x: ``[..., C]``.
        weight: ``[C', C]``.
        bias: ``[C']``.
        activation: of the result, see :func:`~mmseg.kernels.convolution.convolve`.

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
        return activate(F.linear(x, weight, bias), activation)
    tokens = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = convolve(tokens, weight[:, :, None, None], bias, activation)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """``torch.nn.Linear`` through :func:`linear`; the same parameters and names."""

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """``[..., C]`` -> ``[..., C']``."""
        bias = self.bias if self.bias is None else cast_weight(self.bias, x)
        return linear(x, cast_weight(self.weight, x), bias, activation)
