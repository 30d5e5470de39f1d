"""The trained model as three calls: load it, label frames, look at the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

from mmseg.apis.test import predict_item
from mmseg.config import load_config, override
from mmseg.core.precision import Precision
from mmseg.datasets import VSPWDataset
from mmseg.datasets.pipelines import Compose
from mmseg.datasets.pipelines.loading import read_frame
from mmseg.models import build_segmentor
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import config_key
from mmseg.utils.checkpoint import load_checkpoint
from mmseg.utils.dist import pick_device
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import user_path
from mmseg.utils.visual import overlay, write_picture

Frame = str | Path | np.ndarray | Image.Image
_PIL_DEPTHS = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK', 'YCbCr', 'LAB', 'HSV')  # 8 bits


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
        ConfigError: the config is wrong, or this machine has no such device.
        CheckpointError: the checkpoint cannot be read or is of another model.
    """
    device = pick_device(device)
    if isinstance(config, Config):
        cfg = config.copy()
        override(cfg, options or {})
    else:
        cfg = load_config(user_path(config), options)
    model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.get('test_cfg'))
    meta = {} if checkpoint is None else load_checkpoint(model, user_path(checkpoint))
    model.cfg, model.CLASSES, model.PALETTE = cfg, meta.get('CLASSES'), meta.get('PALETTE')
    return model.to(device).eval()


def inference_segmentor(model: EncoderDecoder, frames: Sequence[Frame]) -> list[np.ndarray]:
    """Labels the frames of a clip, with the test pipeline and the precision (``fp16``) of the model's config.

    Args:
        model: from :func:`init_segmentor`.
        frames: T paths, PIL images, or arrays uint8 ``[H, W, 3]`` BGR (grey: ``[H, W]``), of one size and in order; any
            T.  For frames of a video at 15 fps, take them three apart, as in training.

    Returns:
        T label maps, uint8 ``[H, W]`` at the frames' size.

    Raises:
        DataError: a frame that cannot be read or is none, or frames of different sizes.
    """
    if not isinstance(frames, Sequence) or isinstance(frames, str) or len(frames) == 0:
        raise ValueError('frames: expected a list of paths or arrays with at least one frame; wrap a single one in []')
    loaded = [
        user_path(frame) if isinstance(frame, (str, Path)) else as_frame(frame, f'frame #{i}')
        for i, frame in enumerate(frames)
    ]
    views = _test_pipeline(model)({'frames': loaded})
    item = {key: value if isinstance(value, list) else [value] for key, value in views.items()}
    device = next(model.parameters()).device
    with Precision.from_config(model.cfg, device).evaluation(model):
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
        frame: path, PIL image, or uint8 ``[H, W, 3]`` BGR.
        label: uint8 ``[H, W]``; void (255) shows the frame itself.
        palette: [R, G, B] a class; VSPW's where there is none.
        out_file: where the picture is written as well; the suffix names its type.
        opacity: share of the colours, 0..1.

    Returns:
        uint8 ``[H, W, 3]`` BGR.

    Raises:
        DataError: a frame that cannot be read or is none.
        ConfigError: a type of picture that cannot be written.
    """
    if not isinstance(label, np.ndarray) or label.ndim != 2 or label.dtype.kind not in 'iu':
        raise ValueError(f'label: expected a label map as uint8 [H, W], got {_described(label)}')
    picture = overlay(as_frame(frame), label, VSPWDataset.PALETTE if palette is None else palette, opacity)
    if out_file is not None:
        write_picture(out_file, picture)
    return picture


def as_frame(frame: Any, name: str = 'frame') -> np.ndarray:
    """uint8 ``[H, W, 3]`` BGR of what can only be meant in one way: such an array, a grey one, a PIL image, a path.

    Args:
        frame: what the caller has.
        name: of the frame, for errors.

    Raises:
        DataError: anything else, such as floats or a tensor, whose range and order of channels nobody knows.
    """
    if isinstance(frame, (str, Path)):
        return read_frame(str(user_path(frame)))
    array = frame
    if isinstance(frame, Image.Image) and frame.mode in _PIL_DEPTHS:
        array = np.array(frame.convert('RGB'))[..., ::-1]
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.size:
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
            return cv2.cvtColor(array, cv2.COLOR_GRAY2BGR)
        if array.ndim == 3 and array.shape[2] == 3:
            return np.ascontiguousarray(array)
    raise DataError(f'{name}: expected a frame as uint8 [H, W, 3] in BGR, a PIL image or a path, got '
                    f'{_described(frame)}')


def _described(value: Any) -> str:
    """What was given in place of a frame or a label map."""
    if value is None:
        return 'None (which cv2.imread returns for a file that it cannot read)'
    if isinstance(value, Image.Image):
        return f"a PIL image of mode '{value.mode}'"
    kind = type(value).__name__
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        kind += f' {value.dtype} {list(value.shape)}'
    if torch.is_tensor(value):
        kind += '; of a uint8 tensor [3, H, W] in RGB, take tensor.permute(1, 2, 0).flip(-1).numpy()'
    return kind


def _test_pipeline(model: EncoderDecoder) -> Compose:
    """The steps of ``data.test.pipeline``."""
    if model.cfg is None:
        raise ConfigError('inference_segmentor needs a model made by init_segmentor: this one has no config')
    with config_key('data.test.pipeline'):
        return Compose(model.cfg.data.test.pipeline)
