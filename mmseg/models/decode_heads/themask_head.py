"""The decode head of THE-Mask: pixel decoder, mask decoder and criterion (arXiv 2309.08020).

``features -> pixel_decoder -> mask features, three maps -> predictor -> (class, mask) pairs``, and from these either
scores of every pixel (:meth:`THEMaskHead.scores_of`) or losses (:meth:`THEMaskHead.loss`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mmseg.kernels.layers import chunked, linear
from mmseg.models.losses.criterion import THEMaskCriterion
from mmseg.models.structures import ClipTarget, DecoderOutput
from mmseg.registry import (
    HEADS,
    PIXEL_DECODERS,
    TRANSFORMER_DECODERS,
    build,
    config_key,
    register_variant,
)
from mmseg.utils.arguments import Count, Index, Label, Weight
from mmseg.utils.errors import ConfigError
from mmseg.utils.images import VOID
from mmseg.utils.state_dict_alias import drop_dead_keys


class THEMaskHead(nn.Module):
    """Mask classification of clips; an image is a clip of one.

    Registered as ``THEMaskHead`` (clip and frame level) and ``THEMask1fHead`` (clip level only).

    Args:
        num_classes: K, without "no object".
        pixel_decoder_cfg: ``type`` and arguments of the pixel decoder.
        transformer_decoder_cfg: ``type`` and arguments of the mask decoder.
        loss_cfg: arguments of :class:`~mmseg.models.losses.criterion.THEMaskCriterion`.
        input_shape: name of each map -> ``dict(channels=..., stride=...)``; the segmentor fills in its backbone's.
        in_index: which maps of the backbone are taken.
        in_features: their names.
        loss_weight: factor on every loss.
        ignore_value: the void label.
        frame_level: whether the mask decoder must have a temporal part and thus a frame level.

    Raises:
        ConfigError: an unknown argument, or parts that do not fit each other.
    """

    score_kind: Literal['mass', 'logits'] = 'mass'

    def __init__(
        self,
        num_classes: Count,
        pixel_decoder_cfg: Annotated[Mapping[str, Any], PIXEL_DECODERS],
        transformer_decoder_cfg: Annotated[Mapping[str, Any], TRANSFORMER_DECODERS],
        loss_cfg: Annotated[Mapping[str, Any] | None, THEMaskCriterion] = None,
        input_shape: Mapping[str, Mapping[str, Count]] | None = None,
        in_index: Sequence[Index] = (0, 1, 2, 3),
        in_features: Sequence[str] = ('res2', 'res3', 'res4', 'res5'),
        loss_weight: Weight = 1.0,
        ignore_value: Label = VOID,
        frame_level: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_maps = self._in_maps(in_index, in_features, input_shape)
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        self.pixel_decoder = build(
            PIXEL_DECODERS,
            pixel_decoder_cfg,
            'pixel_decoder_cfg',
            input_shape={name: dict(shape) for name, shape in (input_shape or {}).items() if name in self.in_maps},
        )
        self.predictor = self._build_predictor(transformer_decoder_cfg, frame_level)
        self.criterion = build(THEMaskCriterion, loss_cfg, 'loss_cfg', num_classes=num_classes)
        drop_dead_keys(self, ('conv_seg',))

    @staticmethod
    def _in_maps(
        in_index: Sequence[int], in_features: Sequence[str], input_shape: Mapping[str, Mapping[str, int]] | None
    ) -> dict[str, int]:
        """Name of each map -> its index among the backbone's."""
        if len(in_index) != len(in_features):
            raise ConfigError(
                f'decode_head: in_index {list(in_index)} and in_features {list(in_features)} differ in length'
            )
        missing = [name for name in in_features if name not in (input_shape or {})]
        if missing:
            raise ConfigError(
                f'decode_head.input_shape: expected channels and stride of {", ".join(in_features)}, missing '
                f'{", ".join(missing)}; leave the key out of the config to take them from the backbone'
            )
        return dict(zip(in_features, in_index))

    def _build_predictor(self, cfg: Mapping[str, Any], frame_level: bool) -> nn.Module:
        mask_features = self.pixel_decoder.mask_features
        predictor = build(
            TRANSFORMER_DECODERS,
            cfg,
            'transformer_decoder_cfg',
            num_classes=self.num_classes,
            in_channels=mask_features.in_channels,
            mask_dim=mask_features.out_channels,
        )
        with config_key('transformer_decoder_cfg') as where:
            if predictor.num_classes != self.num_classes:
                raise ConfigError(
                    f'{where}.num_classes: {predictor.num_classes} here, but the head has num_classes='
                    f'{self.num_classes}; leave the key out here'
                )
            if predictor.mask_dim != mask_features.out_channels:
                raise ConfigError(
                    f'{where}.mask_dim: {predictor.mask_dim} here, but pixel_decoder_cfg has mask_dim='
                    f'{mask_features.out_channels}; leave the key out here'
                )
            if frame_level != (predictor.temporal is not None):
                head, decoder = (
                    ('THEMaskHead', 'VideoMultiScaleMaskedTransformerDecoder')
                    if frame_level
                    else ('THEMask1fHead', 'MultiScaleMaskedTransformerDecoder')
                )
                raise ConfigError(f"{where}.type: {head} needs type='{decoder}', got {cfg['type']!r}")
        return predictor

    def forward(self, features: Sequence[Tensor], num_frames: int, all_layers: bool | None = None) -> DecoderOutput:
        """Class and mask logits for a batch of clips.

        Args:
            features: maps of the backbone, each ``[B * T, C_i, h_i, w_i]``, the frames of a clip one after the other.
            num_frames: T.
            all_layers: whether the output holds every prediction stage or only the last; ``None``: in training.
        """
        mask_features, maps = self.encode(features)
        return self.predictor(maps, mask_features, num_frames, all_layers)

    def encode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the pixel decoder makes of every frame alone; a frame that stands in several clips needs it once.

        Args:
            features: as in :meth:`forward`.

        Returns:
            Mask features (stride 4) and three maps (strides 32, 16, 8), each ``[B * T, ...]``.
        """
        return self.pixel_decoder({name: features[i] for name, i in self.in_maps.items()})

    def scores_of(
        self, encoded: tuple[Tensor, list[Tensor]], num_frames: int, state: Any = None
    ) -> tuple[Tensor, Any]:
        """Scores of every pixel: the mean over levels of ``sum over q of p(class | q) * sigmoid(mask of q)``.

        The queries of both levels are one list, so that a sum over them is the sum over levels too.

        Args:
            encoded: both results of :meth:`encode`.
            num_frames: T.
            state: without use: this head has no memory.

        Returns:
            ``[B, T, K, h, w]`` at stride 4, not normalised over classes; and ``None``.
        """
        mask_features, maps = encoded
        output = self.predictor(maps, mask_features, num_frames, all_layers=False)
        levels = [stages[-1] for stages in output.levels]
        classes, embeddings = (
            torch.cat([x.repeat_interleave(len(mask_features) // len(x), dim=0) for x in parts], dim=1)
            for parts in (
                [level.logits.softmax(dim=-1)[..., :-1] / len(levels) for level in levels],
                [level.embedding for level in levels],
            )
        )
        pixels = mask_features.flatten(2).transpose(1, 2)
        frames = [_scores_of_pixels(*factors) for factors in zip(pixels, embeddings, classes)]
        scores = torch.stack(frames).transpose(1, 2).unflatten(2, mask_features.shape[2:])
        return scores.unflatten(0, (-1, num_frames)), None

    def loss(self, features: Sequence[Tensor], labels: Tensor, iteration: int = 0) -> dict[str, Tensor]:
        """Weighted losses of every prediction stage and level, to be summed.

        Args:
            features: as in :meth:`forward`.
            labels: integers ``[B, T, H, W]``, void where ``ignore_value``.
            iteration: training iteration, for the warm-up of the one-frame stage.

        Returns:
            ``decode.<name>`` -> float32 scalar; names as in the criterion.
        """
        targets = ClipTarget.from_labels(labels, self.num_classes, self.ignore_value)
        output = self(features, labels.shape[1], all_layers=True)
        losses = self.criterion(output, targets, iteration)
        return {f'decode.{name}': value * self.loss_weight for name, value in losses.items()}

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Pixel decoder and mask decoder."""
        return self.pixel_decoder, self.predictor

    def statistics(self) -> dict[str, Tensor]:
        """What the last :meth:`loss` matched: name -> (count, of how many), float32 ``[2]``; see the criterion."""
        return self.criterion.last_statistics


def _scores_of_pixels(pixels: Tensor, embeddings: Tensor, classes: Tensor) -> Tensor:
    """Scores of one frame, a few pixels at a time on the CPU, where the masks of these pixels then stay in the cache.

    Args:
        pixels: mask features ``[S, C]``.
        embeddings: of the queries, ``[Q, C]``.
        classes: their probabilities ``[Q, K]``.

    Returns:
        ``[S, K]``.
    """
    classes = classes.T.contiguous()
    return chunked(lambda part: linear(linear(part, embeddings).sigmoid(), classes), pixels, width=2 * len(embeddings))


register_variant(HEADS, 'THEMaskHead', THEMaskHead, frame_level=True)
register_variant(HEADS, 'THEMask1fHead', THEMaskHead, frame_level=False)
