"""The pixel decoder of Mask2Former (Cheng et al., arXiv 2112.01527) on deformable attention (Zhu et al., 2010.04159).

The three coarse backbone maps become tokens, which attend to a few sampled points of all three levels; one step of a
feature pyramid brings the finest result to stride 4, where the masks are read off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg.kernels.half import without_autocast
from mmseg.kernels.layers import Conv2d, LayerNorm, Linear, chunked
from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused
from mmseg.models.decode_heads.position_encoding import pixel_centres, sine_position_2d
from mmseg.models.init import init_kaiming_, init_xavier_, zero_bias_
from mmseg.registry import PIXEL_DECODERS, retired
from mmseg.utils.arguments import Count, Share
from mmseg.utils.errors import ConfigError
from mmseg.utils.state_dict_alias import alias_state_dict

_GROUPS = 32
Shapes = Sequence[tuple[int, int]]


class ConvNorm(Conv2d):
    """Convolution without bias, then GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        init_kaiming_(self)
        self.norm = nn.GroupNorm(_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` -> ``[N, C_out, H, W]``."""
        return self.norm(self.convolve(x))

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return super().forward(x)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections.

    Args:
        channels: width of queries, source and result.
        num_levels: maps to sample from.
        num_heads: attention heads; a divisor of ``channels``.
        num_points: samples of a query in each level, for each head.
    """

    def __init__(self, channels: int, num_levels: int, num_heads: int, num_points: int = 4) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(f'conv_dim ({channels}) is not a multiple of transformer_nheads ({num_heads})')
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = Linear(channels, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(channels, num_heads * num_levels * num_points)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Each head looks in one of ``num_heads`` directions, 1 to ``num_points`` pixels away, at equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            zero_bias_(layer)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=1)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        reach = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * reach[:, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        init_xavier_(self.value_proj)
        init_xavier_(self.output_proj)

    def forward(self, query: Tensor, reference_points: Tensor, source: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Samples ``source`` around the reference points.

        Args:
            query: ``[N, Q, C]``, position included.
            reference_points: ``[N or 1, Q, L, 2]``, (x, y) in 0..1.
            source: ``[N, S, C]``, the levels' pixels one after the other.
            spatial_shapes: (h, w) of each level.

        Returns:
            ``[N, Q, C]``.
        """
        n, queries, channels = query.shape
        points = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(source).view(n, -1, self.num_heads, channels // self.num_heads)
        offsets = self.sampling_offsets(query).view(n, queries, *points, 2)
        logits = self.attention_weights(query).view(n, queries, self.num_heads, -1)
        # Autocast would cast all of this to float32 first. The sums are made in float32 anyway, so this gives the same
        # numbers without the copies; only the result is rounded here and not at the door of output_proj.
        with without_autocast(value):
            attended = ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(attended)


class MSDeformAttnEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward network, post-norm."""

    def __init__(self, channels: int, hidden: int, dropout: float, num_levels: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(channels, num_levels, num_heads)
        self.norm1 = LayerNorm(channels)
        self.linear1 = Linear(channels, hidden, activation='relu')
        self.linear2 = Linear(hidden, channels)
        self.norm2 = LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Tokens ``[N, S, C]`` -> the same shape; ``position`` ``[1, S, C]`` is added to queries, not to values."""
        attended = self.self_attn(x + position, reference_points, x, spatial_shapes)
        return chunked(self._feed_forward, x, attended, width=self.linear1.out_features)

    def _feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x)))))


class MSDeformAttnEncoder(nn.Module):
    """Encoder layers over several maps; ``with_cp`` keeps only their inputs for backward."""

    def __init__(
        self,
        channels: int,
        num_levels: int,
        num_layers: int,
        hidden: int,
        num_heads: int,
        dropout: float,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.level_embed = nn.Parameter(torch.randn(num_levels, channels))
        self.layers = nn.ModuleList(
            MSDeformAttnEncoderLayer(channels, hidden, dropout, num_levels, num_heads) for _ in range(num_layers)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[N, C, h, w]`` -> the same shapes, channels-last."""
        shapes = tuple((x.shape[2], x.shape[3]) for x in maps)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        level_embed = self.level_embed.to(tokens.dtype)
        position = torch.cat([
            sine_position_2d(h, w, tokens.shape[2], tokens.device, tokens.dtype).flatten(1).T + embed
            for (h, w), embed in zip(shapes, level_embed)
        ])[None]
        points = pixel_centres(shapes, tokens.device)[None, :, None].expand(-1, -1, len(shapes), -1)
        for layer in self.layers:
            if self.with_cp and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, position, points, shapes, use_reentrant=False)
            else:
                tokens = layer(tokens, position, points, shapes)
        levels = tokens.split([h * w for h, w in shapes], dim=1)
        return [x.unflatten(1, shape).permute(0, 3, 1, 2) for x, shape in zip(levels, shapes)]


@PIXEL_DECODERS.register_module()
@retired(norm=('GN',))
class MSDeformAttnPixelDecoder(nn.Module):
    """Backbone maps to mask features at stride 4 and three maps of strides 32, 16 and 8.

    Args:
        input_shape: name of each backbone map -> ``dict(channels=..., stride=...)``.
        conv_dim: width of all maps inside, a multiple of 32.
        mask_dim: width of the mask features.
        transformer_nheads: attention heads of the encoder.
        transformer_dim_feedforward: hidden width of its feed-forward networks.
        transformer_enc_layers: its layers.
        transformer_dropout: its dropout.
        transformer_in_features: maps that pass through the encoder; the other one enters at the pyramid step.
        common_stride: stride of that other map and of the mask features.
        with_cp: recompute encoder layers in backward instead of keeping what is inside them.

    Raises:
        ConfigError: maps, strides or widths that do not fit together.
    """

    def __init__(
        self,
        input_shape: Mapping[str, Mapping[str, Count]],
        conv_dim: Count = 256,
        mask_dim: Count = 256,
        transformer_nheads: Count = 8,
        transformer_dim_feedforward: Count = 1024,
        transformer_enc_layers: Count = 6,
        transformer_dropout: Share = 0.0,
        transformer_in_features: Sequence[str] = ('res3', 'res4', 'res5'),
        common_stride: int = 4,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name]['stride'])
        fine = [name for name in self.in_features if name not in transformer_in_features]
        unknown = [name for name in transformer_in_features if name not in input_shape]
        if unknown or len(fine) != 1 or input_shape[fine[0]]['stride'] != common_stride:
            raise ConfigError(
                f'pixel_decoder_cfg: expected one map of common_stride={common_stride} besides '
                f'transformer_in_features={list(transformer_in_features)}, but input_shape is '
                f'{ {name: dict(shape) for name, shape in input_shape.items()} }')
        if conv_dim % _GROUPS:
            raise ConfigError(f'pixel_decoder_cfg.conv_dim: expected a multiple of {_GROUPS}, got {conv_dim}')
        self.fine_feature = fine[0]
        self.coarse_features = [name for name in reversed(self.in_features) if name in transformer_in_features]

        self.coarsest_stride = max(shape['stride'] for shape in input_shape.values())
        channels = [input_shape[name]['channels'] for name in self.coarse_features]
        convs = [Conv2d(c, conv_dim, 1) for c in channels]
        for conv in convs:
            init_xavier_(conv)
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(_GROUPS, conv_dim)) for conv in convs)
        self.encoder = MSDeformAttnEncoder(
            conv_dim, len(channels), transformer_enc_layers, transformer_dim_feedforward, transformer_nheads,
            transformer_dropout, with_cp)
        self.lateral = ConvNorm(input_shape[self.fine_feature]['channels'], conv_dim, 1)
        self.output = ConvNorm(conv_dim, conv_dim, 3)
        self.mask_features = Conv2d(conv_dim, mask_dim, 1)
        init_kaiming_(self.mask_features)
        alias_state_dict(self, {
            'encoder.level_embed': 'transformer.level_embed',
            'encoder.layers': 'transformer.encoder.layers',
            'lateral': 'adapter_1',
            'output': 'layer_1',
        })

    def forward(self, features: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Fuses the maps of the backbone.

        Args:
            features: maps ``[N, C_i, h_i, w_i]`` by name, or in order of stride.

        Returns:
            Mask features ``[N, mask_dim, h, w]`` at ``common_stride``, and the encoder's maps ``[N, conv_dim, ., .]``,
            coarsest first.
        """
        if not isinstance(features, Mapping):
            features = dict(zip(self.in_features, features))
        self._check_norm(features)
        projected = [proj(features[name]) for proj, name in zip(self.input_proj, self.coarse_features)]
        maps = self.encoder(projected)
        fine = self.lateral(features[self.fine_feature])
        fine += F.interpolate(maps[-1], size=fine.shape[2:], mode='bilinear', align_corners=False)
        fine = self.output.convolve(fine)  # each result takes the place of the one before: no three at a time
        fine = F.relu(self.output.norm(fine), inplace=True)
        return self.mask_features(fine), maps

    def _check_norm(self, features: Mapping[str, Tensor]) -> None:
        """A GroupNorm cannot be computed where each group has one value."""
        batch, _, height, width = features[self.coarse_features[0]].shape
        if batch * self.mask_features.in_channels * height * width == _GROUPS:
            side = self.coarsest_stride
            raise ConfigError(
                f'frames of at most {side}x{side} pixels give a map of one pixel at stride {side}; with one frame a '
                f'batch and conv_dim={_GROUPS} a group of GroupNorm has one value, which has no deviation: take larger '
                'frames (crop_size of RandomCrop, size of Pad, test_cfg.crop_size, --size), more of them '
                '(data.samples_per_gpu) or more channels (pixel_decoder_cfg.conv_dim)')
