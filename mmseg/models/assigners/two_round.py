"""Two rounds of one-to-one matching: every target gets a primary and a secondary query (THE-Mask, arXiv 2309.08020).

A video holds few categories, so one round trains under a tenth of the queries.  Round 1 is the assignment of DETR;
round 2 assigns the targets once more, among the queries that round 1 left free.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmseg.kernels.layers import linear
from mmseg.models.assigners.costs import classification_cost, dice_cost, mask_cost
from mmseg.models.losses import point_sampling
from mmseg.models.structures import ClipTarget, MaskPrediction, Match

Round2Cost = Literal['full', 'mask']


def assign_two_rounds(cost: np.ndarray, cost2: np.ndarray | None = None) -> tuple[Match, Match]:
    """Solves both rounds for one clip.

    Round 2 makes the rows of round 1 dearer than any other (1000 times the largest cost), as the paper does, and not
    shorter: between equally good solutions the solver then chooses as the reference does.  With more than Q / 2
    targets some of these rows have to be taken; such pairs are dropped, and every free query serves a target.

    Args:
        cost: finite ``[Q, n]``, what round 1 minimises.
        cost2: finite ``[Q, n]`` for round 2; ``None``: the same as round 1.

    Returns:
        The primary match of min(Q, n) pairs and the secondary match of min(Q - primary, n) pairs, on the CPU.
    """
    query, target = linear_sum_assignment(cost)
    cost2 = np.array(cost if cost2 is None else cost2)
    cost2[query] = 1000 * np.abs(cost2.max(initial=-np.inf)) or 1.0
    query2, target2 = linear_sum_assignment(cost2)
    free = ~np.isin(query2, query)
    return (
        Match(torch.from_numpy(query), torch.from_numpy(target)),
        Match(torch.from_numpy(query2[free]), torch.from_numpy(target2[free])),
    )


def replace_non_finite(cost: np.ndarray) -> tuple[np.ndarray, int]:
    """The matrix with every NaN and infinity replaced by a value above the largest finite one, and their number."""
    bad = ~np.isfinite(cost)
    if not bad.any():
        return cost, 0
    worst = cost[~bad].max(initial=0.0) + 1.0
    return np.where(bad, worst, cost), int(bad.sum())


def masks_at(prediction: MaskPrediction, points: Tensor) -> Tensor:
    """Mask logits of one clip at points, the same for all of its masks and frames.

    Reading a map at points is linear, and so is the product that makes a mask: on the CPU the features are read, which
    all masks share, and multiplied at the points alone.  In float32 no mask is made as a whole there.

    Args:
        prediction: N = 1.
        points: float ``[1, P, 2]``, as in :mod:`~mmseg.models.losses.point_sampling`.

    Returns:
        float32 ``[Q, T * P]``.
    """
    features, embedding = prediction.features, prediction.embedding
    if features is None or embedding is None or features.device.type != 'cpu' or features.dtype != torch.float32:
        return point_sampling.sample_points(prediction.masks[0].float(), points).flatten(1)
    pixels = point_sampling.sample_features(features[0], points[0])
    factors = embedding[0].float().expand(len(pixels), -1, -1)
    return torch.cat([linear(rows, frame) for rows, frame in zip(factors, pixels)], 1)


class TwoRoundAssigner:
    """Matches the queries of all prediction stages with the targets of a batch of clips.

    The cost is a weighted sum of class probability, mean BCE and dice on random points, shared by all masks of a
    clip.  All matrices travel to the host together: one synchronisation a call.

    Args:
        class_weight: weight of minus the class probability.
        mask_weight: weight of the mean BCE.
        dice_weight: weight of dice.
        num_points: points for each clip and stage.
    """

    def __init__(
        self, class_weight: float = 2.0, mask_weight: float = 5.0, dice_weight: float = 5.0, num_points: int = 12544
    ) -> None:
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points
        self._reported = False

    @torch.no_grad()
    def __call__(
        self,
        stages: list[MaskPrediction],
        targets: list[ClipTarget],
        target_masks: list[Tensor],
        round2_cost: Round2Cost = 'full',
    ) -> list[list[tuple[Match, Match]]]:
        """Matches every stage.

        Args:
            stages: predictions of S stages for B clips: logits ``[B, Q, K+1]``, masks ``[B, Q, T, h, w]``.
            targets: B targets.
            target_masks: their masks, float ``[n, T, H, W]`` each.
            round2_cost: what round 2 minimises: the ``'full'`` cost, or the unweighted ``'mask'`` BCE alone.

        Returns:
            ``[S][B]`` pairs of primary and secondary match, on the CPU.
        """
        matrices = []
        for stage in stages:
            for clip, (target, wanted) in enumerate(zip(targets, target_masks)):
                matrices += self.costs(stage.of(clip), target.classes, wanted, round2_cost)
        flat = torch.cat([matrix.flatten() for matrix in matrices]).cpu().numpy()
        ends = np.cumsum([matrix.numel() for matrix in matrices])[:-1]
        on_host = [part.reshape(matrix.shape) for part, matrix in zip(np.split(flat, ends), matrices)]
        rounds = len(matrices) // (len(stages) * len(targets))
        matches: list[list[tuple[Match, Match]]] = []
        for s, stage in enumerate(stages):
            matches.append([])
            for b in range(len(targets)):
                first = (s * len(targets) + b) * rounds
                costs = [replace_non_finite(cost) for cost in on_host[first : first + rounds]]
                if any(number for _, number in costs):
                    self._report(stage, s, b, costs[0][1])
                matches[-1].append(assign_two_rounds(*(cost for cost, _ in costs)))
        return matches

    def costs(
        self, prediction: MaskPrediction, classes: Tensor, target_masks: Tensor, round2_cost: Round2Cost = 'full'
    ) -> list[Tensor]:
        """Cost matrices ``[Q, n]`` of one clip: round 1's, and round 2's where it differs.

        Args:
            prediction: of the clip alone, N = 1, of any floating dtype; costs are computed in float32.
            classes: int64 ``[n]``.
            target_masks: float ``[n, T, H, W]``.
            round2_cost: as in :meth:`__call__`.
        """
        logits = prediction.logits[0]
        points = point_sampling.random_points(1, self.num_points, logits.device)
        sampled = masks_at(prediction, points)
        wanted = point_sampling.sample_points(target_masks, points).flatten(1)
        bce = mask_cost(sampled, wanted)
        full = (
            self.class_weight * classification_cost(logits.float(), classes)
            + self.mask_weight * bce
            + self.dice_weight * dice_cost(sampled, wanted)
        )
        return [full, bce] if round2_cost == 'mask' else [full]

    def _report(self, stage: MaskPrediction, s: int, b: int, number: int) -> None:
        """Warns, once, which costs are not finite and which prediction they come from."""
        if self._reported:
            return
        self._reported = True
        broken = [
            name
            for name, value in (('class logits', stage.logits[b]), ('mask logits', stage.masks[b]))
            if not torch.isfinite(value).all()
        ]
        warnings.warn(
            f'matching: {number} costs of prediction stage {s}, clip {b} of the batch, are not finite '
            f'({" and ".join(broken) or "the costs themselves overflow"}); they count as the worst. The '
            'model may have diverged; this is reported once.',
            RuntimeWarning,
            stacklevel=3,
        )
