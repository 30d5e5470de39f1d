"""Scaled dot-product attention of all parts: torch's own, and without gradients on the CPU a native form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_native


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(query @ key.T / sqrt(d)) @ value``, without averaged weights and without the matrix of scores.

    Without gradients, float32 and bfloat16 on an x86 processor go to :mod:`.attention_native`: the same sums, with
    AVX-512 about twice as fast in float32 and two to three and a half times in bfloat16
    (``python -m benchmarks.speed --part attention``).  Everything else goes to
    ``torch.nn.functional.scaled_dot_product_attention``, which picks the fastest kernel of the device.

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
    if (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and dropout == 0
        and attention_native.serves(query, key, value, mask)
        and attention_native.usable()
    ):
        return attention_native.attention(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
