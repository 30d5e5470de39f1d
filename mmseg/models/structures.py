"""The data that travels between the parts of THE-Mask: predictions, targets and matches of clips.

Letters in shapes: B clips, T frames a clip, Q queries, K classes (without "no object"), h x w a map at stride 4,
H x W the label size, n targets of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = 255


@dataclass
class MaskPrediction:
    """Class and mask logits of one prediction stage at one level.

    Clip level: N = B and T frames a mask.  Frame level: N = B * T (frames of a clip stand together), one frame a mask.

    Attributes:
        logits: float ``[N, Q, K + 1]``; the last class is "no object".
        masks: float ``[N, Q, T, h, w]``.
    """

    logits: Tensor
    masks: Tensor


@dataclass
class DecoderOutput:
    """What a mask decoder predicts for a batch of clips.

    Attributes:
        clip: one :class:`MaskPrediction` a stage (before the first layer, then after each); the last is final.
        frame: the same stages for the frame queries; ``None`` without a temporal part.
    """

    clip: list[MaskPrediction]
    frame: list[MaskPrediction] | None = None


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
    def from_labels(cls, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> ClipTarget:
        """The target of a label map ``[T, H, W]``; the list of classes costs one host synchronisation."""
        present = torch.unique(labels)
        return cls(present[present != ignore_index], labels)

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
