"""Where the matched masks of all stages, levels and rounds lie, and their product from embeddings and features.

S stages, L levels (clip, then frame), B clips, T frames; m queries of a clip that a round matched.  Masks of a round
run over clips, queries, frames at the clip level and over clips, frames, queries at the frame level; R counts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmseg.kernels.layers import linear
from mmseg.models.losses.matching import Matches
from mmseg.models.structures import ClipTarget, DecoderOutput


@dataclass
class MatchTable:
    """Matches as tensors on the model's device.

    Attributes:
        classes: int64 ``[S, B, Q]``, what each query should predict; K is "no object".
        queries: for each round and clip int64 ``[S, m]``.
        targets: for each round int64 ``[S, L, R]``, rows into the target masks of the batch ``[sum(n) * T, H, W]``.
        wanted: for each round int64 ``[S, B * m]``, the classes of its targets.
    """

    classes: Tensor
    queries: list[list[Tensor]]
    targets: list[Tensor]
    wanted: list[Tensor]

    @classmethod
    def of(cls, matches: Matches, output: DecoderOutput, targets: list[ClipTarget], num_classes: int) -> MatchTable:
        """Turns matches into indices, on the host, and moves them to the device together."""
        logits, frames = output.clip[0].logits, output.clip[0].num_frames
        first_target = np.cumsum([0, *(len(target.classes) for target in targets)])
        rounds, clips = range(len(matches[0][0])), range(len(targets))
        query = [[_stacked([stage[b][r].query for stage in matches]) for b in clips] for r in rounds]
        target = [
            [_stacked([stage[b][r].target for stage in matches]) + first_target[b] for b in clips] for r in rounds]
        rows = [[_rows(each, frames, len(output.levels)) for each in clip] for clip in target]
        arrays = [*itertools.chain(*query, *target), *(np.concatenate(each, -1) for each in rows)]
        flat = torch.from_numpy(np.concatenate([each.ravel() for each in arrays])).to(logits.device, non_blocking=True)
        parts = iter(part.view(each.shape) for part, each in zip(flat.split([a.size for a in arrays]), arrays))
        queries = [[next(parts) for _ in clips] for _ in rounds]
        all_classes = torch.cat([target.classes for target in targets])
        wanted = [[all_classes[next(parts)] for _ in clips] for _ in rounds]
        classes = all_classes.new_full((len(matches), *logits.shape[:2]), num_classes)
        for own_queries, own_classes in zip(queries, wanted):
            for b in clips:
                classes[:, b].scatter_(1, own_queries[b], own_classes[b])
        return cls(classes, queries, list(parts), [torch.cat(own, 1) for own in wanted])

    def masks(self, output: DecoderOutput) -> list[Tensor]:
        """The matched masks of each round, float32 ``[S, L, R, h, w]``; nothing after this touches the others.

        A mask depends on no other query, so products of the matched embeddings are the matched masks.  All stages,
        levels and rounds share one product a frame: the backward pass multiplies the few matched embeddings instead of
        all, and adds to the gradient of a frame's features once.
        """
        features = output.clip[-1].features
        batch, frames = features.shape[:2]
        embeddings = [
            torch.stack([stage.embedding for stage in stages]).unflatten(1, (batch, -1)) for stages in output.levels
        ]  # [S, B, 1 or T, Q, C]
        rounds: list[list[list[Tensor]]] = [[[] for _ in embeddings] for _ in self.queries]
        for b, pixels in enumerate(features.flatten(3).transpose(2, 3)):
            matched = [clips[b] for clips in self.queries]
            index = torch.cat(matched, 1)[:, None, :, None]
            chosen = torch.stack([
                level[:, b].gather(2, index.expand(-1, level.shape[2], -1, level.shape[4])).expand(-1, frames, -1, -1)
                for level in embeddings
            ])  # [L, S, T, M, C]
            masks = torch.stack([
                linear(frame, rows.flatten(0, 2)).T.unflatten(0, rows.shape[:3])
                for frame, rows in zip(pixels.unbind(), chosen.unbind(2))
            ])  # [T, L, S, M, h * w]
            for own, part in zip(rounds, masks.split([x.shape[1] for x in matched], 3)):
                for level, (each, embedding) in enumerate(zip(part.unbind(1), embeddings)):
                    order = (1, 2, 0, 3) if embedding.shape[2] == 1 else (1, 0, 2, 3)
                    own[level].append(each.permute(order).flatten(1, 2))
        shape = features.shape[3:]
        return [
            torch.stack([torch.cat(clips, 1) for clips in own], 1).unflatten(3, shape).float() for own in rounds]


def _stacked(indices: Sequence[Tensor]) -> np.ndarray:
    """``[S, m]`` on the host."""
    return np.stack([index.cpu().numpy() for index in indices])


def _rows(targets: np.ndarray, frames: int, levels: int) -> np.ndarray:
    """Rows of the target masks of one clip ``[S, L, m * T]``, from its targets ``[S, m]``."""
    rows = targets[:, :, None] * frames + np.arange(frames)
    return np.stack([rows.reshape(len(rows), -1), rows.swapaxes(1, 2).reshape(len(rows), -1)][:levels], 1)
