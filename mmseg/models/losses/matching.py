"""Rounds of one-to-one matching between queries and targets (THE-Mask, arXiv 2309.08020).

A video holds few categories, so one round trains under a tenth of the queries.  Round 1 is the assignment of DETR; each
further round assigns the targets once more, among the queries that are left.  Costs are those of Mask2Former (arXiv
2112.01527): class probability, and binary cross-entropy and dice at random points.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmseg.kernels.layers import linear
from mmseg.models.losses import point_sampling
from mmseg.models.structures import ClipTarget, MaskPrediction, Match

Cost = Literal['full', 'mask']
Matches = list[list[list[Match]]]  # [stage][clip][round]

_PRODUCT_LENGTH = 64
_ABSENT = -1e4  # a logit whose softplus and sigmoid are exactly 0: with target 0 the point adds nothing to any sum


def classification_cost(logits: Tensor, classes: Tensor) -> Tensor:
    """Minus the softmax probability of each target's class.

    Args:
        logits: float ``[Q, K + 1]``.
        classes: int64 ``[n]`` in 0..K-1.

    Returns:
        float ``[Q, n]`` in [-1, 0].
    """
    return -logits.softmax(-1)[:, classes]


def mask_cost(logits: Tensor, targets: Tensor, number: Tensor | int | None = None) -> Tensor:
    """Mean binary cross-entropy of every mask against every target.

    BCE(x, t) = softplus(x) - x t, so one sum over points for each mask and one matrix product are all there is to it.

    Args:
        logits: float ``[Q, P]``, masks at P points.
        targets: float ``[n, P]`` in [0, 1].
        number: what sums are divided by, P by default.

    Returns:
        float ``[Q, n]``.
    """
    number = logits.shape[1] if number is None else number
    return (_sum_of_softplus(logits)[:, None] - logits @ targets.t()) / number


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss (1 in numerator and denominator) of every mask against every target.

    Args:
        logits: float ``[Q, P]``, masks at P points.
        targets: float ``[n, P]`` in [0, 1].

    Returns:
        float ``[Q, n]`` in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = probability @ targets.t()
    return 1 - (2 * overlap + 1) / (probability.sum(1)[:, None] + targets.sum(1) + 1)


def _sum_of_softplus(x: Tensor) -> Tensor:
    """Row sums of softplus(x) = relu(x) - log sigmoid(|x|), with one logarithm for every 64 elements.

    sigmoid(|x|) lies in [1/2, 1], so a product of 64 of them stays above 2^-64, well inside float32, and
    the sum of their logarithms is the logarithm of the product: a third of the time of softplus.
    """
    sigmoid = x.abs().sigmoid_()
    groups = x.shape[1] // _PRODUCT_LENGTH
    whole = groups * _PRODUCT_LENGTH
    logs = sigmoid[:, :whole].unflatten(1, (groups, _PRODUCT_LENGTH)).prod(2).log().sum(1)
    return x.relu().sum(1) - logs - sigmoid[:, whole:].log().sum(1)


def assign_rounds(costs: Sequence[np.ndarray]) -> list[Match]:
    """Solves all rounds for one clip.

    A round makes the rows of earlier rounds dearer than any other (1000 times the largest cost), as the paper does, and
    not shorter: between equally good solutions the solver then chooses as the reference does.  With more targets than
    free queries some of these rows are taken; such pairs are dropped.

    Args:
        costs: for each round finite ``[Q, n]``, what it minimises.

    Returns:
        For each round a match of min(free queries, n) pairs, on the CPU.
    """
    used = np.empty(0, np.int64)
    matches = []
    for cost in costs:
        cost = np.array(cost)
        cost[used] = 1000 * np.abs(cost.max(initial=-np.inf)) or 1.0
        query, target = linear_sum_assignment(cost)
        free = ~np.isin(query, used)
        matches.append(Match(torch.from_numpy(query[free]), torch.from_numpy(target[free])))
        used = np.concatenate([used, query[free]])
    return matches


def replace_non_finite(cost: np.ndarray) -> tuple[np.ndarray, int]:
    """The matrix with every NaN and infinity replaced by a value above the largest finite one, and their number."""
    bad = ~np.isfinite(cost)
    if not bad.any():
        return cost, 0
    worst = cost[~bad].max(initial=0.0) + 1.0
    return np.where(bad, worst, cost), int(bad.sum())


def masks_at(prediction: MaskPrediction, points: Tensor) -> Tensor:
    """Mask logits of one clip at points, the same for all of its masks and frames.

    Reading a map at points is linear, and so is the product that makes a mask: the features are read, which all masks
    share, and multiplied at the points alone.

    Args:
        prediction: N = 1.
        points: float ``[1, P, 2]``, as in :mod:`~mmseg.models.losses.point_sampling`.

    Returns:
        float32 ``[Q, T * P]``.
    """
    frames = point_sampling.sample_features(prediction.features[0].float(), points[0])
    embedding = prediction.embedding_of_frames()[0].float()
    return torch.cat([linear(*factors) for factors in zip(embedding, frames)], 1)


class Matcher:
    """Matches the queries of all prediction stages with the targets of a batch of clips, in several rounds.

    The full cost is a weighted sum of class probability, mean BCE and dice on random points, which all masks of a clip
    share; the mask cost is the BCE alone, unweighted.  All matrices travel to the host together: one synchronisation a
    call.

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
        self, stages: list[MaskPrediction], targets: list[ClipTarget], target_masks: list[Tensor],
        rounds: Sequence[Cost] = ('full', 'full'),
    ) -> Matches:
        """Matches every stage.

        Args:
            stages: predictions of S stages for B clips.
            targets: B targets.
            target_masks: their masks, float ``[n, T, H, W]`` each.
            rounds: what each round minimises.
        """
        kinds = sorted(set(rounds))
        on_device = [
            self.costs(stage.of(clip), target, wanted, kinds)
            for stage in stages
            for clip, (target, wanted) in enumerate(zip(targets, target_masks))
        ]
        flat = torch.cat([costs.flatten() for costs in on_device]).cpu().numpy()
        parts = np.split(flat, np.cumsum([costs.numel() for costs in on_device])[:-1])
        matches: Matches = []
        for i, (part, costs) in enumerate(zip(parts, on_device)):
            s, b = divmod(i, len(targets))
            finite, number = replace_non_finite(part.reshape(costs.shape))
            if number:
                self._report(stages[s], s, b, number)
            if b == 0:
                matches.append([])
            matches[-1].append(assign_rounds([finite[kinds.index(kind)] for kind in rounds]))
        return matches

    def costs(
        self, prediction: MaskPrediction, target: ClipTarget, target_masks: Tensor, kinds: Sequence[Cost]
    ) -> Tensor:
        """Cost matrices of one clip, float32 ``[kinds, Q, n]``; points on unknown pixels are dropped.

        Args:
            prediction: of the clip alone, N = 1, of any floating dtype.
            target: of the clip.
            target_masks: its masks, float ``[n, T, H, W]``.
            kinds: which costs are wanted.
        """
        logits = prediction.logits[0].float()
        points = point_sampling.random_points(1, self.num_points, logits.device)
        sampled = masks_at(prediction, points)
        wanted = point_sampling.sample_points(target_masks, points).flatten(1)
        number: Tensor | int = sampled.shape[1]
        if target.known_frames is not None:
            row, column = point_sampling.pixels_of(points[0], *target_masks.shape[2:])
            known = target.known[:, row, column].flatten()
            number = known.sum().clamp(min=1)
            sampled, wanted = sampled.masked_fill(~known, _ABSENT), wanted * known
        bce = mask_cost(sampled, wanted, number)
        if 'full' not in kinds:
            return bce[None]
        full = (
            self.class_weight * classification_cost(logits, target.classes)
            + self.mask_weight * bce
            + self.dice_weight * dice_cost(sampled, wanted)
        )
        return torch.stack([{'full': full, 'mask': bce}[kind] for kind in kinds])

    def _report(self, stage: MaskPrediction, s: int, b: int, number: int) -> None:
        """Warns, once, which costs are not finite and which prediction they come from."""
        if self._reported:
            return
        self._reported = True
        broken = [
            name
            for name, value in (('class logits', stage.logits[b]), ('mask logits', stage.of(b).masks))
            if not torch.isfinite(value).all()
        ]
        warnings.warn(
            f'matching: {number} costs of prediction stage {s}, clip {b} of the batch, are not finite '
            f'({" and ".join(broken) or "the costs themselves overflow"}); they count as the worst. The '
            'model may have diverged; this is reported once.',
            RuntimeWarning,
            stacklevel=3,
        )
