"""The segmentor: backbone and decode head, training losses, and inference on clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.label_map import ScoreView, label_map
from mmseg.kernels.layers import chunks
from mmseg.models.segmentors.encoded import Axis, Encoded, Head, Scores
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

        training: loss(clip [B, T, 3, H, W], label [B, T, H, W])      inference: predict(views of [B, T, 3, H, W], size)
              |                                                           |
        backbone -> maps of strides 4 .. 32                           encode(frames): backbone and head.encode, every
              |                                                           |            frame (or window) alone
        decode_head.loss:                                             scores_of(encoded, T): head.scores_of
           pixel_decoder: maps -> mask features at stride 4,              |   mean over levels of
                          three maps of strides 32, 16, 8                 |   sum_q p(class | q) * sigmoid(mask_q)
           predictor:     queries -> classes and mask factors         labels(views, size): resize to the input, resize
           criterion:     rounds of matching and losses                       to size, argmax -> [B, T, H0, W0]

    Args:
        backbone: ``type`` and arguments of the backbone.
        decode_head: ``type`` and arguments of the head; its ``input_shape`` is the backbone's where it has none.
        pretrained: local file with the backbone's weights, loaded by :meth:`init_weights`.
        train_cfg: accepted empty, as in mmsegmentation.
        test_cfg: fields of :class:`InferenceConfig`.
        compile_cfg: arguments of ``torch.compile``, for the backbone and the head's ``compiled_parts``; ``None`` runs
            them as they are.  Matching, losses and label maps are not compiled.

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
        self.decode_head: Head = build(HEADS, decode_head, 'decode_head', input_shape=shape)
        self.compiled = compile_cfg is not None
        if compile_cfg is not None:
            with config_key('compile_cfg') as where:
                options = check_arguments(torch.compile, compile_cfg, where)
            for part in (self.backbone, *self.decode_head.compiled_parts()):
                try:
                    part.compile(**options)
                except (TypeError, RuntimeError) as error:
                    raise ConfigError(f'{where}: torch.compile: {error}') from error

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.decode_head.num_classes

    @property
    def score_kind(self) -> str:
        """``'mass'`` or ``'logits'``, see :class:`Head`."""
        return self.decode_head.score_kind

    def init_weights(self) -> None:
        """Loads ``pretrained`` into the backbone, or what the backbone itself starts from.

        SegFormer's ImageNet checkpoints fit as they are; their classifier ``head.*`` is left out.

        Raises:
            ConfigError: the file does not exist.
            CheckpointError: it cannot be read, or holds another backbone.
        """
        if hasattr(self.backbone, 'init_weights'):
            self.backbone.init_weights()
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
        return self.decode_head.statistics()

    def scores(self, clip: Tensor, size: Size | None = None) -> Tensor:
        """Scores of every pixel (see :attr:`Head.score_kind`); the argmax over K is the prediction.

        Args:
            clip: normalised frames ``[B, T, 3, H, W]``.
            size: (height, width) wanted; reached from stride 4 over the size of ``clip``.

        Returns:
            ``[B, T, K, h, w]``, at ``size``; without it at stride 4 (mode ``slide``: at the size of ``clip``).
        """
        self._check_clip(clip)
        scores, _ = self.scores_of(self.encode(clip.flatten(0, 1)), clip.shape[1])
        maps = scores.maps
        if self.inference.mode == 'slide':
            rows, columns = scores.matrices()
            maps = rows.to(maps).T @ maps @ columns.to(maps)
        elif size is not None:
            maps = _resize(maps, (clip.shape[3], clip.shape[4]))
        return maps if size is None else _resize(maps, size)

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
        for clip in views:
            self._check_clip(clip)
        scores = [self.scores_of(self.encode(clip.flatten(0, 1)), clip.shape[1])[0] for clip in views]
        return self.labels(scores, size, flips)

    def encode(self, frames: Tensor) -> Encoded:
        """First step of inference: what backbone and head make of every frame alone, window by window.

        Without gradients a CPU takes one frame after the other, the same sums in the memory of one frame: it gains
        nothing from a batch, and the C library gives tensors above 32 MiB back to the system after every use.

        Args:
            frames: normalised, ``[N, 3, H, W]``.
        """
        height, width = frames.shape[2:]
        test = self.inference
        if test.mode == 'slide':
            rows, columns = (Axis.of(*each) for each in zip((height, width), test.window, test.step))
        else:
            rows, columns = Axis.of(height), Axis.of(width)
        batch = torch.is_grad_enabled() or self.compiled
        parts = [self._encode(part, rows, columns) for part in ([frames] if batch else chunks(frames, 1))]
        return Encoded.join(parts)

    def _encode(self, frames: Tensor, rows: Axis, columns: Axis) -> Encoded:
        windows: list[Any] = []
        for y in rows.windows:
            for x in columns.windows:
                self.begin_step()
                encoded = Encoded([self.decode_head.encode(self.backbone(frames[..., y, x]))], rows, columns)
                windows += (encoded.clone() if self.compiled else encoded).windows  # a graph writes to it again
        return Encoded(windows, rows, columns)

    def scores_of(self, encoded: Encoded, num_frames: int, state: Any = None) -> tuple[Scores, Any]:
        """Second step: scores of clips.

        Args:
            encoded: ``B * T`` frames, those of a clip one after the other.
            num_frames: T.
            state: what the call for the clip before returned; ``None`` at the start of a video.

        Returns:
            The scores, and the memory for the next clip: ``None`` for a model without memory.
        """
        states = list(state or [None] * len(encoded.windows))
        maps = []
        for i, window in enumerate(encoded.windows):
            self.begin_step()
            own, states[i] = self.decode_head.scores_of(window, num_frames, states[i])
            maps.append(own.clone() if self.compiled else own)
        across = len(encoded.columns.starts)
        bands = [torch.cat(maps[i : i + across], dim=4) for i in range(0, len(maps), across)]
        kept = None if all(each is None for each in states) else states
        return Scores(bands[0] if len(bands) == 1 else torch.cat(bands, dim=3), encoded.rows, encoded.columns), kept

    @torch.no_grad()
    def labels(self, views: Sequence[Scores], size: Size, flips: Sequence[str | None] | None = None) -> Tensor:
        """Third step: the most probable class of every pixel, by the mean of the views' softmaxed scores.

        Args:
            views: scores of the same clips, each view resized and flipped in its own way.
            size: (height, width) of the label maps.
            flips: how each view is flipped: ``'horizontal'``, ``'vertical'`` or ``None``; by default none is.

        Returns:
            uint8 ``[B, T, height, width]``.
        """
        flips = [None] * len(views) if flips is None else flips
        if len(views) != len(flips) or not views:
            raise ValueError(f'expected as many views as flips and at least one, got {len(views)} and {len(flips)}')
        parts = []
        for scores, flip in zip(views, flips):
            rows, columns = scores.matrices(*size)
            if flip == 'horizontal':
                columns = columns.flip(1)
            elif flip == 'vertical':
                rows = rows.flip(1)
            elif flip is not None:
                raise ValueError(f"flip: expected 'horizontal', 'vertical' or None, got {flip!r}")
            parts.append(ScoreView(scores.maps.flatten(0, 1), rows, columns))
        return label_map(parts).view(*views[0].maps.shape[:2], *size)

    def begin_step(self) -> None:
        """Tells CUDA graphs of compiled parts (mode ``reduce-overhead``) that results of the last call are done with.

        Without it the backbone's maps would count as needed still when the next clip overwrites them.
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
