"""Attention and feed-forward layers of the mask decoder, post-norm, tokens as ``[N, L, C]``.

The formulas are those of DETR (arXiv 2005.12872) and Mask2Former (arXiv 2112.01527): positions are added to queries and
keys, never to values, and every branch ends in ``norm(x + branch(x))``.  Parameter names are those of
``torch.nn.MultiheadAttention``, so that released weights load.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from mmseg.kernels.half import ProductLayer
from mmseg.kernels.layers import Linear, attention, linear


class MultiHeadAttention(ProductLayer):
    """Scaled dot-product attention of several heads with separate inputs for queries, keys and values.

    Args:
        embed_dim: width C of tokens.
        num_heads: number of heads; must divide ``embed_dim``.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: ``embed_dim`` is no multiple of ``num_heads``.
    """

    product_weights = ('in_proj_weight', 'in_proj_bias')

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f'{embed_dim} channels do not divide into {num_heads} heads')
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from ``query`` to ``key`` and returns the projected mean of ``value``.

        Args:
            query: ``[N, Lq, C]``.
            key: ``[N, Lk, C]``.
            value: ``[N, Lk, C]``.
            mask: broadcastable to ``[N, heads, Lq, Lk]``: bool, true where a query may attend, or a float that is
                added to the scores.  A row without any true entry is undefined.

        Returns:
            ``[N, Lq, C]``.
        """
        query, key, value = self._project(query, key, value)
        heads = attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """The three inputs as ``[N, heads, L, C / heads]``."""
        weights, biases = (each.chunk(3) for each in self.weights_for(inputs[0]) if each is not None)
        return [
            linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases)
        ]


class SelfAttentionLayer(nn.Module):
    """Self-attention among queries: ``norm(x + attention(x + position))``.

    Args:
        channels: width C.
        num_heads: number of heads.
        dropout: probability for attention weights and for the branch.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(channels, num_heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``x`` is ``[N, Q, C]``, ``position`` broadcasts to it; the shape is kept."""
        placed = x + position
        return self.norm(x + self.dropout(self.self_attn(placed, placed, x)))


class CrossAttentionLayer(nn.Module):
    """Cross-attention from queries to a memory: ``norm(x + attention(x + position, keys, values))``.

    Args:
        channels: width C.
        num_heads: number of heads.
        dropout: probability for attention weights and for the branch.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.multihead_attn = MultiHeadAttention(channels, num_heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """One update of the queries.

        Args:
            x: queries ``[N, Q, C]``.
            position: of the queries, broadcastable to ``x``.
            keys: ``[N, S, C]``, their position already in them.
            values: ``[N, S, C]``.
            mask: as in :meth:`MultiHeadAttention.forward`.

        Returns:
            ``[N, Q, C]``.
        """
        return self.norm(x + self.dropout(self.multihead_attn(x + position, keys, values, mask)))


class FeedForwardLayer(nn.Module):
    """Two linear layers with a ReLU: ``norm(x + linear2(relu(linear1(x))))``.

    Args:
        channels: width C.
        hidden: width between the two.
        dropout: probability after the ReLU and for the branch.
    """

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = Linear(channels, hidden, activation='relu')
        self.linear2 = Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[N, Q, C]``; the shape is kept."""
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.linear1(x)))))


class MLP(nn.Module):
    """Linear layers with ReLUs between them.

    Args:
        channels: widths from input to output, at least two.
    """

    def __init__(self, *channels: int) -> None:
        super().__init__()
        last = len(channels) - 2
        self.layers = nn.Sequential(*(
            Linear(a, b, activation='relu' if i < last else None) for i, (a, b) in enumerate(pairwise(channels))))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., channels[0]]`` to ``[..., channels[-1]]``."""
        return self.layers(x)
