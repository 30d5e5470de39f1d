"""The ops ``themask::ms_deform_attn`` and ``themask::ms_deform_attn_fused`` for torch's dispatcher.

The native libraries register their kernels for CPU and CUDA under these names when they are loaded. Here stands what
does not depend on a device: schema, fake kernel, autograd, autocast rule and FLOP formula, so that both ops go through
``torch.compile``, ``torch.export`` and the FLOP counter. ``spatial_shapes`` is flat: h, w of each level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

INPUTS = 'Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights'
FUSED_INPUTS = (
    'Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits'
)
_library = torch.library.Library('themask', 'FRAGMENT')
for _name, _inputs in (('ms_deform_attn', INPUTS), ('ms_deform_attn_fused', FUSED_INPUTS)):
    _library.define(f'{_name}({_inputs}) -> Tensor', tags=torch.Tag.pt2_compliant_tag)
    _library.define(
        f'{_name}_backward(Tensor grad_out, {_inputs}, bool deterministic) -> (Tensor, Tensor, Tensor)',
        tags=torch.Tag.pt2_compliant_tag,
    )
ops = torch.ops.themask


def _out(value: Tensor, points: Tensor) -> Tensor:
    n, _, heads, width = value.shape
    return value.new_empty((n, points.shape[1], heads * width))


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


@torch.library.register_fake('themask::ms_deform_attn', lib=_library)
def _(value, spatial_shapes, sampling_locations, attention_weights):
    return _out(value, sampling_locations)


@torch.library.register_fake('themask::ms_deform_attn_fused', lib=_library)
def _(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
    return _out(value, sampling_offsets)


@torch.library.register_fake('themask::ms_deform_attn_backward', lib=_library)
def _(grad_out, value, spatial_shapes, sampling_locations, attention_weights, deterministic):
    return _gradients(value, sampling_locations, attention_weights)


@torch.library.register_fake('themask::ms_deform_attn_fused_backward', lib=_library)
def _(grad_out, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, deterministic):
    return _gradients(value, sampling_offsets, attention_logits)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx: Any, grad_out: Tensor) -> tuple:
    value, locations, weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_locations, grad_weights = ops.ms_deform_attn_backward(
        grad_out, value, ctx.spatial_shapes, locations, weights, deterministic
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_backward(ctx: Any, grad_out: Tensor) -> tuple:
    value, reference, offsets, logits = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_offsets, grad_logits = ops.ms_deform_attn_fused_backward(
        grad_out, value, ctx.spatial_shapes, reference, offsets, logits, deterministic
    )
    grad_reference = None
    if ctx.needs_input_grad[2]:  # location = reference + offset / size
        sizes = torch.tensor(ctx.spatial_shapes, dtype=grad_offsets.dtype, device=value.device).view(-1, 2).flip(-1)
        grad_reference = (grad_offsets.sum(dim=(2, 4)) * sizes).to(reference.dtype)
        if reference.shape[0] != grad_reference.shape[0]:
            grad_reference = grad_reference.sum(0, keepdim=True)
    return grad_value, None, grad_reference, grad_offsets, grad_logits


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('ms_deform_attn has no second derivative; set THEMASK_OPS_BACKEND=pytorch for one')


torch.library.register_autograd('themask::ms_deform_attn', _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    'themask::ms_deform_attn_fused', _fused_backward, setup_context=_setup_context, lib=_library
)
for _name in ('ms_deform_attn', 'ms_deform_attn_fused'):
    torch.library.register_autograd(f'themask::{_name}_backward', _no_second_derivative, lib=_library)
    for _device in ('cpu', 'cuda'):
        torch.library.register_autocast(f'themask::{_name}', _device, torch.float32, lib=_library)


def _samples_flops(value_shape: tuple, others: tuple) -> int:
    """A sample of a channel: four corners, each one multiplication and one addition.

    The few operations on locations and weights do not grow with the channels and are left out, as the counter does
    with activations.
    """
    n, queries, heads, levels, points, _ = next(shape for shape in others if len(shape) == 6)
    return n * queries * heads * levels * points * value_shape[3] * 8


@register_flop_formula([ops.ms_deform_attn, ops.ms_deform_attn_fused])
def _flops(value_shape: tuple, spatial_shapes: list, *others: tuple, out_shape: tuple, **_: Any) -> int:
    return _samples_flops(value_shape, others)


# The same products once for the gradient of value, once for those of locations and weights.
@register_flop_formula([ops.ms_deform_attn_backward, ops.ms_deform_attn_fused_backward])
def _flops_backward(
    grad_shape: tuple, value_shape: tuple, spatial_shapes: list, *others: tuple, out_shape: tuple, **_: Any
) -> int:
    return 2 * _samples_flops(value_shape, others[:-1])
