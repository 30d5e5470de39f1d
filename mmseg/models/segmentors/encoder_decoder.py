"""The segmentor: backbone and decode head, training losses, and inference on clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.label_map import ScoreView, label_map, resize_matrix, window_matrix, window_starts
from mmseg.kernels.layers import chunks
from mmseg.registry import (
    BACKBONES,
    HEADS,
    SEGMENTORS,
    build,
    check,
    check_arguments,
    config_key,
    config_path,
)
from mmseg.utils.arguments import Index
from mmseg.utils.checkpoint import load_weights, read_checkpoint
from mmseg.utils.errors import ConfigError

_FEATURES = ('res2', 'res3', 'res4', 'res5')
Size = tuple[int, int]


@dataclass
class InferenceConfig:
    """How a clip that is larger than the training crop is predicted (``test_cfg``).

    Attributes:
        mode: ``whole``: at once; ``slide``: in overlapping windows whose scores are averaged.
        crop_size: (height, width) of a window, or the side of a square one; ``slide`` only.
        stride: (rows, columns) from window to window, or one number for both; ``slide`` only.
    """

    mode: str = 'whole'
    crop_size: Index | tuple[Index, Index] = (0, 0)
    stride: Index | tuple[Index, Index] = (0, 0)

    def __post_init__(self) -> None:
        where = config_path('test_cfg')
        if self.mode not in ('whole', 'slide'):
            raise ConfigError(f"{where}.mode: expected 'whole' or 'slide', got {self.mode!r}")
        self.window, self.step = _pair(self.crop_size), _pair(self.stride)
        for name, value in (('crop_size', self.window), ('stride', self.step)):
            if self.mode == 'slide' and (len(value) != 2 or min(value) < 1):
                raise ConfigError(f"{where}.{name}: mode 'slide' needs two positive numbers, got {value!r}")
        if any(step > crop for step, crop in zip(self.step, self.window)):
            raise ConfigError(
                f'{where}.stride: {self.stride} is more than crop_size {self.crop_size}; windows would leave gaps')


def _pair(value: int | Size) -> Size:
    return (value, value) if isinstance(value, int) else value


@SEGMENTORS.register_module(name='EncoderDecoder_clips')
class EncoderDecoder(nn.Module):
    """Semantic segmentation of clips; an image is a clip of one.

    ::

        loss(clip [B, T, 3, H, W], label [B, T, H, W])         predict(views of [B, T, 3, H, W], size)
              |                                                      |
              |  frames side by side: [B * T, 3, H, W]               |  scores(clip) [B, T, K, H/4, W/4]
              v                                                      v
        backbone  ->  4 maps, strides 4 .. 32  ------------->  decode_head.scores: mean over levels of
              |                                                sum_q p(class | q) * sigmoid(mask_q)
              v                                                      |
        decode_head.loss                                             v
           pixel_decoder: maps -> mask features at stride 4,   label_map: resize to the input, resize to the
                          three maps of strides 32, 16, 8      original size, argmax -> [B, T, H0, W0]
           predictor:     queries -> classes and mask tubes
           criterion:     two matchings, two losses

    Args:
        backbone: ``type`` and arguments of the backbone.
        decode_head: ``type`` and arguments of the head; its ``input_shape`` is the backbone's where it has none.
        pretrained: local file with the backbone's weights, loaded by :meth:`init_weights`.
        train_cfg: accepted empty, as in mmsegmentation.
        test_cfg: fields of :class:`InferenceConfig`.
        compile_cfg: arguments of ``torch.compile``, for backbone, pixel decoder and predictor; ``None`` runs them as
            they are.  Matching, losses and label maps are not compiled.

    Attributes:
        cfg: the whole config, where :func:`mmseg.apis.init_segmentor` made the model.
        CLASSES: names of the classes, likewise.
        PALETTE: [R, G, B] of each class, likewise.
        compiled: whether there is a ``compile_cfg``.

    Raises:
        ConfigError: parts, or arguments of parts, that do not exist or do not fit.
    """

    cfg: Any = None
    CLASSES: Sequence[str] | None = None
    PALETTE: Sequence[Sequence[int]] | None = None

    def __init__(
        self,
        backbone: Annotated[Mapping[str, Any], BACKBONES],
        decode_head: Annotated[Mapping[str, Any], HEADS],
        pretrained: str | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Annotated[Mapping[str, Any] | None, InferenceConfig] = None,
        compile_cfg: Annotated[Mapping[str, Any] | None, torch.compile] = None,
    ) -> None:
        super().__init__()
        if train_cfg:
            raise ConfigError(f'train_cfg: no keys are known here, got {sorted(train_cfg)}')
        self.inference = build(InferenceConfig, test_cfg, 'test_cfg')
        self.pretrained = pretrained
        self.backbone = build(BACKBONES, backbone, 'backbone')
        with config_key('decode_head') as where:
            check(decode_head, where, HEADS)
        shape = _input_shape(self.backbone, decode_head)
        self.decode_head = build(HEADS, decode_head, 'decode_head', input_shape=shape)
        self.compiled = compile_cfg is not None
        if compile_cfg is not None:
            with config_key('compile_cfg') as where:
                options = check_arguments(torch.compile, compile_cfg, where)
            for part in (self.backbone, self.decode_head.pixel_decoder, self.decode_head.predictor):
                try:
                    part.compile(**options)
                except (TypeError, RuntimeError) as error:
                    raise ConfigError(f'{where}: torch.compile: {error}') from error

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.decode_head.num_classes

    def init_weights(self) -> None:
        """Loads ``pretrained`` into the backbone; does nothing where it is ``None``.

        SegFormer's ImageNet checkpoints fit as they are; their classifier ``head.*`` is left out.

        Raises:
            ConfigError: the file does not exist.
            CheckpointError: it cannot be read, or holds another backbone.
        """
        if self.pretrained is None:
            return
        if not Path(self.pretrained).is_file():
            raise ConfigError(
                f"model.pretrained: '{self.pretrained}' does not exist (looked from {Path.cwd()}).  Put the ImageNet "
                'weights there, name another local file, or start from random weights with '
                '--options model.pretrained=None')
        weights = read_checkpoint(self.pretrained)['state_dict']
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith('head.')}
        load_weights(self.backbone, weights, self.pretrained)

    def forward(self, clip: Tensor, label: Tensor, iteration: int = 0) -> dict[str, Tensor]:
        """:meth:`loss`, under the name that ``DistributedDataParallel`` calls."""
        return self.loss(clip, label, iteration)

    def loss(self, clip: Tensor, label: Tensor, iteration: int = 0) -> dict[str, Tensor]:
        """Weighted training losses, to be summed.

        Args:
            clip: normalised frames ``[B, T, 3, H, W]``.
            label: integers ``[B, T, H, W]``, 255 where void.
            iteration: training iteration; some losses start after a warm-up.

        Returns:
            Name -> float32 scalar.
        """
        self._check_clip(clip)
        if label.shape != (*clip.shape[:2], *clip.shape[3:]):
            raise ValueError(f'label: expected [B, T, H, W] of clip {list(clip.shape)}, got {list(label.shape)}')
        self.begin_step()
        return self.decode_head.loss(self.backbone(clip.flatten(0, 1)), label, iteration)

    def statistics(self) -> dict[str, Tensor]:
        """Shares that describe the last :meth:`loss`, for the logs; those of the head, where it has any.

        Returns:
            Name -> (count, of how many), float32 ``[2]``.
        """
        return getattr(self.decode_head, 'statistics', dict)()

    def scores(self, clip: Tensor, size: Size | None = None) -> Tensor:
        """Scores of every pixel (not normalised over classes); the argmax over K is the prediction.

        Args:
            clip: normalised frames ``[B, T, 3, H, W]``.
            size: (height, width) wanted; reached from stride 4 over the size of ``clip``.

        Returns:
            ``[B, T, K, h, w]``, at ``size``; without it at stride 4 (mode ``slide``: at the size of ``clip``).
        """
        self._check_clip(clip)
        if self.inference.mode == 'slide':
            scores, rows, columns = self._slide_scores(clip)
            scores = rows.to(scores).T @ scores @ columns.to(scores)
        else:
            scores = self._whole_scores(clip)
            if size is not None:
                scores = _resize(scores, (clip.shape[3], clip.shape[4]))
        return scores if size is None else _resize(scores, size)

    @torch.no_grad()
    def predict(self, views: Sequence[Tensor], flips: Sequence[str | None], size: Size) -> Tensor:
        """Label maps of a batch of clips.

        Args:
            views: the same clips, each view ``[B, T, 3, h_v, w_v]``: resized and flipped in its own way.
            flips: how each view is flipped: ``'horizontal'``, ``'vertical'`` or ``None``.
            size: (height, width) of the label maps.

        Returns:
            uint8 ``[B, T, height, width]``.
        """
        if len(views) != len(flips) or not views:
            raise ValueError(f'expected as many views as flips and at least one, got {len(views)} and {len(flips)}')
        labels = label_map([self._view(clip, flip, size) for clip, flip in zip(views, flips)])
        return labels.view(*views[0].shape[:2], *size)

    def _view(self, clip: Tensor, flip: str | None, size: Size) -> ScoreView:
        """Scores of one view and the matrices that bring them, flipped back, to ``size``."""
        self._check_clip(clip)
        height, width = clip.shape[3:]
        if self.inference.mode == 'slide':
            scores, rows, columns = self._slide_scores(clip)
            rows, columns = rows @ resize_matrix(height, size[0]), columns @ resize_matrix(width, size[1])
        else:
            scores = self._whole_scores(clip)
            rows = resize_matrix(scores.shape[3], height, size[0])
            columns = resize_matrix(scores.shape[4], width, size[1])
        if flip == 'horizontal':
            columns = columns.flip(1)
        elif flip == 'vertical':
            rows = rows.flip(1)
        elif flip is not None:
            raise ValueError(f"flip: expected 'horizontal', 'vertical' or None, got {flip!r}")
        return ScoreView(scores.flatten(0, 1), rows, columns)

    def _whole_scores(self, clip: Tensor) -> Tensor:
        """``[B, T, K, h, w]`` at stride 4."""
        return self.decode_head.encoded_scores(*self.encode(clip.flatten(0, 1)), clip.shape[1])

    def encode(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What backbone and pixel decoder make of every frame alone; the first of the two steps to scores.

        Without gradients on the CPU one frame follows the other, the same sums in the memory of one frame: a CPU has
        nothing from a batch, and the C library gives tensors above 32 MiB back to the system after every use.

        Args:
            frames: normalised, ``[N, 3, H, W]``.

        Returns:
            Mask features (stride 4) and three maps (strides 32, 16, 8), each ``[N, ...]``: arguments of
            ``decode_head.encoded_scores``.
        """
        self.begin_step()
        batch = torch.is_grad_enabled() or self.compiled
        parts = [self.decode_head.encode(self.backbone(x)) for x in ([frames] if batch else chunks(frames, 1))]
        if len(parts) == 1:
            return parts[0]
        mask_features, maps = zip(*parts)
        return torch.cat(mask_features), [torch.cat(level) for level in zip(*maps)]

    def _slide_scores(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of overlapping windows side by side, and the matrices that average them at the size of ``clip``.

        The windows stand on a grid, so the number of windows over a pixel is a product of one number per axis, and so
        is the weight of each window.

        Returns:
            Scores ``[B, T, K, rows of windows * h, columns of windows * w]``; matrices ``[., H]`` and ``[., W]``.
        """
        height, width = clip.shape[3:]
        crop_height, crop_width = self.inference.window
        tops = window_starts(height, crop_height, self.inference.step[0])
        lefts = window_starts(width, crop_width, self.inference.step[1])
        scores = torch.cat([
            torch.cat([self._whole_scores(clip[..., y : y + crop_height, x : x + crop_width]) for x in lefts], dim=4)
            for y in tops
        ], dim=3)
        rows = window_matrix(height, crop_height, tops, scores.shape[3] // len(tops))
        columns = window_matrix(width, crop_width, lefts, scores.shape[4] // len(lefts))
        return scores, rows, columns

    def begin_step(self) -> None:
        """Tells CUDA graphs of compiled parts (mode ``reduce-overhead``) that results of the last call are done with.

        Without it the backbone's maps would count as needed still when the next clip overwrites them.  Who calls parts
        by themselves calls this first, and copies what is to outlive the next call.
        """
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()

    @staticmethod
    def _check_clip(clip: Tensor) -> None:
        if clip.dim() != 5 or clip.shape[2] != 3:
            raise ValueError(f'clip: expected [B, T, 3, H, W], got {list(clip.shape)}')


def _resize(scores: Tensor, size: Size) -> Tensor:
    """Bilinear resize of ``[B, T, K, h, w]``."""
    resized = F.interpolate(scores.flatten(0, 1), size=tuple(size), mode='bilinear', align_corners=False)
    return resized.unflatten(0, scores.shape[:2])


def _input_shape(backbone: Any, decode_head: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Channels and strides of the backbone under the names of the head; must agree with the head's own, if any."""
    names = decode_head.get('in_features', _FEATURES)
    index = decode_head.get('in_index', range(len(names)))
    channels, strides = list(backbone.out_channels), list(backbone.out_strides)
    if len(names) != len(index) or not all(0 <= i < len(channels) for i in index):
        raise ConfigError(
            f'decode_head: in_index {list(index)} does not pick a map for each of in_features {list(names)} from the '
            f'{len(channels)} maps of the backbone')
    shape = {name: dict(channels=channels[i], stride=strides[i]) for name, i in zip(names, index)}
    stated = decode_head.get('input_shape')
    if stated is not None and {name: dict(value) for name, value in stated.items()} != shape:
        raise ConfigError(
            f'decode_head.input_shape: the backbone gives {shape}, the config says '
            f'{ {name: dict(value) for name, value in stated.items()} }; remove the key to take the backbone\'s')
    return shape
