"""The convolutions of all parts; in training on a CPU with AVX2 alone, BLAS makes the gradient of the weights.

A gradient of weights is one matrix product for each tap of the kernel, of what came back with the input moved by the
tap.  oneDNN computes it at its full rate with AVX-512, but with AVX2 at a third of it, while BLAS keeps its rate
(``python -m benchmarks.speed --part train``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from mmseg.utils.autocast import cast_weight, product_dtype


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with weights that are cast once while none changes; the same parameters and names."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = bias if bias is None else cast_weight(bias, x)
        return super()._conv_forward(x, cast_weight(weight, x), bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d`` of stride 1 between zeros, which keeps the size of the map; the same sums, also in backward.

    Args:
        x: ``[N, C, H, W]``, fastest in channels-last.
        weight: ``[C', C, k, k]``, k odd.
        bias: ``[C']``.

    Returns:
        ``[N, C', H, W]``.
    """
    if (
        torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and torch.backends.cpu.get_cpu_capability() != 'AVX512'
        and x.dtype == weight.dtype == product_dtype(x) == torch.float32
    ):
        return _Convolution.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


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
