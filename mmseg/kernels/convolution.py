"""The convolutions of all parts, and what the CPU does otherwise than torch's own: an activation, weights' gradients.

Without gradients oneDNN applies an activation to what it has just summed up, before it is written
(``torch.ops.mkldnn._convolution_pointwise``, made for torch's compiler): one pass over memory less, the same numbers.

In training on a CPU with AVX2 alone, BLAS makes the gradient of the weights.  It is one matrix product for each tap of
the kernel, of what came back with the input moved by the tap.  oneDNN computes it at its full rate with AVX-512, but
with AVX2 at a third of it, while BLAS keeps its rate (``python -m benchmarks.speed --part train``).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from mmseg.kernels.autocast import cast_weight, cpu_computes_in, product_dtype

Activation = Literal['relu', 'gelu']


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with weights that are cast once while none changes; the same parameters and names."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = bias if bias is None else cast_weight(bias, x)
        return super()._conv_forward(x, cast_weight(weight, x), bias)

    def then(self, activation: Activation, x: Tensor) -> Tensor:
        """The activation of what the layer makes of ``x``; for layers of stride 1 that keep the size of the map."""
        bias = self.bias if self.bias is None else cast_weight(self.bias, x)
        return convolve(x, cast_weight(self.weight, x), bias, activation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """``F.conv2d`` of stride 1 between zeros, which keeps the size of the map; the same sums, also in backward.

    Args:
        x: ``[N, C, H, W]``, fastest in channels-last.
        weight: ``[C', C, k, k]``, k odd; ``[C', 1, k, k]`` for a depthwise convolution.
        bias: ``[C']``.
        activation: of the result: ReLU, or GELU by the error function.

    Returns:
        ``[N, C', H, W]``.
    """
    groups = x.shape[1] // weight.shape[1]
    padding = weight.shape[2] // 2
    if activation is None:
        return _convolve(x, weight, bias, padding, groups)
    if not _fuses(x):
        return activate(_convolve(x, weight, bias, padding, groups), activation)
    dtype = product_dtype(x)
    return torch.ops.mkldnn._convolution_pointwise(
        x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype), [padding] * 2, [1, 1], [1, 1], groups,
        activation, [], 'none')


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation of a fresh tensor, which is overwritten where no gradient needs it."""
    if activation == 'relu':
        return F.relu(x, inplace=not torch.is_grad_enabled())
    return F.gelu(x) if activation == 'gelu' else x


def _fuses(x: Tensor) -> bool:
    """Whether oneDNN can apply the activation itself."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and product_dtype(x) in _fused_types()
    )


@functools.cache
def _fused_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, '_convolution_pointwise'):
        return ()
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if cpu_computes_in(dtype))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    if (
        groups == 1
        and torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and torch.backends.cpu.get_cpu_capability() != 'AVX512'
        and x.dtype == weight.dtype == product_dtype(x) == torch.float32
    ):
        return _Convolution.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


class _Convolution(torch.autograd.Function):
    """:func:`convolve` with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _input_gradient(x, weight, grad) if of_x else None,
            _weight_gradient(x, weight, grad) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
        )


def _input_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    if weight.shape[2] == 1:  # torch.nn.grad would bring a map one pixel wide into another layout
        return (grad.permute(0, 2, 3, 1) @ weight[:, :, 0, 0]).permute(0, 3, 1, 2)
    return conv2d_input(x.shape, weight, grad, padding=weight.shape[2] // 2)


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """With zeros around both maps, moving one by a tap is an offset between their rows of pixels.

    Where a line of one runs into the next, the zeros of the other take it out.
    """
    side, around = weight.shape[2], weight.shape[2] // 2
    edges = (0, 0, around, around, around, around)
    line = x.shape[3] + 2 * around
    reach = around * (line + 1)
    taps = weight.new_zeros(side * side, *weight.shape[:2])
    for image in zip(x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)):
        pixels, back = ((F.pad(each, edges) if around else each).flatten(0, 1) for each in image)
        inner = back[reach : len(back) - reach].T
        for tap, total in enumerate(taps):
            first = tap // side * line + tap % side
            total.addmm_(inner, pixels[first : first + inner.shape[1]])
    return taps.permute(1, 2, 0).unflatten(2, (side, side))
