"""The mask decoder: queries become (class, mask) pairs for a clip, with or without a temporal part.

Masked attention over three maps in turn is that of Mask2Former (arXiv 2112.01527, 2112.10764 for clips); the temporal
part is that of THE-Mask (arXiv 2309.08020).  The one-frame decoder is the video decoder without it:

========  ================================  =========================================
          one-frame                         video
========  ================================  =========================================
queries   clip queries attend               frame queries attend, clip queries combine
memory    all frames of the clip            the query's own frame
levels    clip                              clip and frame
========  ================================  =========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.layers import Conv2d, Linear
from mmseg.models.decode_heads.layers import (
    MLP,
    CrossAttentionLayer,
    FeedForwardLayer,
    SelfAttentionLayer,
)
from mmseg.models.decode_heads.position_encoding import sine_position_2d, sine_position_3d
from mmseg.models.decode_heads.temporal import TemporalAggregation
from mmseg.models.init import init_kaiming_
from mmseg.models.structures import DecoderOutput, MaskPrediction, mask_logits
from mmseg.registry import TRANSFORMER_DECODERS, register_variant, retired
from mmseg.utils.arguments import Count, Share
from mmseg.utils.errors import ConfigError
from mmseg.utils.state_dict_alias import alias_state_dict

NUM_LEVELS = 3


class Memory(NamedTuple):
    """What queries attend to at one level; G is B in the one-frame decoder and B * T in the video decoder.

    Attributes:
        keys: ``[G, S, C]``, values plus position.
        values: ``[G, S, C]``, map plus level embedding.
        mask_features: ``[B, T, C', h, w]``, resized to this level, without gradient.
    """

    keys: Tensor
    values: Tensor
    mask_features: Tensor


class PredictionHead(nn.Module):
    """Normalises queries and reads a class and a mask embedding off each.

    Args:
        channels: width C of queries.
        mask_dim: width of mask features.
        num_classes: K.
    """

    def __init__(self, channels: int, mask_dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.class_embed = Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels, channels, mask_dim)

    def embed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries ``[N, Q, C]`` and mask embeddings ``[N, Q, C']``."""
        queries = self.norm(queries)
        return queries, self.mask_embed(queries)

    def predict(self, queries: Tensor, embedding: Tensor, mask_features: Tensor) -> MaskPrediction:
        """Class logits, and the factors of masks, from both results of :meth:`embed` and ``[N, T, C', h, w]``."""
        return MaskPrediction(self.class_embed(queries), embedding, mask_features)


@retired(
    CONVS_DIM=(), MASK_DIM=(), transformer_in_feature=(), enforce_input_project=(False,), pre_norm=(False,)
)
class MaskDecoder(nn.Module):
    """Masked-attention decoder over three maps, predicting before the first layer and after each.

    Args:
        num_classes: K, without "no object".
        hidden_dim: width C of queries and memory, a multiple of 4 and of ``nheads``.
        num_queries: Q.
        nheads: attention heads.
        dim_feedforward: hidden width of feed-forward layers.
        dec_layers: number of layers; layer i attends to map i modulo 3.
        mask_dim: channels of the mask features.
        num_frames: T of training clips.  In evaluation any T works with any weights.
        in_channels: channels of the three maps; where they differ from ``hidden_dim``, 1x1 convolutions project them.
        temporal: whether there are frame queries and a frame level.
        temporal_dropout: dropout of the temporal part; all other layers have none.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        num_classes: Count,
        hidden_dim: Count = 256,
        num_queries: Count = 100,
        nheads: Count = 8,
        dim_feedforward: Count = 2048,
        dec_layers: Count = 9,
        mask_dim: Count = 256,
        num_frames: Count = 1,
        in_channels: Count | None = None,
        temporal: bool = False,
        temporal_dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        if hidden_dim % 4 or hidden_dim % nheads:
            raise ConfigError(f'hidden_dim={hidden_dim} must be a multiple of 4 and of nheads={nheads}')
        if min(num_classes, num_queries, dec_layers, num_frames) < 1:
            raise ConfigError(
                f'num_classes={num_classes}, num_queries={num_queries}, dec_layers={dec_layers} and '
                f'num_frames={num_frames} must all be at least 1'
            )
        self.num_classes = num_classes
        self.num_frames = num_frames
        self.mask_dim = mask_dim
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads) for _ in range(dec_layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden_dim, dim_feedforward) for _ in range(dec_layers)
        )
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList()
        if in_channels is not None and in_channels != hidden_dim:
            for _ in range(NUM_LEVELS):
                projection = Conv2d(in_channels, hidden_dim, 1)
                init_kaiming_(projection)
                self.input_proj.append(projection)
        self.clip_head = PredictionHead(hidden_dim, mask_dim, num_classes)
        self.temporal: TemporalAggregation | None = None
        self.frame_head: PredictionHead | None = None
        names = {'clip_head.class_embed': 'class_embed', 'clip_head.mask_embed': 'mask_embed'}
        if temporal:
            self.temporal = TemporalAggregation(hidden_dim, nheads, dim_feedforward, temporal_dropout)
            self.frame_head = PredictionHead(hidden_dim, mask_dim, num_classes)
            names |= {
                'temporal': 'deformabel_transformer_cross_attention_layers',
                'clip_head.norm': 'decoder_norm1',
                'frame_head.norm': 'decoder_norm2',
                'frame_head.class_embed': 'class_embed_aux',
                'frame_head.mask_embed': 'mask_embed_aux',
            }
        else:
            names['clip_head.norm'] = 'decoder_norm'
        alias_state_dict(self, names)

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, num_frames: int, all_layers: bool | None = None
    ) -> DecoderOutput:
        """Predicts for a batch of clips; the clips do not see each other.

        Args:
            maps: three maps ``[B * T, C_in, h_i, w_i]`` (strides 32, 16, 8), the frames of a clip one after the other.
            mask_features: ``[B * T, C', h, w]`` (stride 4).
            num_frames: T.
            all_layers: whether to return the predictions of every stage; else only the last, and of earlier stages
                nothing is computed but the mask embedding that the next attention mask needs.  ``None``: in training.

        Returns:
            Stages of the clip level and, with a temporal part, of the frame level.

        Raises:
            ConfigError: in training, ``num_frames`` is not that of the constructor.
            ValueError: the number of maps or of frames does not fit.
        """
        self._check(maps, mask_features, num_frames)
        if all_layers is None:
            all_layers = self.training
        features = mask_features.unflatten(0, (-1, num_frames))
        # Channels last (on a CPU they are): a GPU's resize of other layouts is as slow as all attention together.
        source = mask_features.detach().contiguous(memory_format=torch.channels_last)
        memory = [self._memory(level, x, source, num_frames) for level, x in enumerate(maps)]
        position = self.query_embed.weight
        clip = self.query_feat.weight.expand(features.shape[0], -1, -1)
        queries = clip
        if self.temporal is not None:
            keys = torch.cat([level.keys for level in memory], dim=1)
            values = torch.cat([level.values for level in memory], dim=1)
            clip, queries = self.temporal(clip, position, keys, values, num_frames)

        output = DecoderOutput([], None if self.temporal is None else [])
        layers = zip(
            self.transformer_cross_attention_layers, self.transformer_self_attention_layers, self.transformer_ffn_layers
        )
        for i, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            normed, embedding = self.clip_head.embed(clip)
            if all_layers:
                self._append(output, normed, embedding, queries, features)
            level = memory[i % NUM_LEVELS]
            mask = self._attention_mask(embedding.detach(), level.mask_features)
            queries = cross_attention(queries, position, level.keys, level.values, mask)
            queries = feed_forward(self_attention(queries, position))
            clip = self._clip_queries(clip, queries, num_frames)
        self._append(output, *self.clip_head.embed(clip), queries, features)
        return output

    def _check(self, maps: Sequence[Tensor], mask_features: Tensor, num_frames: int) -> None:
        if len(maps) != NUM_LEVELS:
            raise ValueError(f'the mask decoder takes {NUM_LEVELS} maps, got {len(maps)}')
        if num_frames < 1 or mask_features.shape[0] % num_frames:
            raise ValueError(f'{mask_features.shape[0]} frames cannot be cut into clips of {num_frames}')
        if self.training and num_frames != self.num_frames:
            raise ConfigError(
                f'got a training clip of {num_frames} frames, but the mask decoder is built for num_frames='
                f'{self.num_frames}: set model.decode_head.transformer_decoder_cfg.num_frames={num_frames}, or choose '
                f'data.train.dataset.dilation so that a clip has {self.num_frames}'
            )

    def _memory(self, level: int, x: Tensor, mask_features: Tensor, num_frames: int) -> Memory:
        """Keys, values and mask features of one level, in the grouping that the cross-attention needs."""
        if self.input_proj:
            x = self.input_proj[level](x)
        batch = len(x) // num_frames
        channels, height, width = x.shape[1:]
        level_embed = self.level_embed.weight[level].to(x.dtype)
        values = (x.flatten(2).transpose(1, 2) + level_embed).contiguous()
        if self.temporal is None:
            values = values.reshape(batch, -1, channels)
            position = sine_position_3d(num_frames, height, width, channels, x.device, values.dtype)
            position = position.flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            # Within one frame the frame part of the position adds the same to every score: softmax does not see it.
            position = sine_position_2d(height, width, channels, x.device, values.dtype).flatten(1).T
        resized = F.interpolate(mask_features, (height, width), mode='bilinear', align_corners=False)
        return Memory(values + position, values, resized.unflatten(0, (batch, num_frames)))

    @torch.no_grad()
    def _attention_mask(self, embedding: Tensor, mask_features: Tensor) -> Tensor:
        """Where each query may attend: the pixels of its own mask, or everywhere if it has none.

        Resizing and the product with the embedding are both linear, and act on different axes, so the mask logits of
        resized features equal the resized mask logits.  ``sigmoid(x) >= 0.5`` is ``x >= 0``.

        Args:
            embedding: of clip queries, ``[B, Q, C']``.
            mask_features: ``[B, T, C', h, w]``, resized to the level; S is h * w.

        Returns:
            bool ``[G, 1, Q, S]`` over one frame (video) or ``[G, 1, Q, T * S]`` over the clip (one-frame).
        """
        inside = mask_logits(embedding, mask_features).flatten(3) >= 0  # [B, Q, T, S]
        inside = inside.flatten(2) if self.temporal is None else inside.transpose(1, 2).flatten(0, 1)
        return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]

    def _clip_queries(self, clip: Tensor, queries: Tensor, num_frames: int) -> Tensor:
        """Clip queries ``[B, Q, C]`` after a layer, from those before it and the layer's queries."""
        if self.temporal is None:
            return queries
        return self.temporal.combine(clip, queries.unflatten(0, (-1, num_frames)))

    def _append(
        self, output: DecoderOutput, normed: Tensor, embedding: Tensor, queries: Tensor, features: Tensor
    ) -> None:
        """Adds the predictions of one stage to ``output``."""
        output.clip.append(self.clip_head.predict(normed, embedding, features))
        if self.frame_head is not None and output.frame is not None:
            frame_features = features.flatten(0, 1)[:, None]
            output.frame.append(self.frame_head.predict(*self.frame_head.embed(queries), frame_features))


register_variant(TRANSFORMER_DECODERS, 'MultiScaleMaskedTransformerDecoder', MaskDecoder, temporal=False)
register_variant(TRANSFORMER_DECODERS, 'VideoMultiScaleMaskedTransformerDecoder', MaskDecoder, temporal=True)
