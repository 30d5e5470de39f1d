"""The last steps: tensors, and what leaves the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from mmseg.registry import PIPELINES
from mmseg.utils.errors import ConfigError

from .transform import Results, Transform, is_clip, materialise

_META_KEYS = (
    'filename', 'ori_filename', 'ori_shape', 'img_shape', 'pad_shape', 'scale_factor', 'flip', 'flip_direction',
    'img_norm_cfg', 'all_names', 'video')


def _image_tensor(frames: list[np.ndarray] | np.ndarray) -> torch.Tensor:
    """Frames [H,W,C] to a contiguous [T,C,H,W] tensor of their dtype; a bare frame to [C,H,W]."""
    clip = frames if isinstance(frames, list) else [frames]
    height, width, channels = clip[0].shape
    out = np.empty((len(clip), channels, height, width), clip[0].dtype)
    for planes, frame in zip(out, clip):
        cv2.split(frame, list(planes))
    tensor = torch.from_numpy(out)
    return tensor if is_clip(frames) else tensor[0]


@PIPELINES.register_module(name=['DefaultFormatBundle', 'DefaultFormatBundle_clips'])
class DefaultFormatBundle(Transform):
    """``img`` to [T,3,H,W] and ``gt_semantic_seg`` to [T,1,H,W] int64; without the T for a bare image."""

    def apply(self, results: Results) -> Results:
        """Turns arrays to tensors."""
        materialise(results)
        results['img'] = _image_tensor(results['img'])
        if 'gt_semantic_seg' in results:
            labels = torch.from_numpy(np.asarray(results['gt_semantic_seg'])).long()
            results['gt_semantic_seg'] = labels.unsqueeze(-3)
        return results


@PIPELINES.register_module(name=['ImageToTensor', 'ImageToTensor_clips'])
class ImageToTensor(Transform):
    """The frames under each of ``keys`` to a [T,C,H,W] tensor."""

    def __init__(self, keys: Sequence[str]):
        self.keys = keys

    def apply(self, results: Results) -> Results:
        """Turns arrays to tensors."""
        for key in self.keys:
            results[key] = _image_tensor(results[key])
        return results


@PIPELINES.register_module()
class Collect(Transform):
    """Keeps ``keys``, and what is known of the clip as ``img_metas``.

    Args:
        keys: what the model gets.
        meta_keys: keys of ``img_metas``; by default all that mmsegmentation 0.x has, ``all_names`` and ``video``, as
            far as they are there.
    """

    def __init__(self, keys: Sequence[str], meta_keys: Sequence[str] | None = None):
        self.keys = keys
        self.meta_keys = meta_keys

    def apply(self, results: Results) -> Results:
        """A new dict with ``keys`` and ``img_metas``."""
        wanted = _META_KEYS if self.meta_keys is None else (*self.meta_keys, 'video')
        missing = [key for key in (*self.keys, *(self.meta_keys or ())) if key not in results]
        if missing:
            raise ConfigError(f'Collect: no step before it made {missing}; there are {sorted(results)}')
        return {
            **{key: results[key] for key in self.keys},
            'img_metas': {key: results[key] for key in wanted if key in results},
        }
