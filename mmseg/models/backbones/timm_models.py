"""Backbones of ``timm`` (Wightman, 2019): any model with ``features_only``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmseg.models.backbones.external import ExternalBackbone
from mmseg.models.backbones.normalisation import Normalisation
from mmseg.registry import BACKBONES, config_path
from mmseg.utils.arguments import Count, Index
from mmseg.utils.errors import ConfigError

_STRIDES = (4, 8, 16, 32)


@BACKBONES.register_module()
class TimmBackbone(ExternalBackbone):
    """Maps of a timm model: those of strides 4, 8, 16 and 32, or the last one of a plain transformer with a pyramid.

    Args:
        name: as ``timm.create_model`` takes it.
        pretrained: True: weights from the hub or its cache; a text: a local file with them.
        out_indices: which of the model's maps; None: as above.
        frozen: no gradient, no graph, always in eval mode.
        pyramid_channels: channels of each map of a plain transformer's pyramid.
        model_args: further arguments of ``timm.create_model``.

    Raises:
        ConfigError: the package is missing, or it has no such model.
    """

    def __init__(
        self, name: str, pretrained: bool | str = False, out_indices: Sequence[Index] | None = None,
        frozen: bool = False, pyramid_channels: Count = 256, model_args: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.pretrained = name, pretrained
        self.arguments = {**(model_args or {}), 'features_only': True}
        if out_indices is not None:
            self.arguments['out_indices'] = tuple(out_indices)
        elif 'out_indices' not in self.arguments:
            self.arguments['out_indices'] = self._indices()
        super().__init__(self._created(), frozen, pyramid_channels)
        self.normalisation = self.normalisation_of({'name': name})

    def _created(self, **options: Any) -> Any:
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"{config_path('backbone')}: TimmBackbone needs timm: pip install 'themask[timm]' "
                              f'({error})') from None
        try:
            return timm.create_model(self.name, **{**self.arguments, **options})
        except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"{config_path('backbone')}.name: '{self.name}' cannot be used: {first}") from error

    def _indices(self) -> tuple[int, ...]:
        with torch.device('meta'):
            strides = self._created().feature_info.reduction()
        if len(set(strides)) == 1:
            return (len(strides) - 1,)
        return tuple(i for i, stride in enumerate(strides) if stride in _STRIDES)

    def model_without_memory(self) -> nn.Module:
        """The model once more, on the meta device."""
        with torch.device('meta'):
            return self._created().eval()

    def maps_of(self, images: Tensor) -> Sequence[Tensor]:
        """The maps of ``out_indices``, channels first."""
        model: Any = self.model
        channels = model.feature_info.channels()
        return [x if x.shape[1] == c else x.permute(0, 3, 1, 2) for x, c in zip(model(images), channels)]

    def init_weights(self) -> None:
        """Loads the weights where ``pretrained`` asks for them.

        Raises:
            ConfigError: they are not there.
        """
        if not self.pretrained:
            return
        if isinstance(self.pretrained, str):
            file = Path(self.pretrained).expanduser()
            if not file.is_file():
                raise ConfigError(f"backbone.pretrained: '{file}' does not exist (looked from {Path.cwd()})")
            source = self._created(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
        else:
            source = self._created(pretrained=True)
        self.model.load_state_dict(source.state_dict())

    @classmethod
    def normalisation_of(cls, arguments: Mapping[str, Any]) -> Normalisation | None:
        """What timm knows of a model's weights; None where it has none."""
        try:
            from timm.models import get_pretrained_cfg
        except ImportError:  # building the model says so
            return None
        cfg = get_pretrained_cfg(arguments.get('name', ''), allow_unregistered=True)
        if cfg is None or not cfg.mean or not cfg.std:
            return None
        return Normalisation(tuple(255 * x for x in cfg.mean), tuple(255 * x for x in cfg.std))
