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
from mmseg.utils.images import UNKNOWN, VOID


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
    """Class logits and the two factors of the masks, of one prediction stage at one level.

    Clip level: N = B and T frames a mask.  Frame level: N = B * T (the frames of a clip are neighbours), one frame a
    mask.  Masks stay factors: few of them are ever looked at, and all of them at all stages would take more memory than
    anything else in training.  Masks that exist as a whole are their own features, with the identity as embedding.

    Attributes:
        logits: float ``[N, Q, K + 1]``; the last class is "no object".
        embedding: float ``[N, Q, C]``, or ``[N, T, Q, C]`` where it differs from frame to frame.
        features: float ``[N, T, C, h, w]``.
    """

    logits: Tensor
    embedding: Tensor
    features: Tensor

    @property
    def masks(self) -> Tensor:
        """Mask logits, float ``[N, Q, T, h, w]``, multiplied anew by each access."""
        return mask_logits(self.embedding, self.features)

    def of(self, index: int) -> MaskPrediction:
        """The prediction of one of N alone, N = 1."""
        return MaskPrediction(*(x[index : index + 1] for x in self))

    def embedding_of_frames(self) -> Tensor:
        """``[N, T, Q, C]``, also where all frames have the same."""
        shared = self.embedding.dim() == 3
        return self.embedding[:, None].expand(-1, self.num_frames, -1, -1) if shared else self.embedding

    @property
    def num_frames(self) -> int:
        """T, the frames of a mask."""
        return self.features.shape[1]


class DecoderOutput(NamedTuple):
    """What a mask decoder predicts for a batch of clips; all stages and levels have the same features.

    Attributes:
        clip: one :class:`MaskPrediction` a stage (before the first layer, and after each); the last is final.
        frame: the same stages for the frame queries; ``None`` without a temporal part.
    """

    clip: list[MaskPrediction]
    frame: list[MaskPrediction] | None = None

    @property
    def levels(self) -> list[list[MaskPrediction]]:
        """The stages of the clip level and, where there is one, of the frame level."""
        return [self.clip] if self.frame is None else [self.clip, self.frame]


@dataclass
class ClipTarget:
    """Ground truth of one clip.

    Attributes:
        classes: int64 ``[n]``, ascending; the labels that are present, void and unknown left out.
        labels: int64 ``[T, H, W]``; 255 is void, 254 is unknown.
        known_frames: for each frame whether it has a label that is not unknown; None where all pixels are known.
    """

    classes: Tensor
    labels: Tensor
    known_frames: list[bool] | None = None

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, ignore_index: int = VOID) -> list[ClipTarget]:
        """Targets of a batch of clips, with one host synchronisation for all of them.

        Args:
            labels: integers ``[B, T, H, W]``, values 0..255.
            num_classes: K.
            ignore_index: the void label.

        Raises:
            ValueError: a label is neither void, unknown, nor below ``num_classes``.
        """
        labels = labels.long()
        present = torch.zeros(*labels.shape[:2], 256, dtype=torch.bool, device=labels.device)
        present = present.scatter_(2, labels.flatten(2), True).cpu()
        unknown = present[..., UNKNOWN].any(1)
        present[..., UNKNOWN] = False
        known_frames = present.any(2).tolist()
        present[..., ignore_index] = False
        classes = [row.nonzero()[:, 0] for row in present.any(1)]
        wrong = sorted({int(c) for row in classes for c in row[row >= num_classes]})
        if wrong:
            raise ValueError(
                f'labels {wrong} in a clip, but the model has {num_classes} classes (0 to {num_classes - 1}; void is '
                f'{ignore_index}): check reduce_zero_label of LoadAnnotations and num_classes of the head'
            )
        return [
            cls(row.to(labels.device, non_blocking=True), clip, known if partly else None)
            for row, clip, known, partly in zip(classes, labels, known_frames, unknown)
        ]

    @property
    def masks(self) -> Tensor:
        """The bool masks ``[n, T, H, W]``: the pixels of each class; a class may be absent from a frame."""
        return self.labels[None] == self.classes[:, None, None, None]

    @property
    def known(self) -> Tensor:
        """The bool map ``[T, H, W]`` of pixels whose label is not unknown."""
        return self.labels != UNKNOWN

    @property
    def num_known_frames(self) -> int:
        """Frames that are not unknown as a whole."""
        return len(self.labels) if self.known_frames is None else sum(self.known_frames)


@dataclass
class Match:
    """One-to-one assignment of one round for one clip, on any device.

    Attributes:
        query: int64 ``[m]``, ascending.
        target: int64 ``[m]``, index into ``ClipTarget.classes`` of each query.
    """

    query: Tensor
    target: Tensor
