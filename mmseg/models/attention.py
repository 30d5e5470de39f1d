"""Scaled dot-product attention of long queries to few keys, as the backbone has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg.models.linear import linear

_TILE = 2048  # queries
_WORTHWHILE = 2**19  # scores of a head


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(query @ key.T / sqrt(d)) @ value``.

    On the CPU, without gradients, this is written out, head by head: a tile of queries has all its scores at once,
    which stay in the cache because keys are few.  The sums are those of
    ``torch.nn.functional.scaled_dot_product_attention``, which is used everywhere else; but its products go to BLAS,
    which is slow on some processors, and slower in bfloat16 where there is no AMX, and these go through
    :func:`mmseg.models.linear.linear` (``python -m benchmarks.speed --part attention``).

    Args:
        query: ``[N, heads, L, d]``.
        key: ``[N, heads, S, d]``.
        value: ``[N, heads, S, d]``.

    Returns:
        ``[N, heads, L, d]``.
    """
    if (
        query.device.type != 'cpu'
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or query.shape[2] * key.shape[2] < _WORTHWHILE
    ):
        return F.scaled_dot_product_attention(query, key, value)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    inputs = (query, key * query.shape[3] ** -0.5, value)
    heads = zip(*(x.flatten(0, 1) for x in inputs), (place for sample in out for place in sample))
    with torch.autocast('cpu', enabled=False):
        for queries, keys, values, place in heads:
            values = values.T.contiguous()
            for part, own in zip(queries.split(_TILE), place.split(_TILE)):
                own.copy_(linear(linear(part, keys).softmax(dim=-1), values))
    return out
