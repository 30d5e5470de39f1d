"""Predictions whose masks exist as a whole: they are the features, and the embedding of a query picks its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmseg.models.structures import DecoderOutput, MaskPrediction


class Whole(NamedTuple):
    """Class logits ``[N, Q, K + 1]`` and masks ``[N, Q, T, h, w]`` of one stage."""

    logits: Tensor
    masks: Tensor


def as_factors(logits: Tensor, masks: Tensor) -> MaskPrediction:
    return MaskPrediction(logits, torch.eye(masks.shape[1]).expand(len(masks), -1, -1), masks.transpose(1, 2))


def as_output(clip: list[Whole], frame: list[Whole] | None = None) -> DecoderOutput:
    """All stages and levels over one map of features: the masks of all of them."""
    batch, queries = clip[0].masks.shape[:2]
    maps = [stage.masks.transpose(1, 2) for stage in clip]  # [B, T, Q, h, w]
    maps += [stage.masks.squeeze(2).unflatten(0, (batch, -1)) for stage in frame or []]
    features = torch.cat(maps, 2)
    picks = iter(torch.eye(features.shape[2]).split(queries))

    def level(stages: list[Whole], own: Tensor) -> list[MaskPrediction]:
        return [MaskPrediction(stage.logits, next(picks).expand(len(own), -1, -1), own) for stage in stages]

    return DecoderOutput(level(clip, features), frame and level(frame, features.flatten(0, 1)[:, None]))
