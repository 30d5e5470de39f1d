"""Convolutions that keep the size of a map, and what the CPU does otherwise than torch's own: activations, gradients.

Without gradients oneDNN applies an activation to what it has just summed up, before it is written
(``torch.ops.mkldnn._convolution_pointwise``, made for torch's compiler): one pass over memory less, the same numbers.

In training on a CPU with AVX2 alone, BLAS makes the gradient of the weights: one matrix product for each tap of the
kernel.  oneDNN computes it at its full rate with AVX-512, but with AVX2 at a third of it (``python -m benchmarks.speed
--part train``).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from mmseg.kernels.half import cpu_computes_in, product_dtype

Activation = Literal['relu', 'gelu']


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """``F.conv2d`` of stride 1 with zero padding that keeps the size of the map; the same sums, also in backward.

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
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return activate(F.conv2d(x, weight, bias, padding=padding, groups=groups), activation)
    dtype = product_dtype(x)
    if activation and not torch.is_grad_enabled() and dtype in _fused_types():
        return torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype), [padding] * 2, [1, 1], [1, 1],
            groups, activation, [], 'none')
    own_gradient = (
        torch.is_grad_enabled() and groups == 1 and x.dtype == weight.dtype == dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() != 'AVX512')  # fmt: skip
    if own_gradient:
        return activate(_Convolution.apply(x, weight, bias), activation)
    return activate(F.conv2d(x, weight, bias, padding=padding, groups=groups), activation)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation of a fresh tensor, which is overwritten where no gradient needs it."""
    if activation == 'relu':
        return F.relu(x, inplace=not torch.is_grad_enabled())
    return F.gelu(x) if activation == 'gelu' else x


@functools.cache
def _fused_types() -> tuple[torch.dtype, ...]:
    """Types in which oneDNN applies an activation itself."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, '_convolution_pointwise'):
        return ()
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if cpu_computes_in(dtype))


class _Convolution(torch.autograd.Function):
    """A convolution with a backward pass of its own."""

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
