"""What backbones of other libraries have in common: any input size, maps of known strides, frozen parts.

Channels and strides are read from a forward pass without data (on torch's meta device), not written down.  Images are
padded at the bottom and the right to what the model divides evenly, and each map is cropped to ceil(side / stride).  A
plain vision transformer, whose maps all have one stride, gets the simple feature pyramid of ViTDet (Li et al., ECCV
2022, arXiv 2203.16527).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.models.backbones.normalisation import Normalisation
from mmseg.registry import config_path
from mmseg.utils.errors import ConfigError

_STRIDES = (4, 8, 16, 32)
_PROBE = 448  # pixels a side; a multiple of 32, and of patches of 8, 14, 16 and 32


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from the last map of a plain transformer.

    A map is brought to the next power of two of its stride by transposed convolutions or pooling, as in ViTDet for
    patches of 16 pixels; for other patches it is then read at the pixels of the wanted stride (bilinear).

    Args:
        channels: of the map.
        stride: of the map, the patch of the transformer.
        out_channels: of each of the four maps.
    """

    def __init__(self, channels: int, stride: int, out_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.steps = [round(math.log2(stride / wanted)) for wanted in _STRIDES]  # doublings; negative: halvings
        self.levels = nn.ModuleList()
        for steps in self.steps:
            layers: list[nn.Module] = []
            width = channels
            for i in range(steps):
                layers += [*([ChannelNorm(width), nn.GELU()] if i else []), nn.ConvTranspose2d(width, width // 2, 2, 2)]
                width //= 2
            layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-steps)]
            layers += [nn.Conv2d(width, out_channels, 1, bias=False), ChannelNorm(out_channels),
                       nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), ChannelNorm(out_channels)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """``[N, C, h, w]`` -> maps of strides s, ``[N, C', ceil(H / s), ceil(W / s)]``; ``size`` is (H, W)."""
        maps = []
        for steps, wanted, level in zip(self.steps, _STRIDES, self.levels):
            own, stride = level(x), self.stride / 2**steps
            sides = [-(-side // wanted) for side in size]
            maps.append(own[..., : sides[0], : sides[1]] if stride == wanted else _read(own, wanted / stride, sides))
        return maps


def _read(x: Tensor, ratio: float, size: Sequence[int]) -> Tensor:
    """A map at the centres of pixels that are ``ratio`` times as large."""
    axes = [((torch.arange(n, device=x.device) + 0.5) * ratio * 2 / side - 1) for n, side in zip(size, x.shape[2:])]
    rows, columns = torch.meshgrid(*axes, indexing='ij')
    grid = torch.stack([columns, rows], -1).to(x.dtype).expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)


class ExternalBackbone(nn.Module):
    """A model that gives a list of maps, as a backbone.

    Args:
        model: images ``[N, 3, H, W]`` -> maps ``[N, C, h, w]``, by :meth:`maps_of`.
        frozen: no gradient, no graph, always in eval mode; only a pyramid is trained.
        pyramid_channels: channels of each map of a plain transformer's pyramid.

    Attributes:
        out_channels: channels of the maps.
        out_strides: their strides.
        normalisation: what the weights expect of images; None: what the config says.
    """

    normalisation: Normalisation | None = None

    def __init__(self, model: nn.Module, frozen: bool = False, pyramid_channels: int = 256) -> None:
        super().__init__()
        self.model = model
        self.frozen = frozen
        channels, self.strides = self._probe()
        self.pyramid = None
        strides = self.strides
        if len(set(strides)) == 1:
            self.pyramid = SimpleFeaturePyramid(channels[-1], self.strides[-1], pyramid_channels)
            channels, strides = [pyramid_channels] * len(_STRIDES), list(_STRIDES)
        self.out_channels, self.out_strides = tuple(channels), tuple(strides)
        if frozen:
            self.model.requires_grad_(False)
            self.model.eval()

    def maps_of(self, images: Tensor) -> Sequence[Tensor]:
        """The maps of the model; images are padded to what it divides evenly."""
        raise NotImplementedError

    def _probe(self) -> tuple[list[int], list[int]]:
        """Channels and strides of the model's maps."""
        real, self.model = self.model, self.model_without_memory()
        try:
            with torch.no_grad():
                maps = self.maps_of(torch.empty(1, 3, _PROBE, _PROBE, device='meta'))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"{config_path('backbone')}: {type(real).__name__} does not run on images of {_PROBE}x"
                              f'{_PROBE} (is it made for one size?): {error}') from error
        finally:
            self.model = real
        return [x.shape[1] for x in maps], [round(_PROBE / x.shape[2]) for x in maps]

    def model_without_memory(self) -> nn.Module:
        """The model once more, on the meta device."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> ExternalBackbone:
        """As ever, but a frozen model stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` -> maps ``[N, C_i, ceil(H / s_i), ceil(W / s_i)]``."""
        height, width = images.shape[2:]
        divisor = max(self.strides)
        padded = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.maps_of(padded.to(next(self.model.parameters()).dtype))
        if self.pyramid is not None:
            return self.pyramid(maps[-1], (height, width))
        return [x[..., : -(-height // s), : -(-width // s)] for x, s in zip(maps, self.strides)]
