"""Backbones of Hugging Face's ``transformers``: Swin, ConvNeXt, DINOv2, DINOv3, ResNet, PVT, Hiera and others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmseg.models.backbones.external import ExternalBackbone
from mmseg.models.backbones.normalisation import Normalisation
from mmseg.registry import BACKBONES, config_path
from mmseg.utils.arguments import Count
from mmseg.utils.errors import ConfigError

_INSTALL = "HFBackbone needs transformers: pip install 'themask[hf]'"


@BACKBONES.register_module()
class HFBackbone(ExternalBackbone):
    """Any model of ``transformers.AutoBackbone``.

    Args:
        name: a folder with the model's ``config.json``, or a name on the hub, of which the local cache is enough.
        pretrained: take the weights from there; otherwise they are random.
        out_features: names of the maps, as ``['stage1', 'stage2', 'stage3', 'stage4']``; None: all stages, or the last
            layer of a plain transformer.
        frozen: no gradient, no graph, always in eval mode.
        with_cp: compute activations again in the backward pass (less memory, more time).
        pyramid_channels: channels of each map of a plain transformer's pyramid.

    Raises:
        ConfigError: the package or the model is missing, it has no backbone, or not these features.
    """

    def __init__(
        self, name: str, pretrained: bool = False, out_features: Sequence[str] | None = None, frozen: bool = False,
        with_cp: bool = False, pyramid_channels: Count = 256,
    ) -> None:
        self.name, self.pretrained = name, pretrained
        self.config = _config_of(name, out_features)
        super().__init__(_model_of(self.config), frozen, pyramid_channels)
        self.normalisation = self.normalisation_of({'name': name})
        if with_cp:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]

    @classmethod
    def normalisation_of(cls, arguments: Mapping[str, Any]) -> Normalisation | None:
        """What the processor config of a model says; None where there is none."""
        try:
            from transformers.image_processing_base import ImageProcessingMixin
        except ImportError:  # building the model says so
            return None
        try:
            processor = ImageProcessingMixin.get_image_processor_dict(arguments['name'])[0]
        except (OSError, ValueError, KeyError):
            return None
        mean, std = processor.get('image_mean'), processor.get('image_std')
        if not mean or not std:
            return None
        scale = 1 / processor.get('rescale_factor', 1 / 255)
        return Normalisation(tuple(scale * x for x in mean), tuple(scale * x for x in std))

    def model_without_memory(self) -> nn.Module:
        """The model once more, on the meta device."""
        with torch.device('meta'):
            return _model_of(copy.deepcopy(self.config)).eval()

    def maps_of(self, images: Tensor) -> Sequence[Tensor]:
        """The maps of ``out_features``."""
        return self.model(images).feature_maps

    def init_weights(self) -> None:
        """Loads the weights where ``pretrained`` is asked for.

        Raises:
            ConfigError: they are not there.
        """
        if not self.pretrained:
            return
        model: Any = type(self.model)
        with _named_errors(self.name):
            source = model.from_pretrained(self.name, config=copy.deepcopy(self.config))
        self.model.load_state_dict(source.state_dict())


class _named_errors:
    """Inside, errors of the library become one that names the model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, KeyError, AttributeError, TypeError)):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"{config_path('backbone')}.name: '{self.name}' cannot be used: {first}") from error


def _config_of(name: str, out_features: Sequence[str] | None) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(f'{config_path("backbone")}: {_INSTALL} ({error})') from None
    with _named_errors(name):
        config = AutoConfig.from_pretrained(name)
        stages = getattr(config, 'stage_names', None)
        if not stages:
            raise ValueError(f'a {type(config).__name__} has no stages, so it is no backbone of transformers')
        if out_features is not None and not set(out_features) <= set(stages):
            raise ValueError(f'out_features {list(out_features)} are not among its stages {stages}')
        if out_features is None:
            out_features = [stage for stage in stages if stage.startswith('stage')]
            if hasattr(config, 'patch_size') and not hasattr(config, 'depths'):  # a plain transformer
                out_features = out_features[-1:]
        config.out_features = list(out_features)
        return config


def _model_of(config: Any) -> Any:
    from transformers import AutoBackbone

    with _named_errors(config.name_or_path):
        return AutoBackbone.from_config(config)
