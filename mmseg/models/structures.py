"""The data that travels between the parts of THE-Mask: predictions, targets and matches of clips.

Letters in shapes: B clips, T frames a clip, Q queries, K classes (without "no object"), h x w a map at stride 4,
H x W the label size, n targets of a clip.  What a model returns is a named tuple, which ``torch.compile`` and DDP take
and give back without a graph break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmseg.kernels.layers import products

IGNORE_INDEX = 255


def mask_logits(embedding: Tensor, features: Tensor) -> Tensor:
    """Masks from their factors: the product of each query's embedding with the features of each pixel.

    Args:
        embedding: float ``[N, Q, C]``, or ``[N, T, Q, C]`` where it differs from frame to frame.
        features: float ``[N, T, C, h, w]``.

    Returns:
        ``[N, Q, T, h, w]``; each map is contiguous.
    """
    if embedding.dim() == 3:
        embedding = embedding[:, None].expand(-1, features.shape[1], -1, -1)
    pixels = features.to(embedding.dtype).flatten(3).transpose(2, 3)  # under autocast they may differ
    masks = products(embedding, pixels)
    return masks.unflatten(3, features.shape[3:]).transpose(1, 2)


class MaskPrediction(NamedTuple):
    """Class and mask logits of one prediction stage at one level.

    Clip level: N = B and T frames a mask.  Frame level: N = B * T (frames of a clip stand together), one frame a mask.
    Masks are given as a whole or as two factors.  A decoder gives factors: few of its masks are ever looked at, and
    all of them at all stages would take more memory than anything else in training.

    Attributes:
        logits: float ``[N, Q, K + 1]``; the last class is "no object".
        whole: float ``[N, Q, T, h, w]``, or ``None`` where there are factors.
        embedding: float ``[N, Q, C]``, or ``[N, T, Q, C]`` where it differs from frame to frame.
        features: float ``[N, T, C, h, w]``.
    """

    logits: Tensor
    whole: Tensor | None = None
    embedding: Tensor | None = None
    features: Tensor | None = None

    @property
    def masks(self) -> Tensor:
        """Mask logits, float ``[N, Q, T, h, w]``; multiplied anew by each access where they are given as factors."""
        if self.whole is not None:
            return self.whole
        assert self.embedding is not None and self.features is not None
        return mask_logits(self.embedding, self.features)

    def of(self, index: int) -> MaskPrediction:
        """The prediction of one of N alone, N = 1."""
        own = slice(index, index + 1)
        whole, embedding, features = (None if x is None else x[own] for x in self[1:])
        return MaskPrediction(self.logits[own], whole, embedding, features)

    @property
    def num_frames(self) -> int:
        """T, the frames of a mask."""
        if self.whole is not None:
            return self.whole.shape[2]
        assert self.features is not None
        return self.features.shape[1]


class DecoderOutput(NamedTuple):
    """What a mask decoder predicts for a batch of clips.

    Attributes:
        clip: one :class:`MaskPrediction` a stage (before the first layer, then after each); the last is final.
        frame: the same stages for the frame queries; ``None`` without a temporal part.
        mask_features: float ``[B, T, C, h, w]``, the common factor of all masks; ``None`` where they are given whole.
    """

    clip: list[MaskPrediction]
    frame: list[MaskPrediction] | None = None
    mask_features: Tensor | None = None


@dataclass
class ClipTarget:
    """Ground truth of one clip.

    Attributes:
        classes: int64 ``[n]``, ascending; the labels that are present, void left out.
        labels: int64 ``[T, H, W]``; 255 is void.
    """

    classes: Tensor
    labels: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> list[ClipTarget]:
        """Targets of a batch of clips, with one host synchronisation for all of them.

        Args:
            labels: integers ``[B, T, H, W]``, values 0..255.
            num_classes: K.
            ignore_index: the void label.

        Raises:
            ValueError: a label is neither void nor below ``num_classes``.
        """
        labels = labels.long()
        present = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
        present.scatter_(1, labels.flatten(1), True)
        present[:, ignore_index] = False
        classes = [row.nonzero()[:, 0] for row in present.cpu()]
        wrong = sorted({int(c) for row in classes for c in row[row >= num_classes]})
        if wrong:
            raise ValueError(
                f'labels {wrong} in a clip, but the model has {num_classes} classes (0 to {num_classes - 1}; void is '
                f'{ignore_index}): check reduce_zero_label of LoadAnnotations and num_classes of the head'
            )
        return [cls(row.to(labels.device, non_blocking=True), clip) for row, clip in zip(classes, labels)]

    @property
    def masks(self) -> Tensor:
        """The bool masks ``[n, T, H, W]``: the pixels of each class; a class may be absent from a frame."""
        return self.labels[None] == self.classes[:, None, None, None]


@dataclass
class Match:
    """One-to-one assignment of one round for one clip, on any device.

    Attributes:
        query: int64 ``[m]``, ascending.
        target: int64 ``[m]``, index into ``ClipTarget.classes`` of each query.
    """

    query: Tensor
    target: Tensor
