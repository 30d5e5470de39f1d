"""The training criterion of THE-Mask (arXiv 2309.08020): rounds of matching, and a loss for the queries of each round.

One call goes: targets -> matching of all stages (one host synchronisation) -> table of matched masks -> cross-entropy
of all queries -> for each round mask losses, at points against the target or on cells against self-labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.half import without_autocast
from mmseg.models.losses import mask_losses, point_sampling
from mmseg.models.losses.match_table import MatchTable
from mmseg.models.losses.matching import Cost, Matcher
from mmseg.models.losses.rounds import CostWeights, LossWeights, Round, papers_rounds, refuse, rounds_of
from mmseg.models.structures import ClipTarget, DecoderOutput, MaskPrediction
from mmseg.registry import LOSSES, check_arguments, find, retired
from mmseg.utils.arguments import Count, Index, Ratio, Share, Weight

_ROUND_NAMES = ('primary', 'secondary')


@retired(deep_supervision=(True,), dec_layers=())
class THEMaskCriterion(nn.Module):
    """Matching and losses of all prediction stages, at the clip level and, where there is one, at the frame level.

    Every round assigns the targets once more, among the queries that earlier rounds left; ``rounds`` lists them.
    Without it they are the paper's two: primary masks learn their target, secondary ones self-labels.  With a frame
    level (video stage) costs take classes from clip queries and masks from frame queries, round 2 minimises the full
    cost, and both levels use the result.  Without one (one-frame stage) round 2 minimises the mask cost, and starts at
    ``warmup_iters``.  While only the first of several rounds takes part, its losses have no ``name`` in front.

    Pixels whose label is unknown take no part: they are left out of costs and mask losses, and frames without a known
    pixel also of the frame level's cross-entropy and of the divisors.

    Over several processes, divisors are averaged (one all-reduce of one small vector a call, in training and
    wherever a process group exists), so that ranks on parts of a batch give the gradients of one process on all of it.

    After a call, ``last_statistics`` describes the matching of the final stage: ``matched_primary``,
    ``matched_secondary``, ``matched_2``, ... (share of queries that a round matched), ``acc_primary``, ... (share of
    these with the right class at the clip level).  Each is a count and what it is a share of, float32 ``[2]`` on the
    model's device, so that shares of several calls or processes can be added up and an empty one harms none.

    Args:
        num_classes: K.
        matcher_cfg: weights of costs and losses; not with ``rounds``.
        warmup_iters: one-frame stage: iterations before round 2 starts; ``None``: it never does (as in the released
            code, whose counter did not advance).  ``rounds`` have their own ``start``.
        round_weight: factors on the mask losses of primary and secondary queries, by default 1 and 0.5; not with
            ``rounds``.
        aux_weight: factor on all losses of the frame level.
        no_object_weight: weight of "no object" in the cross-entropy.
        train_num_points: points for each mask and frame, in costs and losses.
        oversample_ratio: candidates a point of the losses at points, from which the uncertain ones are chosen.
        importance_sample_ratio: share of uncertain points.
        round2_cost: ``'full'`` or ``'mask'``; ``None``: as the stage of training has it (above); not with ``rounds``.
        match_masks: level whose masks are matched, ``'clip'`` or ``'frame'``; ``None``: frame where there is one.
        rounds: the rounds of matching; ``None``: the paper's two.
        cost_weights: weights of the full cost and of ``loss_ce``; only with ``rounds``.

    Attributes:
        empty_weight: float buffer ``[K + 1]``, class weights of the cross-entropy.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: Count,
        matcher_cfg: Annotated[Mapping[str, Any] | None, LossWeights] = None,
        warmup_iters: Index | None = 30000,
        round_weight: tuple[Weight, Weight] | None = None,
        aux_weight: Weight = 0.25,
        no_object_weight: Weight = 0.1,
        train_num_points: Count = 12544,
        oversample_ratio: Ratio = 3.0,
        importance_sample_ratio: Share = 0.75,
        round2_cost: Cost | None = None,
        match_masks: Literal['clip', 'frame'] | None = None,
        rounds: Sequence[Annotated[Mapping[str, Any], Round]] | None = None,
        cost_weights: Annotated[Mapping[str, Any] | None, CostWeights] = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.aux_weight = aux_weight
        self.num_points = train_num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.match_masks = match_masks
        weights: LossWeights | CostWeights
        if rounds is None:
            refuse('cost_weights', cost_weights, 'goes with rounds; without them see matcher_cfg')
            weights = LossWeights(**check_arguments(LossWeights, matcher_cfg or {}, 'matcher_cfg'))
            self.rounds = {
                levels: papers_rounds(weights, round_weight or (1.0, 0.5), cost, start)
                for levels, cost, start in ((1, round2_cost or 'mask', warmup_iters), (2, round2_cost or 'full', 0))
            }
        else:
            for key, value in dict(matcher_cfg=matcher_cfg, round_weight=round_weight, round2_cost=round2_cost).items():
                refuse(key, value, 'not together with rounds, which say it for each round; remove it, or write '
                       'loss_cfg=dict(_delete_=True, rounds=...) where a base config has it')
            weights = CostWeights(**check_arguments(CostWeights, cost_weights or {}, 'cost_weights'))
            self.rounds = dict.fromkeys((1, 2), rounds_of(rounds))
        self.class_weight = weights.class_weight
        self.matcher = Matcher(weights.class_weight, weights.mask_weight, weights.dice_weight, train_num_points)
        self.last_statistics: dict[str, Tensor] = {}
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer('empty_weight', empty_weight)

    def forward(self, output: DecoderOutput, targets: list[ClipTarget], iteration: int = 0) -> dict[str, Tensor]:
        """Weighted losses, to be summed.

        Args:
            output: predictions of S stages for B clips (any floating dtype; computed in float32, also under autocast).
            targets: B targets of T frames of one size.
            iteration: training iteration, for rounds that start later.

        Returns:
            ``loss_ce``, ``r0_loss_mask``, ``r0_loss_dice``, ``r1_loss_mask_unmatched``, ``r1_loss_dice_unmatched``
            (with the first round alone ``loss_ce``, ``loss_mask``, ``loss_dice``) of the final stage, the same with
            ``_0`` to ``_{S-2}`` for the earlier ones, and all of them with ``_aux`` behind for the frame level; float32
            scalars.
        """
        clip = output.clip[-1]
        sizes = sorted({tuple(target.labels.shape) for target in targets})
        if len(targets) != len(clip.logits) or len(sizes) != 1 or sizes[0][0] != clip.num_frames:
            raise ValueError(
                f'predictions for {len(clip.logits)} clips of {clip.num_frames} frames need as many label maps of '
                f'one size [{clip.num_frames}, H, W]; got {len(targets)} of {sizes}'
            )
        with without_autocast(clip.logits):
            return self._losses(output, targets, iteration)

    def _losses(self, output: DecoderOutput, targets: list[ClipTarget], iteration: int) -> dict[str, Tensor]:
        all_rounds = self.rounds[len(output.levels)]
        rounds = [each for each in all_rounds if each.begins(iteration)]
        target_masks = [target.masks.float() for target in targets]
        matches = self.matcher(self._stages(output), targets, target_masks, [each.cost for each in rounds])
        table = MatchTable.of(matches, output, targets, self.num_classes)
        self.last_statistics = _statistics(output.clip[-1].logits, table, [each in rounds for each in all_rounds])
        divisor, num_classified = self._divisors(table, targets)
        all_targets = torch.cat(target_masks).flatten(0, 1)
        known = None
        if any(target.known_frames is not None for target in targets):
            known = torch.cat([each.known.expand(len(each.classes), -1, -1, -1) for each in targets]).flatten(0, 1)

        losses = {'loss_ce': self.class_weight * self._class_losses(output, table, targets) / num_classified[:, None]}
        for own, masks, rows in zip(rounds, table.masks(output), table.targets):
            alone = len(rounds) == 1 < len(all_rounds)
            for name, value in self._mask_losses(own, masks, all_targets, rows, known).items():
                losses[name if alone else own.name + name] = own.weight * value / divisor
        earlier = range(len(output.clip) - 1)
        stages = [(len(earlier), ''), *((stage, f'_{stage}') for stage in earlier)]
        levels = [('', 1.0), ('_aux', self.aux_weight)][: len(output.levels)]
        return {
            f'{name}{stage_suffix}{suffix}': value[stage, level] * weight
            for level, (suffix, weight) in enumerate(levels)
            for stage, stage_suffix in stages
            for name, value in losses.items()
        }

    def _stages(self, output: DecoderOutput) -> list[MaskPrediction]:
        """What is matched: classes of the clip level, masks of the level that ``match_masks`` names."""
        source = self.match_masks or ('clip' if output.frame is None else 'frame')
        if source == 'frame' and output.frame is None:
            raise ValueError("match_masks='frame' needs a decoder with a frame level")
        features = output.clip[-1].features.detach().float()  # channels-last once, and not for each stage
        frames = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).view_as(features)
        embeddings = [
            stage.embedding if source == 'clip' else stage.embedding.unflatten(0, frames.shape[:2])
            for stage in (output.clip if source == 'clip' else output.frame or [])
        ]
        return [MaskPrediction(stage.logits, each, frames) for stage, each in zip(output.clip, embeddings)]

    def _divisors(self, table: MatchTable, targets: list[ClipTarget]) -> tuple[Tensor, Tensor]:
        """Number of targets, each counted once a known frame, and class weights of each stage ``[S]``.

        Both are means over processes; the number of targets is at least 1.
        """
        numbers = [len(target.classes) for target in targets]
        in_frames = sum(number * target.num_known_frames for number, target in zip(numbers, targets))
        counts = [self.empty_weight.new_full((1,), count) for count in (sum(numbers), in_frames)]
        sums = torch.cat([*counts, self.empty_weight[table.classes].sum((1, 2))])
        world_size = 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            world_size = dist.get_world_size()
        frames = (sums[1] / sums[0].clamp(min=1)).clamp(min=1)  # of a target
        return (sums[0] / world_size).clamp(min=1) * frames, sums[2:] / world_size

    def _class_losses(self, output: DecoderOutput, table: MatchTable, targets: list[ClipTarget]) -> Tensor:
        """Weighted cross-entropy over all queries, ``[S, L]``; a mean over known frames at the frame level."""
        losses = []
        partly = any(target.known_frames is not None for target in targets)
        for stages in output.levels:
            logits = torch.stack([stage.logits for stage in stages]).float()  # [S, B or B * T, Q, K + 1]
            frames = logits.shape[1] // table.classes.shape[1]
            classes = table.classes.repeat_interleave(frames, 1)
            each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.empty_weight.float(), reduction='none')
            if stages is output.frame and partly:
                weights = [known / max(target.num_known_frames, 1) for target in targets
                           for known in target.known_frames or [True] * frames]
                losses.append(each.view(len(stages), len(weights), -1).sum(2) @ each.new_tensor(weights))
            else:
                losses.append(each.view(len(stages), -1).sum(1) / frames)
        return torch.stack(losses, 1)

    def _mask_losses(
        self, own: Round, masks: Tensor, targets: Tensor, rows: Tensor, known: Tensor | None
    ) -> dict[str, Tensor]:
        """Weighted sums over the masks and frames of a round, each ``[S, L]``.

        Args:
            own: the round.
            masks: float ``[S, L, R, h, w]``.
            targets: float ``[sum(n) * T, H, W]``.
            rows: the target of each mask, int64 ``[S, L, R]``.
            known: bool, as ``targets``: pixels that take part; None: all.
        """
        weights = own.losses or {}
        if own.labels == 'self':
            size = masks.shape[-2], masks.shape[-1]
            counts, area = mask_losses.count_labels(targets, size)
            if known is not None:
                area = mask_losses.count_labels(known.float(), size)[0][rows]
            values = dict(zip(('mask', 'dice'), mask_losses.self_labelled_losses(masks, counts[rows], area)))
            return {f'loss_{name}_unmatched': weights[name] * values[name].sum(2) for name in weights}
        if not masks.shape[2]:
            return dict.fromkeys((f'loss_{name}' for name in weights), masks.sum((2, 3, 4)))  # zero, in the graph
        at_points = self._at_points(masks, targets, rows, known)
        return {
            f'loss_{name}': weight * mask_losses.loss_of_known(find(LOSSES, name, 'losses'), *at_points).sum(2)
            for name, weight in weights.items()
        }

    def _at_points(
        self, masks: Tensor, targets: Tensor, rows: Tensor, known: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, targets and what is known at points where the masks are uncertain, each ``[S, L, R, N]``.

        The targets of all stages and levels are read in one sampling, one row of points for each prediction that a
        target mask is matched with: no target is copied.
        """
        points = torch.stack([
            point_sampling.uncertain_points(
                each.detach(), self.num_points, self.oversample_ratio, self.importance_sample_ratio)
            for each in masks.flatten(0, 1)
        ])  # [S * L, R, N, 2]
        logits = point_sampling.sample_points(masks.flatten(0, 2)[:, None], points.flatten(0, 1))
        rows = rows.flatten(0, 1)
        sets = torch.arange(len(points), device=masks.device)[:, None]
        by_target = points.new_zeros(len(targets), *points.shape[:1], *points.shape[2:])
        by_target[rows, sets] = points
        sampled = point_sampling.sample_points(targets[:, None], by_target.flatten(1, 2))
        wanted = sampled.view(by_target.shape[:3])[rows, sets]
        shape = (*masks.shape[:3], -1)
        if known is not None:
            row, column = point_sampling.pixels_of(points, *known.shape[1:])
            known = known[rows[..., None], row, column].view(shape)
        return logits.view(shape), wanted.view(shape), known


@torch.no_grad()
def _statistics(logits: Tensor, table: MatchTable, takes_part: Sequence[bool]) -> dict[str, Tensor]:
    """Shares of matched queries and of right classes in the final stage, for each round, without a synchronisation."""

    def share(count: Tensor | int, whole: int) -> Tensor:
        parts = (count, whole)  # filled in on the device: a number that is copied there makes the host wait
        return torch.stack([x if isinstance(x, Tensor) else logits.new_full((), x, dtype=torch.float32) for x in parts])

    predicted = logits[..., :-1].argmax(-1)
    parts = iter(zip(table.queries, table.wanted))
    statistics = {}
    for i, active in enumerate(takes_part):
        queries, wanted = next(parts) if active else ([], predicted.new_empty(1, 0))
        name = _ROUND_NAMES[i] if i < len(_ROUND_NAMES) else str(i)
        found = [clip.gather(0, own[-1]) for clip, own in zip(predicted, queries)]
        right = (torch.cat(found) == wanted[-1]).sum().float() if found else 0
        statistics[f'matched_{name}'] = share(wanted.shape[1], predicted.numel())
        statistics[f'acc_{name}'] = share(right, wanted.shape[1])
    return statistics
