"""The temporal part of the video mask decoder: frame queries, and how they are combined into clip queries.

A clip query stands for a mask tube; a frame query stands for the same thing in one frame and looks at that frame only.
The split and the weighted sum over frames are those of SeqFormer (arXiv 2112.08275), as used by THE-Mask
(arXiv 2309.08020).
"""

from __future__ import annotations

from torch import Tensor, nn

from mmseg.kernels.layers import Linear
from mmseg.models.decode_heads.layers import (
    CrossAttentionLayer,
    FeedForwardLayer,
    SelfAttentionLayer,
)
from mmseg.utils.state_dict_alias import alias_state_dict, drop_dead_keys

_NAMES = {
    'clip_self.self_attn': 'self_attn',
    'clip_self.norm': 'norm2',
    'frame_self.self_attn': 'self_attn_box',
    'frame_self.norm': 'norm2_box',
    'frame_cross.multihead_attn': 'cross_attn',
    'frame_cross.norm': 'norm1_box',
    'frame_ffn.linear1': 'linear1_box',
    'frame_ffn.linear2': 'linear2_box',
    'frame_ffn.norm': 'norm3_box',
    'frame_weight': 'time_attention_weights',
    'frame_value': 'time_attention',
    'combine_norm': 'norm1',
    'combine_ffn.linear1': 'linear1',
    'combine_ffn.linear2': 'linear2',
    'combine_ffn.norm': 'norm3',
}


class TemporalAggregation(nn.Module):
    """First layer of the video decoder, and the aggregation that follows every layer with the same weights.

    Args:
        channels: width C.
        num_heads: heads of its three attentions.
        dim_feedforward: hidden width of its two feed-forward layers.
        dropout: probability on attention weights, on every branch and inside the feed-forward layers.
    """

    def __init__(self, channels: int, num_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.clip_self = SelfAttentionLayer(channels, num_heads, dropout)
        self.frame_self = SelfAttentionLayer(channels, num_heads, dropout)
        self.frame_cross = CrossAttentionLayer(channels, num_heads, dropout)
        self.frame_ffn = FeedForwardLayer(channels, dim_feedforward, dropout)
        self.frame_weight = Linear(channels, 1)
        self.frame_value = Linear(channels, channels)
        self.combine_norm = nn.LayerNorm(channels)
        self.combine_ffn = FeedForwardLayer(channels, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.frame_weight.weight)
        nn.init.xavier_uniform_(self.frame_value.weight)
        alias_state_dict(self, _NAMES)
        drop_dead_keys(self, ('reference_points',))

    def forward(
        self, queries: Tensor, position: Tensor, keys: Tensor, values: Tensor, num_frames: int
    ) -> tuple[Tensor, Tensor]:
        """First layer: clip queries from the learned ones, frame queries from a look at all maps of their frame.

        Args:
            queries: learned start values ``[B, Q, C]``.
            position: of the queries, ``[Q, C]``.
            keys: ``[B * T, S, C]``, all maps of a frame one after the other, their position in them.
            values: ``[B * T, S, C]``.
            num_frames: T.

        Returns:
            Clip queries ``[B, Q, C]`` and frame queries ``[B * T, Q, C]``.
        """
        clip = self.clip_self(queries, position)
        frames = self.frame_self(queries, position).repeat_interleave(num_frames, dim=0)
        frames = self.frame_ffn(self.frame_cross(frames, position, keys, values))
        return clip, frames

    def combine(self, clip: Tensor, frames: Tensor) -> Tensor:
        """Updates each clip query with a weighted mean of its frame queries.

        The weights of a query sum to one over T, so the linear layer is applied to the mean instead of to each frame:
        the same value for a T-th of the work.

        Args:
            clip: ``[B, Q, C]``.
            frames: ``[B, T, Q, C]``.

        Returns:
            Clip queries ``[B, Q, C]``.
        """
        weight = self.frame_weight(frames).softmax(dim=1)
        mean = (weight * frames).sum(dim=1)
        return self.combine_ffn(self.combine_norm(clip + self.dropout(self.frame_value(mean))))
