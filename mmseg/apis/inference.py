"""The trained model as three calls: load it, label frames, look at the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from mmseg.apis.test import predict_item
from mmseg.core.checkpoint import load_checkpoint
from mmseg.core.precision import Precision
from mmseg.datasets import VSPWDataset
from mmseg.datasets.pipelines import Compose
from mmseg.datasets.pipelines.loading import read_frame
from mmseg.models import build_segmentor
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import standing_at
from mmseg.utils.config import load_config, override
from mmseg.utils.errors import ConfigError
from mmseg.utils.visual import overlay, write_picture

Frame = str | Path | np.ndarray


def init_segmentor(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | torch.device = 'cpu',
    options: Mapping[str, Any] | None = None,
) -> EncoderDecoder:
    """Builds a model for inference.

    Args:
        config: a config file, or one that is loaded.
        checkpoint: a checkpoint file, or a work dir (then its newest whole checkpoint); without it the weights are
            random.  ``model.pretrained`` is not read.
        device: where the model runs.
        options: overrides, dotted keys to values: ``{'model.test_cfg.mode': 'whole'}``.

    Returns:
        The model in eval mode; ``model.cfg`` is its config, ``model.CLASSES`` and ``model.PALETTE`` are those of the
        data set that the checkpoint was trained on (None where it does not say).

    Raises:
        ConfigError: the config is wrong.
        CheckpointError: the checkpoint cannot be read or is of another model.
    """
    if isinstance(config, Config):
        cfg = config.copy()
        override(cfg, options or {})
    else:
        cfg = load_config(config, options)
    model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.get('test_cfg'))
    meta = {} if checkpoint is None else load_checkpoint(model, checkpoint)
    model.cfg, model.CLASSES, model.PALETTE = cfg, meta.get('CLASSES'), meta.get('PALETTE')
    return model.to(device).eval()


def inference_segmentor(model: EncoderDecoder, frames: Sequence[Frame]) -> list[np.ndarray]:
    """Labels the frames of a clip, with the test pipeline and the precision (``fp16``) of the model's config.

    Args:
        model: from :func:`init_segmentor`.
        frames: T paths, or uint8 ``[H, W, 3]`` BGR arrays, of one size and in order; any T.  For frames of a video at
            15 fps, take them three apart, as in training.

    Returns:
        T label maps, uint8 ``[H, W]`` at the frames' size.

    Raises:
        DataError: a frame that cannot be read, or frames of different sizes.
    """
    if isinstance(frames, (str, Path, np.ndarray)) or len(frames) == 0:
        raise ValueError('frames: expected a list of paths or arrays with at least one frame; wrap a single one in []')
    views = _test_pipeline(model)({'frames': list(frames)})
    item = {key: value if isinstance(value, list) else [value] for key, value in views.items()}
    device = next(model.parameters()).device
    with Precision.from_config(model.cfg, device).autocast():
        return list(predict_item(model, item, device))


def show_result(
    frame: Frame,
    label: np.ndarray,
    palette: Sequence[Sequence[int]] | None = None,
    out_file: str | Path | None = None,
    opacity: float = 0.5,
) -> np.ndarray:
    """Draws a label map over its frame.

    Args:
        frame: path, or uint8 ``[H, W, 3]`` BGR.
        label: uint8 ``[H, W]``; void (255) shows the frame itself.
        palette: [R, G, B] a class; VSPW's where there is none.
        out_file: where the picture is written as well; the suffix names its type.
        opacity: share of the colours, 0..1.

    Returns:
        uint8 ``[H, W, 3]`` BGR.
    """
    image = frame if isinstance(frame, np.ndarray) else read_frame(str(frame))
    picture = overlay(image, label, VSPWDataset.PALETTE if palette is None else palette, opacity)
    if out_file is not None:
        write_picture(out_file, picture)
    return picture


def _test_pipeline(model: EncoderDecoder) -> Compose:
    """The steps of ``data.test.pipeline``."""
    if model.cfg is None:
        raise ConfigError('inference_segmentor needs a model made by init_segmentor: this one has no config')
    with standing_at('data.test.pipeline'):
        return Compose(model.cfg.data.test.pipeline)
