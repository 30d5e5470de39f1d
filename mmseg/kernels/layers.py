"""The layers of all models; each equals the torch layer of its name and chooses a form for its processor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.convolution import Activation, activate, convolve
from mmseg.kernels.half import ProductLayer, product_dtype
from mmseg.kernels.torch_ops import native_attention
from mmseg.utils.seed import uniform

_WORTHWHILE = 2**24  # products; below, a convolution's longer way to its kernel costs more than it saves
# Bytes of a chunk: glibc gives what is above 32 MiB back to the system at once; far below, a chunk finds the memory of
# the one before it also where other tensors have taken some of that meanwhile.
_CHUNK = 8 * 2**20


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
        or (dtype := product_dtype(x)) not in (torch.float32, torch.bfloat16)
        or (dtype == torch.bfloat16 and 2 * x.numel() < x.shape[-1] ** 2)
    ):
        return activate(F.linear(x, weight, bias), activation)
    tokens = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = convolve(tokens, weight[:, :, None, None], bias, activation)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(ProductLayer, nn.Linear):
    """``torch.nn.Linear``, maybe with an activation behind it; the same parameters and names."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: Activation | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C']``."""
        weight, bias = self.weights_for(x)
        assert weight is not None
        return linear(x, weight, bias, self.activation)


class Conv2d(ProductLayer, nn.Conv2d):
    """``torch.nn.Conv2d``, maybe with an activation behind it (stride 1, equal size); the same parameters and names."""

    def __init__(self, *args: Any, activation: Activation | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.activation = activation
        side = self.kernel_size[0]
        self.keeps_size = self.kernel_size == (side, side) and self.stride == (1, 1) == self.dilation and (
            self.padding == (side // 2, side // 2) and side % 2 == 1 and self.groups in (1, self.in_channels))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own, bias = self.weights_for(x)
        assert own is not None
        if self.keeps_size:
            return convolve(x, own, bias, self.activation)
        return activate(super()._conv_forward(x, own, bias), self.activation)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` beside a residual sum."""

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """``x + branch``, and its norm."""
        x = x + branch
        return x, self(x)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(query @ key.T / sqrt(d)) @ value``, without averaged weights and without the matrix of scores.

    Without gradients, float32 and bfloat16 on an x86 processor go to native code, the same sums
    (``python -m benchmarks.speed --part attention``).  With dropout on a CPU, for which torch has no fused kernel, one
    uniform number is drawn for each weight; torch's coins come slower.  Everything else goes to
    ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``[N, heads, L, d]``.
        key: ``[N, heads, S, d]``.
        value: ``[N, heads, S, d]``.
        mask: broadcastable to ``[N, heads, L, S]``: bool, true where a query may attend, or a float that is added to
            the scores.  A row without any true entry is undefined.
        dropout: probability of dropping a weight.

    Returns:
        ``[N, heads, L, d]``.
    """
    if dropout == 0 and (out := native_attention(query, key, value, mask)) is not None:
        return out
    if 0 < dropout < 1 and mask is None and query.device.type == 'cpu':
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        return weights.masked_fill(uniform(*weights.shape) < dropout, 0) @ (value / (1 - dropout))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns.T`` of matrices ``[..., M, C]`` and ``[..., S, C]``; on the CPU each by :func:`linear`."""
    if rows.device.type != 'cpu':
        return rows @ columns.transpose(-2, -1)
    pairs = zip(rows.flatten(0, -3), columns.flatten(0, -3))
    return torch.stack([linear(*pair) for pair in pairs]).unflatten(0, rows.shape[:-2])


def chunks(x: Tensor, size: int) -> Sequence[Tensor]:
    """``x`` in parts of ``size`` entries on the CPU, which gains nothing from a batch; else as it is."""
    return [x] if x.device.type != 'cpu' or torch.compiler.is_compiling() else x.split(size)


def chunked(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """``function(*inputs)`` for a function of single tokens, so that chunks of tokens are exact.

    On the CPU it is called for equal chunks, which use the same memory in turn (with gradients: memory that the process
    keeps); everywhere else once for all.

    Args:
        function: takes and gives ``[L, C]`` for any L; where nothing is cut it gets ``inputs`` as they are.
        inputs: ``[..., C]``, all axes but the last equal.
        width: numbers that the function holds for a token.

    Returns:
        ``[..., C']``.
    """
    tokens = inputs[0].shape[:-1]
    if inputs[0].device.type != 'cpu' or torch.compiler.is_compiling():
        return function(*inputs)
    count = -(-tokens.numel() * product_dtype(inputs[0]).itemsize * width // _CHUNK)
    if count <= 1:
        return function(*inputs)
    parts = zip(*(x.flatten(0, -2).chunk(count) for x in inputs))
    return torch.cat([function(*part) for part in parts]).unflatten(0, tokens)


def smallest(values: Tensor, n: int) -> Tensor:
    """Where the ``n`` smallest values of each row are, int64 ``[R, n]``, in no order: a mean over points needs none.

    Selecting is cheaper than sorting, and NumPy's vectorised selection takes a third of the time of torch's on a CPU.
    """
    if values.device.type == 'cpu' and not torch.compiler.is_compiling():
        return torch.from_numpy(np.argpartition(values.numpy(), n - 1, axis=1)[:, :n])
    return values.topk(n, dim=1, largest=False, sorted=False).indices


def cached(function: Callable[..., Tensor], kept: int = 32) -> Callable[..., Tensor]:
    """Keeps the last results of ``function``, whose arguments are hashable; results have no gradient.

    ``torch.compile`` traces the function instead, as a kept tensor has no source; fake tensors, which have no data, are
    not kept.
    """
    make = torch.inference_mode(False)(torch.no_grad()(function))
    results: dict[tuple, Tensor] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return function(*args)
        result = results.get(args)
        if result is None:
            result = make(*args)
            if type(result) is Tensor:
                results[args] = result
                if len(results) > kept:
                    results.pop(next(iter(results)), None)
        return result

    return call
