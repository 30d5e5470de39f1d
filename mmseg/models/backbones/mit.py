"""Mix Transformer (MiT), the hierarchical encoder of SegFormer (Xie et al., arXiv 2105.15203).

Four stages of strides 4, 8, 16 and 32.  Feature maps travel as ``[N, H, W, C]``: attention and linear layers read them
as tokens, convolutions as a channels-last view, and nothing is copied between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg.kernels.layers import Conv2d, LayerNorm, Linear, attention
from mmseg.models.init import init_transformer_
from mmseg.registry import BACKBONES, register_variant, retired
from mmseg.utils.arguments import Count, Factor, Share

_NORM_EPS = 1e-6  # blocks and stage ends; patch embedding and spatial reduction keep torch's default


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv`` on ``[N, H, W, C]``; the channels-last view makes the kernel read and write in this order."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Drops the whole branch of a sample with probability ``rate`` while training (arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, samples first; the kept ones are divided by ``1 - rate``."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep)


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping windows, and LayerNorm."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2)
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C_in]`` -> ``[N, ceil(H / stride), ceil(W / stride), C]``."""
        return self.norm(_convolve(self.proj, x))


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map reduced by ``sr_ratio``."""

    def __init__(self, channels: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f'{channels} channels cannot be split into {num_heads} heads')
        self.num_heads = num_heads
        self.q = Linear(channels, channels)
        self.kv = Linear(channels, 2 * channels)
        self.proj = Linear(channels, channels)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` -> the same shape."""
        n, _, _, channels = x.shape
        source = self.norm(_convolve(self.sr, x)) if self.sr_ratio > 1 else x
        query = self.q(x).view(n, -1, self.num_heads, channels // self.num_heads).transpose(1, 2)
        key, value = self.kv(source).view(n, -1, 2, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution, the only source of position in MiT, and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = Conv2d(channels, channels, 3, padding=1, groups=channels, activation='gelu')

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` -> the same shape."""
        return _convolve(self.dwconv, x)


class MixFFN(nn.Module):
    """Linear, depthwise 3x3, GELU, linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` -> the same shape."""
        return self.fc2(self.dwconv(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and Mix-FFN, each on a residual branch."""

    def __init__(self, channels: int, num_heads: int, sr_ratio: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=_NORM_EPS)
        self.attn = Attention(channels, num_heads, sr_ratio)
        self.norm2 = LayerNorm(channels, eps=_NORM_EPS)
        self.mlp = MixFFN(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` -> the same shape."""
        x, normed = self.norm2.add(x, self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(normed))


@retired(style=('pytorch',))
class MixTransformer(nn.Module):
    """MiT of any size; ``mit_b0`` to ``mit_b5`` are the table :data:`VARIANTS`.

    Args:
        embed_dims: channels of the four stages.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; each divides its channels.
        sr_ratios: reduction of keys and values in each stage.
        mlp_ratios: hidden width of the Mix-FFN over the channels, for each stage.
        in_channels: channels of the image.
        drop_path_rate: of the last block; rises linearly from 0 over all blocks.
        with_cp: keep only block inputs for backward and compute the rest again (less memory, more time).

    Attributes:
        out_channels: channels of the four maps.
        out_strides: their strides.
    """

    out_strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(
        self,
        embed_dims: Sequence[Count],
        depths: Sequence[Count],
        num_heads: Sequence[Count] = (1, 2, 5, 8),
        sr_ratios: Sequence[Count] = (8, 4, 2, 1),
        mlp_ratios: Sequence[Factor] = (4, 4, 4, 4),
        in_channels: Count = 3,
        drop_path_rate: Share = 0.1,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        settings = dict(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, sr_ratios=sr_ratios, mlp_ratios=mlp_ratios)
        for name, values in settings.items():
            if len(values) != 4:
                raise ValueError(f'{name}: expected one value for each of the 4 stages, got {list(values)}')
        self.out_channels = tuple(embed_dims)
        self.with_cp = with_cp
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        for stage in range(4):
            channels = embed_dims[stage]
            blocks = [
                Block(channels, num_heads[stage], sr_ratios[stage], mlp_ratios[stage], next(rates))
                for _ in range(depths[stage])
            ]
            patch = (7, 4) if stage == 0 else (3, 2)
            # The names that checkpoints use; a list of stages would rename every tensor.
            setattr(self, f'patch_embed{stage + 1}', OverlapPatchEmbed(in_channels, channels, *patch))
            setattr(self, f'block{stage + 1}', nn.ModuleList(blocks))
            setattr(self, f'norm{stage + 1}', LayerNorm(channels, eps=_NORM_EPS))
            in_channels = channels
        init_transformer_(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[N, C, H, W]`` -> four channels-last maps ``[N, C_i, ceil(H / s), ceil(W / s)]``, s = 4, 8, 16, 32."""
        x = images.to(next(self.parameters()).dtype).permute(0, 2, 3, 1).contiguous()
        maps = []
        for stage in range(1, 5):
            x = getattr(self, f'patch_embed{stage}')(x)
            for block in getattr(self, f'block{stage}'):
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            x = getattr(self, f'norm{stage}')(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


_WIDE = (64, 128, 320, 512)
VARIANTS: dict[str, dict[str, Any]] = {
    'mit_b0': dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    'mit_b1': dict(embed_dims=_WIDE, depths=(2, 2, 2, 2)),
    'mit_b2': dict(embed_dims=_WIDE, depths=(3, 4, 6, 3)),
    'mit_b3': dict(embed_dims=_WIDE, depths=(3, 4, 18, 3)),
    'mit_b4': dict(embed_dims=_WIDE, depths=(3, 8, 27, 3)),
    'mit_b5': dict(embed_dims=_WIDE, depths=(3, 6, 40, 3)),
}


mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5 = (
    register_variant(BACKBONES, name, MixTransformer, **row) for name, row in VARIANTS.items()
)
