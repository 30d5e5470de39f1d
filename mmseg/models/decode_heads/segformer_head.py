"""SegFormer's all-MLP head (Xie et al., NeurIPS 2021, arXiv 2105.15203): a baseline, each frame by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.layers import Conv2d, Linear
from mmseg.registry import HEADS, retired
from mmseg.utils.arguments import Count, Label, Share, Weight
from mmseg.utils.images import UNKNOWN, VOID
from mmseg.utils.state_dict_alias import drop_dead_keys


class Projection(nn.Module):
    """A linear layer on the channels of a map; it has this name in released weights."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> ``[N, C', h, w]``."""
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """1x1 convolution, batch norm and ReLU, as mmcv's ``ConvModule`` names them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> ``[N, C', h, w]``."""
        return F.relu(self.bn(self.conv(x)))


@HEADS.register_module(name=['SegformerHead', 'SegFormerHead'])
@retired(
    channels=(128,), norm_cfg=({'type': 'SyncBN', 'requires_grad': True}, {'type': 'BN', 'requires_grad': True}),
    align_corners=(False,), feature_strides=([4, 8, 16, 32],), in_index=([0, 1, 2, 3],), in_channels=())
class SegformerHead(nn.Module):
    """Four maps, projected to one width and brought to stride 4, fused by a 1x1 convolution to logits of each pixel.

    State-dict names are those of SegFormer's released checkpoints.  Frames of a clip do not see each other.

    Args:
        num_classes: K.
        embed_dim: width of the projections: 256 in SegFormer-B0 and B1, 768 in the larger ones.
        dropout_ratio: of channels before the last layer.
        input_shape: name of each map -> ``dict(channels=..., stride=...)``; the segmentor fills in its backbone's.
        class_weight: of each class in the cross-entropy.
        loss_weight: factor on the loss.
        ignore_value: the void label.
    """

    score_kind: Literal['mass', 'logits'] = 'logits'

    def __init__(
        self,
        num_classes: Count,
        embed_dim: Count = 256,
        dropout_ratio: Share = 0.1,
        input_shape: Mapping[str, Mapping[str, Count]] | None = None,
        class_weight: Sequence[Weight] | None = None,
        loss_weight: Weight = 1.0,
        ignore_value: Label = VOID,
    ) -> None:
        super().__init__()
        channels = [shape['channels'] for shape in (input_shape or {}).values()]
        if class_weight is not None and len(class_weight) != num_classes:
            raise ValueError(f'class_weight: expected {num_classes} numbers, got {len(class_weight)}')
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        for i, width in enumerate(channels, 1):
            setattr(self, f'linear_c{i}', Projection(width, embed_dim))
        self.linear_fuse = Fusion(embed_dim * len(channels), embed_dim)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.linear_pred = Conv2d(embed_dim, num_classes, 1)
        nn.init.normal_(self.linear_pred.weight, std=0.01)
        self.class_weight: Tensor | None
        weights = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        self.register_buffer('class_weight', weights, persistent=False)
        self._right: tuple[Tensor, Tensor] | None = None
        drop_dead_keys(self, ('conv_seg',))

    def encode(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[N, K, h, w]`` at the stride of the finest map."""
        maps = [getattr(self, f'linear_c{i}')(x) for i, x in enumerate(features, 1)]
        size = maps[0].shape[2:]
        coarse = [F.interpolate(x, size, mode='bilinear', align_corners=False) for x in maps[1:]]
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat([*coarse[::-1], maps[0]], 1))))

    def scores_of(self, encoded: Tensor, num_frames: int, state: None = None) -> tuple[Tensor, None]:
        """The logits by clip, ``[B, T, K, h, w]``; no memory."""
        return encoded.unflatten(0, (-1, num_frames)), None

    def loss(self, features: Sequence[Tensor], labels: Tensor, iteration: int = 0) -> dict[str, Tensor]:
        """``loss_ce``: the mean over pixels that are neither void nor unknown; labels ``[B, T, H, W]``."""
        labels = labels.flatten(0, 1).long()
        logits = F.interpolate(self.encode(features).float(), labels.shape[1:], mode='bilinear', align_corners=False)
        known = (labels != self.ignore_value) & (labels != UNKNOWN)
        wanted = labels.where(known, labels.new_tensor(VOID))
        each = F.cross_entropy(logits, wanted, self.class_weight, ignore_index=VOID, reduction='none')
        number = known.sum()
        self._right = (logits.detach().argmax(1) == wanted).sum().float(), number.float()
        return {'decode.loss_ce': self.loss_weight * each.sum() / number.clamp(min=1)}

    def statistics(self) -> dict[str, Tensor]:
        """``acc_seg``: the share of right pixels in the last loss."""
        return {} if self._right is None else {'acc_seg': torch.stack(self._right)}

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Nothing that is worth it."""
        return []
