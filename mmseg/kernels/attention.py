"""Scaled dot-product attention of all parts: torch's own, and on the CPU two forms besides.

One is native, without gradients.  The other is for dropout, for which torch has no fused kernel on the CPU: it draws
one uniform number for each weight; torch's draws coins, which come slower.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmseg.kernels.torch_ops import native_attention
from mmseg.utils.seed import uniform


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(query @ key.T / sqrt(d)) @ value``, without averaged weights and without the matrix of scores.

    Without gradients, float32 and bfloat16 on an x86 processor go to the native op: the same sums, with
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
    if dropout == 0 and (out := native_attention(query, key, value, mask)) is not None:
        return out
    if 0 < dropout < 1 and mask is None and query.device.type == 'cpu':
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        return weights.masked_fill(uniform(*weights.shape) < dropout, 0) @ (value / (1 - dropout))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
