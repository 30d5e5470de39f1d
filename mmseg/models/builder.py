"""Models from configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import SEGMENTORS, build
from mmseg.utils.errors import ConfigError


def build_segmentor(
    cfg: Mapping[str, Any], train_cfg: Mapping[str, Any] | None = None, test_cfg: Mapping[str, Any] | None = None
) -> EncoderDecoder:
    """Builds the model of a config's ``model`` section, which is left unchanged: it can be built again.

    Args:
        cfg: ``type`` and arguments of the segmentor.
        train_cfg: the section of that name, where it stands beside ``model`` as in old configs.
        test_cfg: the same.

    Raises:
        ConfigError: naming the key that is wrong and where it stands; ``train_cfg`` or ``test_cfg`` stands in both
            places and differs.
    """
    beside = {'train_cfg': train_cfg, 'test_cfg': test_cfg}
    for key, value in beside.items():
        within = cfg.get(key) if isinstance(cfg, Mapping) else None
        if value is not None and within is not None and value != within:
            raise ConfigError(
                f'{key}: {dict(value)} at the top level, but model.{key} is {dict(within)}; keep one of the two')
    return build(SEGMENTORS, cfg, 'model', **{key: value for key, value in beside.items() if value is not None})
