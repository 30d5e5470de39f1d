"""Models from configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import SEGMENTORS, build


def build_segmentor(
    cfg: Mapping[str, Any], train_cfg: Mapping[str, Any] | None = None, test_cfg: Mapping[str, Any] | None = None
) -> EncoderDecoder:
    """Builds the model of a config's ``model`` section, which is left unchanged: it can be built again.

    Args:
        cfg: ``type`` and arguments of the segmentor.
        train_cfg: the section of that name, where it stands beside ``model`` as in old configs.
        test_cfg: the same.

    Raises:
        ConfigError: naming the key that is wrong and where it stands.
    """
    beside = {'train_cfg': train_cfg, 'test_cfg': test_cfg}
    return build(SEGMENTORS, cfg, 'model', **{key: value for key, value in beside.items() if value is not None})
