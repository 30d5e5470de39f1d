"""The training criterion of THE-Mask (arXiv 2309.08020): two rounds of matching, a loss for each rank of queries.

One call goes: targets -> matching of all stages (one host synchronisation) -> tables of matched masks -> for each level
classification, point losses of primary masks, self-labelled losses of secondary masks -> named, weighted scalars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg.kernels.layers import linear
from mmseg.models.assigners.two_round import Round2Cost, TwoRoundAssigner
from mmseg.models.losses import mask_losses, point_sampling
from mmseg.models.structures import ClipTarget, DecoderOutput, MaskPrediction, Match
from mmseg.registry import build, retired
from mmseg.utils.arguments import Count, Index, Ratio, Share, Weight

Matches = list[list[tuple[Match, Match]]]  # [stage][clip]: (primary, secondary)
_NO_MATCH = Match(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


@retired(class_weight_unmatched=())
@dataclass(frozen=True)
class LossWeights:
    """Weights of cost terms and losses (``matcher_cfg`` of the reference, which gave both the same ones).

    Attributes:
        class_weight: class cost, and ``loss_ce``.
        mask_weight: BCE cost, and BCE of primary masks.
        dice_weight: dice cost, and dice of primary masks.
        mask_weight_unmatched: BCE of secondary masks.
        dice_weight_unmatched: dice of secondary masks.
    """

    class_weight: Weight = 2.0
    mask_weight: Weight = 5.0
    dice_weight: Weight = 5.0
    mask_weight_unmatched: Weight = 0.5
    dice_weight_unmatched: Weight = 0.5


@dataclass
class _MatchTable:
    """Where the matched masks of all stages lie, as tensors on the model's device.

    S stages; L levels (clip, then frame); R1 primary and R2 secondary masks of one frame.

    Attributes:
        classes: int64 ``[S, B, Q]``, what each query should predict; K is "no object".
        rows: int64 ``[S, L, R1 + R2]``, rows into the predicted masks of a stage and level seen as ``[-1, h, w]``.
            They run over clips, queries, frames at the clip level and over clips, frames, queries at the frame level.
        queries: int64 ``[S, m]`` for each rank and, within it, each clip: the clip's matched queries.
        targets: int64 ``[S, L, R1 + R2]``, rows into the target masks of the batch ``[sum(n) * T, H, W]``.
        num_primary: R1.
    """

    classes: Tensor
    rows: Tensor
    queries: Sequence[Tensor]
    targets: Tensor
    num_primary: int


@retired(deep_supervision=(True,), dec_layers=())
class THEMaskCriterion(nn.Module):
    """Matching and losses of all prediction stages, at the clip level and, where there is one, at the frame level.

    With a frame level (video stage) costs take classes from clip queries and masks from frame queries, round 2
    minimises the full cost, and the result serves both levels.  Without one (one-frame stage) round 2 minimises the
    mask cost alone, and while ``iteration < warmup_iters`` only round 1 trains.  ``round2_cost`` and ``match_masks``
    override these choices.

    Over several processes, divisors are averaged (one all-reduce of one small vector a call, in training and
    wherever a process group exists), so that ranks on parts of a batch give the gradients of one process on all of it.

    After a call, ``last_statistics`` describes the matching of the final stage: ``matched_primary`` and
    ``matched_secondary`` (share of queries that a round matched), ``acc_primary`` and ``acc_secondary`` (share of
    these with the right class at the clip level).  Each is a count and what it is a share of, float32 ``[2]`` on the
    model's device, so that shares of several calls or processes can be added up and an empty one harms none.

    Args:
        num_classes: K.
        matcher_cfg: see :class:`LossWeights`.
        warmup_iters: one-frame stage: iterations before round 2 starts; ``None``: it never does (as in the released
            code, whose counter did not advance).
        round_weight: factors on the mask losses of primary and secondary queries.
        aux_weight: factor on all losses of the frame level.
        no_object_weight: weight of "no object" in the cross-entropy.
        train_num_points: points for each mask and frame, in costs and losses.
        oversample_ratio: candidates a point of the primary losses, from which the uncertain ones are chosen.
        importance_sample_ratio: share of uncertain points.
        round2_cost: ``'full'`` or ``'mask'``; ``None``: as the stage of training has it (above).
        match_masks: level whose masks are matched, ``'clip'`` or ``'frame'``; ``None``: frame where there is one.

    Attributes:
        empty_weight: float buffer ``[K + 1]``, class weights of the cross-entropy.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: Count,
        matcher_cfg: Annotated[Mapping[str, Any] | None, LossWeights] = None,
        warmup_iters: Index | None = 30000,
        round_weight: Sequence[Weight] = (1.0, 0.5),
        aux_weight: Weight = 0.25,
        no_object_weight: Weight = 0.1,
        train_num_points: Count = 12544,
        oversample_ratio: Ratio = 3.0,
        importance_sample_ratio: Share = 0.75,
        round2_cost: Round2Cost | None = None,
        match_masks: Literal['clip', 'frame'] | None = None,
    ) -> None:
        super().__init__()
        self.weights = build(LossWeights, matcher_cfg, 'matcher_cfg')
        if len(round_weight) != 2:
            raise ValueError(f'round_weight: expected two factors (primary, secondary), got {round_weight!r}')
        if round2_cost not in (None, 'full', 'mask'):
            raise ValueError(f"round2_cost: expected 'full', 'mask' or None, got {round2_cost!r}")
        if match_masks not in (None, 'clip', 'frame'):
            raise ValueError(f"match_masks: expected 'clip', 'frame' or None, got {match_masks!r}")
        if oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                'expected oversample_ratio >= 1 and 0 <= importance_sample_ratio <= 1, got '
                f'{oversample_ratio} and {importance_sample_ratio}'
            )
        self.num_classes = num_classes
        self.warmup_iters = warmup_iters
        self.round_weight = tuple(round_weight)
        self.aux_weight = aux_weight
        self.num_points = train_num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.round2_cost = round2_cost
        self.match_masks = match_masks
        self.assigner = TwoRoundAssigner(
            self.weights.class_weight, self.weights.mask_weight, self.weights.dice_weight, train_num_points
        )
        self.last_statistics: dict[str, Tensor] = {}
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer('empty_weight', empty_weight)

    def forward(self, output: DecoderOutput, targets: list[ClipTarget], iteration: int = 0) -> dict[str, Tensor]:
        """Weighted losses, to be summed.

        Args:
            output: predictions of S stages for B clips (any floating dtype; computed in float32, also under autocast).
            targets: B targets of T frames of one size.
            iteration: training iteration, for the warm-up.

        Returns:
            ``loss_ce``, ``r0_loss_mask``, ``r0_loss_dice``, ``r1_loss_mask_unmatched``, ``r1_loss_dice_unmatched`` (in
            warm-up ``loss_ce``, ``loss_mask``, ``loss_dice``) of the final stage, the same with ``_0`` to ``_{S-2}``
            for the earlier ones, and all of them with ``_aux`` behind for the frame level; float32 scalars.
        """
        clip = output.clip[-1]
        num_frames = clip.num_frames
        sizes = sorted({tuple(target.labels.shape) for target in targets})
        if len(targets) != len(clip.logits) or len(sizes) != 1 or sizes[0][0] != num_frames:
            raise ValueError(
                f'predictions for {len(clip.logits)} clips of {num_frames} frames need as many label maps of '
                f'one size [{num_frames}, H, W]; got {len(targets)} of {sizes}'
            )
        with torch.autocast(clip.logits.device.type, enabled=False):
            return self._losses(output, targets, iteration)

    def _losses(self, output: DecoderOutput, targets: list[ClipTarget], iteration: int) -> dict[str, Tensor]:
        levels = [level for level in (output.clip, output.frame) if level is not None]
        warming_up = len(levels) == 1 and (self.warmup_iters is None or iteration < self.warmup_iters)
        target_masks = [target.masks.float() for target in targets]
        matches = self._match(levels, targets, target_masks)
        if warming_up:
            matches = [[(primary, _NO_MATCH) for primary, _ in stage] for stage in matches]
        table = self._tabulate(matches, levels, targets)
        num_targets, num_classified = self._divisors(table, targets)

        values = {'loss_ce': (self._class_losses(levels, table) / num_classified[:, None], self.weights.class_weight)}
        matched = self._matched_masks(output, table)
        primary_masks, secondary_masks = matched.split([table.num_primary, matched.shape[2] - table.num_primary], 2)
        all_targets = torch.cat(target_masks).flatten(0, 1)
        mask_divisor = num_targets * output.clip[-1].num_frames
        bce, dice = self._primary_losses(primary_masks, all_targets, table)
        prefix = '' if warming_up else 'r0_'
        values[f'{prefix}loss_mask'] = (bce / mask_divisor, self.weights.mask_weight * self.round_weight[0])
        values[f'{prefix}loss_dice'] = (dice / mask_divisor, self.weights.dice_weight * self.round_weight[0])
        if not warming_up:
            bce, dice = self._secondary_losses(secondary_masks, all_targets, table)
            values['r1_loss_mask_unmatched'] = (
                bce / mask_divisor,
                self.weights.mask_weight_unmatched * self.round_weight[1],
            )
            values['r1_loss_dice_unmatched'] = (
                dice / mask_divisor,
                self.weights.dice_weight_unmatched * self.round_weight[1],
            )

        earlier = range(len(output.clip) - 1)
        stage_names = [(len(earlier), ''), *((stage, f'_{stage}') for stage in earlier)]
        level_names = [('', 1.0), ('_aux', self.aux_weight)][: len(levels)]
        return {
            f'{name}{stage_suffix}{suffix}': value[stage, level] * (weight * level_weight)
            for level, (suffix, level_weight) in enumerate(level_names)
            for stage, stage_suffix in stage_names
            for name, (value, weight) in values.items()
        }

    def _match(
        self, levels: list[list[MaskPrediction]], targets: list[ClipTarget], target_masks: list[Tensor]
    ) -> Matches:
        """Matches of all stages: classes from the clip level, masks from the level that ``match_masks`` names."""
        source = self.match_masks or ('frame' if len(levels) == 2 else 'clip')
        if source == 'frame' and len(levels) == 1:
            raise ValueError("match_masks='frame' needs a decoder with a frame level")
        stages = [
            clip if source == 'clip' else _with_masks_of(clip, frame) for clip, frame in zip(levels[0], levels[-1])
        ]
        round2_cost = self.round2_cost or ('full' if len(levels) == 2 else 'mask')
        return self.assigner(stages, targets, target_masks, round2_cost)

    def _tabulate(self, matches: Matches, levels: list[list[MaskPrediction]], targets: list[ClipTarget]) -> _MatchTable:
        """Turns matches into row indices, on the host, and moves them to the device together."""
        batch, queries = levels[0][0].logits.shape[:2]
        frames = levels[0][0].num_frames
        first_target = np.cumsum([0, *(len(target.classes) for target in targets)])
        frame = np.arange(frames)
        pairs, rows = [], []  # [S][2][M] (query of the batch, target of the batch), [S][L][2][R]
        for stage in matches:
            stage_pairs, clip_rows, frame_rows = [], [], []
            for rank in (0, 1):
                for b, clip_match in enumerate(stage):
                    query, target = (index.cpu().numpy() for index in (clip_match[rank].query, clip_match[rank].target))
                    in_batch, target = b * queries + query, first_target[b] + target
                    stage_pairs.append((in_batch, target))
                    targets_of_frames = target[:, None] * frames + frame
                    clip_rows.append(((in_batch[:, None] * frames + frame).ravel(), targets_of_frames.ravel()))
                    frame_rows.append(
                        (((b * frames + frame)[:, None] * queries + query).ravel(), targets_of_frames.T.ravel())
                    )
            pairs.append(np.concatenate(stage_pairs, 1))
            rows.append([np.concatenate(level, 1) for level in (clip_rows, frame_rows)[: len(levels)]])
        device = levels[0][0].logits.device
        shapes = [np.shape(pairs), np.shape(rows)]
        flat = torch.from_numpy(np.concatenate([np.ravel(pairs), np.ravel(rows)])).to(device, non_blocking=True)
        pair_table, row_table = (
            part.view(shape) for part, shape in zip(flat.split([int(np.prod(shape)) for shape in shapes]), shapes)
        )

        wanted = torch.cat([target.classes for target in targets])[pair_table[:, 1]]
        classes = wanted.new_full((len(matches), batch * queries), self.num_classes)
        classes.scatter_(1, pair_table[:, 0], wanted)
        num_primary = sum(len(primary.query) for primary, _ in matches[-1])
        self._remember(levels[0][-1].logits, pair_table[-1, 0], wanted[-1], num_primary)
        return _MatchTable(
            classes=classes.unflatten(1, (batch, queries)),
            rows=row_table[:, :, 0],
            queries=(pair_table[:, 0] % queries).split(
                [len(pair[rank].query) for rank in (0, 1) for pair in matches[0]], dim=1
            ),
            targets=row_table[:, :, 1],
            num_primary=num_primary * frames,
        )

    @torch.no_grad()
    def _remember(self, logits: Tensor, query: Tensor, wanted: Tensor, num_primary: int) -> None:
        """Statistics of the final stage's matching, without a synchronisation."""
        right = (logits.flatten(0, 1).index_select(0, query)[:, :-1].argmax(1) == wanted).float()

        def share(count: Tensor | int, whole: int) -> Tensor:
            parts = (count, whole)  # filled in on the device: a number that is copied there makes the host wait
            return torch.stack([x if isinstance(x, Tensor) else right.new_full((), x) for x in parts])

        primary, secondary = right[:num_primary], right[num_primary:]
        queries = logits.shape[0] * logits.shape[1]
        self.last_statistics = {
            'matched_primary': share(len(primary), queries),
            'matched_secondary': share(len(secondary), queries),
            'acc_primary': share(primary.sum(), len(primary)),
            'acc_secondary': share(secondary.sum(), len(secondary)),
        }

    def _divisors(self, table: _MatchTable, targets: list[ClipTarget]) -> tuple[Tensor, Tensor]:
        """Number of targets (at least 1) and sum of class weights of each stage ``[S]``, means over processes."""
        num_targets = self.empty_weight.new_full((1,), sum(len(target.classes) for target in targets))
        divisors = torch.cat([num_targets, self.empty_weight[table.classes].sum((1, 2))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(divisors)
            divisors /= dist.get_world_size()
        return divisors[0].clamp(min=1), divisors[1:]

    def _class_losses(self, levels: list[list[MaskPrediction]], table: _MatchTable) -> Tensor:
        """Weighted cross-entropy over all queries, ``[S, L]``; a mean over the frames at the frame level."""
        losses = []
        for stages in levels:
            logits = torch.stack([stage.logits for stage in stages]).float()  # [S, B or B * T, Q, K + 1]
            frames = logits.shape[1] // table.classes.shape[1]
            classes = table.classes.repeat_interleave(frames, 1)
            each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.empty_weight.float(), reduction='none')
            losses.append(each.view(len(stages), -1).sum(1) / frames)
        return torch.stack(losses, 1)

    def _matched_masks(self, output: DecoderOutput, table: _MatchTable) -> Tensor:
        """The matched masks alone, float32 ``[S, L, R1 + R2, h, w]``: nothing after this touches the others."""
        levels = [stages for stages in (output.clip, output.frame) if stages is not None]
        if output.mask_features is not None:
            return _multiply_matched(levels, output.mask_features, table.queries).float()
        # As rows of a table: its backward pass adds to new zeros in place, that of index_select to a copy of them.
        matched = [
            torch.stack([F.embedding(own, stage.masks.flatten(0, 2).flatten(1)) for stage, own in zip(stages, rows)])
            for stages, rows in zip(levels, table.rows.unbind(1))
        ]
        return torch.stack(matched, 1).unflatten(3, output.clip[-1].masks.shape[3:]).float()

    def _primary_losses(self, masks: Tensor, targets: Tensor, table: _MatchTable) -> tuple[Tensor, Tensor]:
        """Sums over masks and frames of BCE and dice on points, each ``[S, L]``.

        The targets of all stages and levels are read in one sampling, a target mask serving every prediction that is
        matched with it: no target is copied.

        Args:
            masks: float ``[S, L, R1, h, w]``.
            targets: float ``[sum(n) * T, H, W]``.
            table: the matches.
        """
        stages, levels, rows = masks.shape[:3]
        if rows == 0:
            nothing = masks.sum((2, 3, 4))  # zero, and part of the graph
            return nothing, nothing
        points = torch.stack(
            [
                point_sampling.uncertain_points(
                    each.detach(), self.num_points, self.oversample_ratio, self.importance_sample_ratio
                )
                for each in masks.flatten(0, 1)
            ]
        )  # [S * L, R1, N, 2]
        logits = point_sampling.sample_points(masks.flatten(0, 2)[:, None], points.flatten(0, 1))
        target_rows = table.targets[:, :, :rows].flatten(0, 1)
        sets = torch.arange(len(points), device=masks.device)[:, None]
        by_target = points.new_zeros(len(targets), *points.shape[:1], *points.shape[2:])
        by_target[target_rows, sets] = points
        sampled = point_sampling.sample_points(targets[:, None], by_target.flatten(1, 2))
        wanted = sampled.view(by_target.shape[:3])[target_rows, sets]
        logits = logits.view_as(wanted)
        bce = mask_losses.bce_loss(logits, wanted).sum(1)
        dice = mask_losses.dice_loss(logits, wanted).sum(1)
        return bce.view(stages, levels), dice.view(stages, levels)

    def _secondary_losses(self, masks: Tensor, targets: Tensor, table: _MatchTable) -> tuple[Tensor, Tensor]:
        """Sums over masks and frames of BCE and dice against self-labels, each ``[S, L]``; arguments as above."""
        counts, area = mask_losses.count_labels(targets, (masks.shape[-2], masks.shape[-1]))
        wanted = counts[table.targets[:, :, table.num_primary :]]
        bce, dice = mask_losses.self_labelled_losses(masks, wanted, area)
        return bce.sum(2), dice.sum(2)


def _with_masks_of(clip: MaskPrediction, frame: MaskPrediction) -> MaskPrediction:
    """Classes of clip queries with the masks of their frame queries."""
    batch, frames = len(clip.logits), clip.num_frames
    whole, embedding, features = (None if x is None else x.unflatten(0, (batch, frames)) for x in frame[1:])
    if whole is not None:
        return MaskPrediction(clip.logits, whole.squeeze(3).transpose(1, 2))
    return MaskPrediction(clip.logits, None, embedding, None if features is None else features.squeeze(2))


def _multiply_matched(
    levels: list[list[MaskPrediction]], mask_features: Tensor, queries: Sequence[Tensor]
) -> Tensor:
    """Matched masks, multiplied from embeddings and features, ``[S, L, R1 + R2, h, w]``.

    A mask is the product of its query's embedding with the mask features and depends on no other query, so products of
    the matched rows are the matched masks.  All stages, levels and ranks share one product a frame: the backward pass
    multiplies the few matched rows instead of all queries, and adds to the gradient of a frame's features once.

    Args:
        levels: for each of L levels S predictions with embeddings ``[N, Q, C]``; N = B (clip) or B * T (frame level).
        mask_features: ``[B, T, C, h, w]``.
        queries: as in :class:`_MatchTable`.
    """
    batch, frames = mask_features.shape[:2]
    embeddings = [
        torch.stack([stage.embedding for stage in stages if stage.embedding is not None]).unflatten(1, (batch, -1))
        for stages in levels
    ]  # [S, B, 1 or T, Q, C]
    pixels = mask_features.flatten(3).transpose(2, 3)
    ranks: list[list[list[Tensor]]] = [[[] for _ in levels] for _ in (0, 1)]
    for b, clip_pixels in enumerate(pixels.unbind()):
        matched = queries[b::batch]  # of both ranks
        query = torch.cat(list(matched), 1)[:, None, :, None]
        chosen = torch.stack([
            level[:, b].gather(2, query.expand(-1, level.shape[2], -1, level.shape[4])).expand(-1, frames, -1, -1)
            for level in embeddings
        ])  # [L, S, T, m, C]
        masks = torch.stack([
            linear(frame, rows.flatten(0, 2)).T.unflatten(0, rows.shape[:3])
            for frame, rows in zip(clip_pixels.unbind(), chosen.unbind(2))
        ])  # [T, L, S, m, h * w]
        for rank, part in enumerate(masks.split([index.shape[1] for index in matched], 3)):
            for level, (own, embedding) in enumerate(zip(part.unbind(1), embeddings)):
                order = (1, 2, 0, 3) if embedding.shape[2] == 1 else (1, 0, 2, 3)
                ranks[rank][level].append(own.permute(order).flatten(1, 2))
    rows = torch.stack([torch.cat(first + second, 1) for first, second in zip(*ranks)], 1)
    return rows.unflatten(3, mask_features.shape[3:])
