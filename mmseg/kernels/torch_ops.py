"""The native ops for torch's dispatcher, under ``torch.ops.themask``, and who may call them.

The native libraries register their kernels for CPU and CUDA when they are loaded. Here is what does not depend on a
device: schemas, fake kernels, autograd, autocast rules and FLOP formulas, so that the ops go through ``torch.compile``,
``torch.export`` and the FLOP counter. ``label_map`` and ``extend_runs`` have no formula: resizing and comparing are not
counted, as everywhere.

``ms_deform_attn`` with reference points is the fused form: ``points`` are offsets and ``weights`` are logits.
``spatial_shapes`` is flat: h, w of each level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from mmseg.kernels import library
from mmseg.kernels.library import BackendError, BuildError

INPUTS = 'Tensor value, SymInt[] spatial_shapes, Tensor? reference_points, Tensor points, Tensor weights'
_library = torch.library.Library('themask', 'FRAGMENT')
for _schema in (
    f'ms_deform_attn({INPUTS}) -> Tensor',
    f'ms_deform_attn_backward(Tensor grad_out, {INPUTS}, bool deterministic) -> (Tensor, Tensor, Tensor)',
    'attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> Tensor',
    'label_map(Tensor scores, Tensor rows, Tensor columns) -> Tensor',
    'extend_runs(Tensor gt, Tensor before, Tensor pred, Tensor pred_before, Tensor(a!) runs, int[] lengths) -> Tensor',
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
ops = torch.ops.themask


@torch.compiler.assume_constant_result
def uses_native(device_type: str) -> bool:
    """Whether ``ms_deform_attn`` of this device type goes to a native op; otherwise it takes the PyTorch form.

    Raises:
        BackendError: ``THEMASK_OPS_BACKEND`` names a backend that cannot serve this device.
    """
    choice = library.requested()
    if choice == 'pytorch':
        return False
    if choice not in ('auto', device_type):
        raise BackendError(f'THEMASK_OPS_BACKEND={choice}, but value is on {device_type}; use auto')
    if device_type not in ('cpu', 'cuda'):
        return False
    kind: library.Kind = 'cpu' if device_type == 'cpu' else 'cuda'
    if choice != 'auto' and isinstance(error := library.native(kind), BuildError):
        raise BackendError(f'THEMASK_OPS_BACKEND={choice}, but {error}') from error
    return library.usable(kind)


def native_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """``softmax(query @ key.T / sqrt(d)) @ value`` where the native op is faster than torch's own, else None.

    That is without gradients, for float32 and bfloat16 on the CPU, with AVX2 or AVX-512. Where the processor has AMX,
    torch's own is faster in bfloat16 without a mask.

    Args:
        query: ``[N, heads, L, d]``.
        key: ``[N, heads, S, d]``.
        value: ``[N, heads, S, d]``.
        mask: bool, broadcastable to ``[N, heads, L, S]``: true where a query may attend.

    Returns:
        ``[N, heads, L, d]``, a view of ``[N, L, heads, d]``; NaN for queries without any true entry in the mask.
    """
    fits = (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and query.dtype in (torch.float32, torch.bfloat16)
        and all(x.device.type == 'cpu' and x.dtype == query.dtype and x.numel() for x in (query, key, value))
        and query.dim() == key.dim() == 4
        and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.device.type == 'cpu'))
    )
    amx = mask is None and query.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if not fits or amx or not library.usable('cpu') or library.instruction_set() == 'portable':
        return None
    mask = mask if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    return ops.attention(query, key, value, mask)


def _fake(name: str) -> Any:
    return torch.library.register_fake(f'themask::{name}', lib=_library)


@_fake('ms_deform_attn')
def _(value, spatial_shapes, reference_points, points, weights):
    n, _, heads, width = value.shape
    return value.new_empty((n, points.shape[1], heads * width))


@_fake('ms_deform_attn_backward')
def _(grad_out, value, spatial_shapes, reference_points, points, weights, deterministic):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, points, weights))


@_fake('attention')
def _(query, key, value, mask):
    n, heads, queries, width = query.shape
    return query.new_empty((n, queries, heads, width)).transpose(1, 2)


@_fake('label_map')
def _(scores, rows, columns):
    return scores.new_empty((len(scores), rows.shape[1], columns.shape[1]), dtype=torch.uint8)


@_fake('extend_runs')
def _(gt, before, pred, pred_before, runs, lengths):
    return gt.new_empty((len(lengths), 2), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx: Any, grad_out: Tensor) -> tuple:
    value, reference, points, weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_points, grad_weights = ops.ms_deform_attn_backward(
        grad_out, value, ctx.spatial_shapes, reference, points, weights, deterministic
    )
    grad_reference = None
    if reference is not None and ctx.needs_input_grad[2]:  # location = reference + offset / size
        sizes = torch.tensor(ctx.spatial_shapes, dtype=grad_points.dtype, device=value.device).view(-1, 2).flip(-1)
        grad_reference = (grad_points.sum(dim=(2, 4)) * sizes).to(reference.dtype)
        if reference.shape[0] != grad_reference.shape[0]:
            grad_reference = grad_reference.sum(0, keepdim=True)
    return grad_value, None, grad_reference, grad_points, grad_weights


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('ms_deform_attn has no second derivative; set THEMASK_OPS_BACKEND=pytorch for one')


torch.library.register_autograd('themask::ms_deform_attn', _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd('themask::ms_deform_attn_backward', _no_second_derivative, lib=_library)
for _device in ('cpu', 'cuda'):
    torch.library.register_autocast('themask::ms_deform_attn', _device, torch.float32, lib=_library)


@register_flop_formula(ops.ms_deform_attn)
def _flops(value_shape: tuple, spatial_shapes: list, reference: tuple | None, points: tuple, *_: Any, **__: Any) -> int:
    """A sample of a channel: four corners, each one multiplication and one addition.

    The few operations on locations and weights do not grow with the channels and are left out, as the counter does
    with activations.
    """
    n, queries, heads, levels, samples, _ = points
    return n * queries * heads * levels * samples * value_shape[3] * 8


@register_flop_formula(ops.ms_deform_attn_backward)
def _backward_flops(grad_shape: tuple, *inputs: Any, **_: Any) -> int:
    return 2 * _flops(*inputs)  # once for the gradient of value, once for those of points and weights


@register_flop_formula(ops.attention)
def _attention_flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)
