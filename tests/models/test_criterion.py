"""The criterion: equal to the reference, equal to a naive formulation, and safe on bad input."""

from __future__ import annotations

import functools
import os
import socket
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mmseg.models.losses import THEMaskCriterion, mask_losses, point_sampling
from mmseg.models.structures import ClipTarget, DecoderOutput, MaskPrediction
from mmseg.utils.errors import ConfigError
from tests.reference import recipe


@functools.cache
def seeded_points(rows, n, device):
    return torch.from_numpy(recipe.points(rows, n)).to(device)


@pytest.fixture
def reference_points(monkeypatch):
    monkeypatch.setattr(point_sampling, 'random_points', seeded_points)


def prediction(seed: int, samples: int, frames: int, queries=100, classes=124, size=(12, 20)) -> MaskPrediction:
    return MaskPrediction(
        torch.from_numpy(2 * recipe.image(seed, samples, queries, classes + 1)).requires_grad_(),
        torch.from_numpy(4 * recipe.image(seed + 1, samples, queries, frames, *size)).requires_grad_(),
    )


def leaves(output: DecoderOutput) -> list[torch.Tensor]:
    """Logits and masks of the final stage, then of the earlier ones; clip level first."""
    levels = [level for level in (output.clip, output.frame) if level]
    return [leaf for level in levels for p in (level[-1], *level[:-1]) for leaf in (p.logits, p.masks)]


def small_case(seed, batch=2, frames=2, stages=2, queries=12, classes=7, size=(6, 8), label=(25, 30), frame_level=True):
    """A random output and targets; labels come in blocks, with void, and differ in number between clips."""
    rng = np.random.default_rng(seed)
    clip = [prediction(10 * s, batch, frames, queries, classes, size) for s in range(stages)]
    frame = [prediction(10 * s + 5, batch * frames, 1, queries, classes, size) for s in range(stages)]
    cells = rng.integers(0, classes, (batch, frames, 4, 5))
    cells[rng.random(cells.shape) < 0.2] = 255
    rows, columns = (np.arange(n) * c // n for n, c in zip(label, (4, 5)))
    labels = torch.from_numpy(cells[:, :, rows][..., columns])
    return DecoderOutput(clip, frame if frame_level else None), labels


def naive_losses(output: DecoderOutput, labels: torch.Tensor, criterion: THEMaskCriterion) -> dict[str, torch.Tensor]:
    """SPEC §7 word by word: loops over stages, levels, clips; masks resized to the label size."""
    batch, frames, height, width = labels.shape
    n_points, classes = criterion.num_points, criterion.num_classes
    video = output.frame is not None
    targets = []
    for label in labels:
        present = [c for c in label.unique().tolist() if c != 255]
        targets.append((present, torch.stack([(label == c).float() for c in present]) if present else None))
    divisor = max(sum(len(present) for present, _ in targets), 1)
    losses = {}
    for s, clip in enumerate(output.clip):
        suffix = '' if s == len(output.clip) - 1 else f'_{s}'
        matches = []
        for b, (present, masks) in enumerate(targets):
            points = point_sampling.random_points(1, n_points, 'cpu')
            if not present:
                matches.append([([], []), ([], [])])
                continue
            source = clip.masks[b]
            if video:
                source = output.frame[s].masks[b * frames : (b + 1) * frames, :, 0].transpose(0, 1)
            x = F.grid_sample(
                source.detach(), 2 * points[:, None].expand(len(source), -1, -1, -1) - 1, align_corners=False
            )[:, :, 0]
            t = F.grid_sample(masks, 2 * points[:, None].expand(len(masks), -1, -1, -1) - 1, align_corners=False)[
                :, :, 0
            ]
            x, t = x.flatten(1), t.flatten(1)
            bce = torch.stack(
                [F.binary_cross_entropy_with_logits(x, r.expand_as(x), reduction='none').mean(1) for r in t], 1
            )
            p = x.sigmoid()
            dice = torch.stack([1 - (2 * (p * r).sum(1) + 1) / (p.sum(1) + r.sum() + 1) for r in t], 1)
            cost = 2 * -clip.logits[b].detach().softmax(1)[:, present] + 5 * bce + 5 * dice
            first = linear_sum_assignment(cost)
            second = (cost if video else bce).clone()
            second[first[0]] = 1000 * second.max().abs()
            second = linear_sum_assignment(second)
            free = ~np.isin(second[0], first[0])
            matches.append([first, (second[0][free], second[1][free])])
        for level in ('clip', 'frame') if video else ('clip',):
            stage = (output.clip if level == 'clip' else output.frame)[s]
            weight = 1.0 if level == 'clip' else criterion.aux_weight
            # (sample, query, clip, target, frame) of every mask, samples being clips or frames
            rows = [[], []]
            wanted = torch.full(stage.logits.shape[:2], classes)
            for b in range(batch):
                for rank, (queries, indices) in enumerate(matches[b]):
                    pairs = [(q, i, f) for q, i in zip(queries, indices) for f in range(frames)]
                    if level == 'frame':
                        pairs.sort(key=lambda pair: pair[2])
                    for q, i, f in pairs:
                        sample = b if level == 'clip' else b * frames + f
                        wanted[sample, q] = targets[b][0][i]
                        rows[rank].append((stage.masks[sample, q, f if level == 'clip' else 0], targets[b][1][i, f]))
            end = f'{suffix}{"" if level == "clip" else "_aux"}'
            ce = F.cross_entropy(stage.logits.flatten(0, 1), wanted.flatten(), criterion.empty_weight)
            losses[f'loss_ce{end}'] = 2 * weight * ce
            if not rows[0]:
                continue
            x, t = (torch.stack(column)[:, None] for column in zip(*rows[0]))
            candidates = point_sampling.random_points(len(x), 3 * n_points, 'cpu')
            drawn = F.grid_sample(x.detach(), 2 * candidates[:, None] - 1, align_corners=False)[:, 0, 0]
            kept = (-drawn.abs()).topk(int(0.75 * n_points), 1).indices
            points = torch.stack([c[k] for c, k in zip(candidates, kept)])
            rest = point_sampling.random_points(len(x), n_points - int(0.75 * n_points), 'cpu')
            points = torch.cat([points, rest], 1)[:, None]
            x, t = (F.grid_sample(m, 2 * points - 1, align_corners=False)[:, 0, 0] for m in (x, t))
            for rank, prefix, end_, factor in ((0, 'r0', '', 5.0), (1, 'r1', '_unmatched', 0.25)):
                if rank == 1:
                    if not rows[1]:
                        continue
                    x, t = (torch.stack(column)[:, None] for column in zip(*rows[1]))
                    x = F.interpolate(x, size=(height, width), mode='nearest').flatten(1)
                    t = t.flatten(1) * (x.sigmoid() > 0.5)
                p = x.sigmoid()
                bce = F.binary_cross_entropy_with_logits(x, t, reduction='none').mean(1).sum()
                dice = (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()
                losses[f'{prefix}_loss_mask{end_}{end}'] = factor * weight * bce / divisor / frames
                losses[f'{prefix}_loss_dice{end_}{end}'] = factor * weight * dice / divisor / frames
    return losses


def assert_same_losses_and_gradients(output, labels, criterion):
    inputs = leaves(output)
    losses = criterion(output, ClipTarget.from_labels(labels, criterion.num_classes))
    gradients = torch.autograd.grad(sum(losses.values()), inputs)
    expected = naive_losses(output, labels, criterion)
    assert {name for name, value in losses.items() if value != 0} <= set(expected) <= set(losses)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}')
    for got, want in zip(gradients, torch.autograd.grad(sum(expected.values()), inputs, materialize_grads=True)):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9


@pytest.mark.parametrize('case', [
    '1f_iter0_bs2_t1', '1f_iter30000_bs2_t1', '1f_iter30000_bs1_t2',
    'video_iterNone_bs1_t2', 'video_iterNone_bs2_t2', 'video_iterNone_bs1_t1',
])  # fmt: skip
def test_reference_losses_and_gradients(reference, reference_points, case):
    gold = reference('criterion.json')[case]
    mode, iteration, batch, frames = case.split('_')
    iteration = int(iteration[4:].replace('None', '0'))
    batch, frames = int(batch[2:]), int(frames[1:])
    seeds = [10 + 2 * i for i in range(9)] + [0]
    output = DecoderOutput(
        [prediction(1000 + seed, batch, frames) for seed in seeds],
        [prediction(2000 + seed, batch * frames, 1) for seed in seeds] if mode == 'video' else None,
    )
    labels = torch.stack([torch.from_numpy(recipe.labels(1500 + k, frames, 48, 80)) for k in range(batch)])
    criterion = THEMaskCriterion(124, train_num_points=512)
    losses = criterion(output, ClipTarget.from_labels(labels, 124), iteration)
    assert set(losses) == set(gold['loss'])
    for name, value in gold['loss'].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(gold['total'], rel=1e-6)
    total.backward()
    for i, leaf in enumerate(leaves(output)):
        assert leaf.grad.norm().item() == pytest.approx(gold['grad_norm'][str(i)], rel=1e-5)
    for i, sample in gold['grad_sample'].items():
        grad = leaves(output)[int(i)].grad.flatten()
        np.testing.assert_allclose(grad[:: len(grad) // 16][:16], sample, rtol=1e-4, atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    queries=st.integers(3, 12),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    label=st.tuples(st.integers(9, 40), st.integers(9, 40)),
    frame_level=st.booleans(),
)
def test_equals_the_naive_formulation(seed, batch, frames, queries, size, label, frame_level):
    saved, point_sampling.random_points = point_sampling.random_points, seeded_points
    try:
        output, labels = small_case(seed, batch, frames, 2, queries, 7, size, label, frame_level)
        criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=0)
        assert_same_losses_and_gradients(output, labels, criterion)
    finally:
        point_sampling.random_points = saved


@pytest.mark.parametrize('void', [(0,), (0, 1)])
def test_void_clips_give_zero_mask_losses_with_a_graph(reference_points, void):
    output, labels = small_case(1)
    labels[list(void)] = 255
    criterion = THEMaskCriterion(7, train_num_points=33)
    assert_same_losses_and_gradients(output, labels, criterion)
    losses = criterion(output, ClipTarget.from_labels(labels, 7))
    assert all(loss.requires_grad and torch.isfinite(loss) for loss in losses.values())
    if len(void) == 2:
        assert all(loss == 0 for name, loss in losses.items() if 'ce' not in name.split('_')[1])
        assert losses['loss_ce'] > 0
    gradients = torch.autograd.grad(sum(losses.values()), leaves(output))  # every output is part of the graph
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('void', [(), (1,), (0, 1)])
@pytest.mark.parametrize('frame_level', [False, True])
def test_masks_given_by_their_factors(reference_points, frame_level, void):
    """The same losses and gradients whether matched masks are taken from all masks or multiplied anew."""
    output, labels = small_case(13, frames=3, frame_level=frame_level)
    labels[list(void)] = 255
    features = torch.randn(2, 3, 5, 6, 8, requires_grad=True)
    inputs = [features]

    def with_factors(stage, samples):
        embedding = torch.randn(samples, 12, 5, requires_grad=True)
        inputs.extend((stage.logits, embedding))
        masks = torch.einsum('nqc,ntchw->nqthw', embedding, features.view(samples, -1, 5, 6, 8))
        return MaskPrediction(stage.logits, masks, embedding)

    clip = [with_factors(stage, 2) for stage in output.clip]
    frame = [with_factors(stage, 6) for stage in output.frame] if frame_level else None
    criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=0)
    results = []
    for factor in (None, features):
        losses = criterion(DecoderOutput(clip, frame, factor), ClipTarget.from_labels(labels, 7))
        total = torch.stack(list(losses.values())).sum()
        results.append((total, torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)))
    (loss, gradients), (loss2, gradients2) = results
    torch.testing.assert_close(loss, loss2, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients2, gradients):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9


def test_sixty_targets_with_a_hundred_queries(reference_points):
    labels = torch.arange(60).view(1, 1, 6, 10).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for frame_level in (False, True):
        output = DecoderOutput(
            [prediction(0, 1, 1, 100, 60, (6, 10))], [prediction(9, 1, 1, 100, 60, (6, 10))] if frame_level else None
        )
        criterion = THEMaskCriterion(60, train_num_points=64, warmup_iters=0)
        assert_same_losses_and_gradients(output, labels, criterion)
        assert criterion.last_statistics['matched_primary'].tolist() == [60, 100]
        assert criterion.last_statistics['matched_secondary'].tolist() == [40, 100]


def test_permuted_queries_change_nothing():
    torch.manual_seed(1)
    output, labels = small_case(3, batch=1, frame_level=False)
    points = {n: torch.rand(1, n, 2) for n in (33, 99, 9)}
    saved, point_sampling.random_points = (
        point_sampling.random_points,
        lambda rows, n, device: points[n].repeat(rows, 1, 1),
    )
    try:
        criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=0)
        targets = ClipTarget.from_labels(labels, 7)
        order = torch.randperm(12)
        permuted = [MaskPrediction(p.logits[:, order], p.masks[:, order]) for p in output.clip]
        losses, moved = criterion(output, targets), criterion(DecoderOutput(permuted), targets)
    finally:
        point_sampling.random_points = saved
    for name, loss in losses.items():
        torch.testing.assert_close(moved[name], loss, rtol=1e-5, atol=1e-6)


def test_batched_clips_equal_single_clips(reference_points):
    """With the same number of targets, the loss of a batch is the mean of the losses of its clips."""
    output, labels = small_case(4, frame_level=True)
    labels[1] = labels[0]
    criterion = THEMaskCriterion(7, train_num_points=33)
    together = criterion(output, ClipTarget.from_labels(labels, 7))
    masks = 0.0
    for b in range(2):
        single = DecoderOutput(
            [MaskPrediction(p.logits[b : b + 1], p.masks[b : b + 1]) for p in output.clip],
            [MaskPrediction(p.logits[2 * b : 2 * b + 2], p.masks[2 * b : 2 * b + 2]) for p in output.frame],
        )
        alone = criterion(single, ClipTarget.from_labels(labels[b : b + 1], 7))
        masks += alone['loss_ce'] + alone['r1_loss_mask_unmatched'] + alone['r1_loss_dice_unmatched_0_aux']
    names = ('loss_ce', 'r1_loss_mask_unmatched', 'r1_loss_dice_unmatched_0_aux')  # without random points in the loss
    torch.testing.assert_close(sum(together[name] for name in names), masks / 2, rtol=1e-6, atol=1e-6)


def test_nan_logits_do_not_stop_the_matching_and_show_in_the_loss():
    output, labels = small_case(5)
    criterion = THEMaskCriterion(7, train_num_points=33)
    output.clip[-1].logits.data[0, 3] = float('nan')
    with pytest.warns(RuntimeWarning, match='stage 1, clip 0 .*class logits'):
        losses = criterion(output, ClipTarget.from_labels(labels, 7))
    assert losses['loss_ce'].isnan()
    assert torch.isfinite(losses['loss_ce_0'])
    for p in output.frame:
        p.masks.data[:] = float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # reported once
        losses = criterion(output, ClipTarget.from_labels(labels, 7))
    assert losses['r0_loss_mask_aux'].isnan() and losses['r1_loss_dice_unmatched_0_aux'].isnan()


def test_warm_up_follows_the_iteration_and_only_in_the_one_frame_stage(reference_points):
    output, labels = small_case(6, frame_level=False)
    targets = ClipTarget.from_labels(labels, 7)
    in_warm_up = {'loss_ce', 'loss_mask', 'loss_dice', 'loss_ce_0', 'loss_mask_0', 'loss_dice_0'}
    criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=10)
    assert set(criterion(output, targets, 9)) == in_warm_up
    assert len(criterion(output, targets, 10)) == 10
    released = THEMaskCriterion(7, train_num_points=33, warmup_iters=None)
    assert set(released(output, targets, 10**9)) == in_warm_up
    video, _ = small_case(6)
    assert len(released(video, targets, 0)) == 20


def test_matching_options(reference_points):
    output, labels = small_case(7)
    targets = ClipTarget.from_labels(labels, 7)
    default, same, clip, mask = (
        sum(THEMaskCriterion(7, train_num_points=33, **options)(output, targets).values()).item()
        for options in ({}, dict(match_masks='frame', round2_cost='full'), dict(match_masks='clip'),
                        dict(round2_cost='mask'))
    )  # fmt: skip
    assert default == same
    assert len({default, clip, mask}) == 3
    one_frame = DecoderOutput(output.clip)
    with pytest.raises(ValueError, match='frame level'):
        THEMaskCriterion(7, match_masks='frame')(one_frame, targets)


@pytest.mark.parametrize('options', [
    dict(round_weight=[1.0]), dict(round2_cost='dice'), dict(match_masks='both'), dict(oversample_ratio=0.5),
    dict(importance_sample_ratio=1.5),
])  # fmt: skip
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        THEMaskCriterion(7, **options)


def test_wrong_matcher_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"matcher_cfg\.mask_wieght.*did you mean 'mask_weight'"):
        THEMaskCriterion(7, matcher_cfg=dict(mask_wieght=1.0))
    THEMaskCriterion(7, matcher_cfg=dict(class_weight_unmatched=1.0))  # of the reference, without effect there too


def test_clip_length_must_fit():
    output, labels = small_case(8)
    with pytest.raises(ValueError, match='2 clips of 2 frames'):
        THEMaskCriterion(7)(output, ClipTarget.from_labels(labels[:, :1], 7))


def test_float32_under_autocast(reference_points):
    output, labels = small_case(9)
    targets = ClipTarget.from_labels(labels, 7)
    criterion = THEMaskCriterion(7, train_num_points=33)
    expected = criterion(output, targets)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = criterion(output, targets)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    half = DecoderOutput(*([MaskPrediction(p.logits.bfloat16(), p.masks.bfloat16()) for p in level]
                           for level in (output.clip, output.frame)))  # fmt: skip
    assert all(loss.dtype == torch.float32 for loss in criterion(half, targets).values())


def test_random_points_are_drawn_anew_for_each_clip_and_each_mask_set(monkeypatch):
    calls = []

    def points(rows, n, device):
        calls.append((rows, n))
        return seeded_points(rows, n, device)

    monkeypatch.setattr(point_sampling, 'random_points', points)
    output, labels = small_case(10, batch=2, frames=2, stages=3)
    targets = ClipTarget.from_labels(labels, 7)
    THEMaskCriterion(7, train_num_points=40)(output, targets)
    rows = 2 * sum(min(len(target.classes), 12) for target in targets)
    assert calls == [(1, 40)] * 6 + [(rows, 120), (rows, 10)] * 6


def test_matching_statistics():
    output, labels = small_case(11, queries=16)
    targets = ClipTarget.from_labels(labels, 7)
    criterion = THEMaskCriterion(7, train_num_points=33)
    for p in output.clip:
        p.logits.data[:] = 0
        p.logits.data[:, :, 3] = 9.0  # every query says class 3
    criterion(output, targets)
    n = sum(len(target.classes) for target in targets)
    right = sum((target.classes == 3).sum().item() for target in targets)
    assert {name: share.tolist() for name, share in criterion.last_statistics.items()} == {
        'matched_primary': [n, 32],
        'matched_secondary': [n, 32],
        'acc_primary': [right, n],
        'acc_secondary': [right, n],
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60))
def test_nearest_source_is_what_torch_reads(source, size):
    x = torch.randn(1, 1, source, 3)
    y = F.interpolate(x, size=(size, 3), mode='nearest')
    assert torch.equal(y, x[:, :, mask_losses.nearest_source(size, source)])


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_label_counts_are_the_adjoint_of_nearest_resizing(label, size):
    masks = (torch.rand(3, *label) < 0.5).float()
    counts, area = mask_losses.count_labels(masks, size)
    cells = torch.zeros(3, 1, *size, requires_grad=True)
    resized = F.interpolate(cells, size=label, mode='nearest')
    (expected,) = torch.autograd.grad(resized, cells, masks[:, None])
    assert torch.equal(counts, expected[:, 0])
    assert area.sum() == label[0] * label[1]


def _rank_gradients(rank, port, directory):
    """One of two processes on half of the batch; saves the gradients that DDP would average."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    point_sampling.random_points = fixed_points
    output, labels = small_case(12, batch=4)
    part = slice(2 * rank, 2 * rank + 2)
    half = DecoderOutput(
        [MaskPrediction(p.logits[part], p.masks[part]) for p in output.clip],
        [MaskPrediction(p.logits[4 * rank : 4 * rank + 4], p.masks[4 * rank : 4 * rank + 4]) for p in output.frame],
    )
    labels[0] = 255  # a rank with a void clip
    losses = THEMaskCriterion(7, train_num_points=33)(half, ClipTarget.from_labels(labels[part], 7))
    torch.save([g / 2 for g in torch.autograd.grad(sum(losses.values()), leaves(output))], f'{directory}/{rank}.pt')
    dist.destroy_process_group()


def fixed_points(rows, n, device):
    """The same points for every row, so that a half batch sees those of the whole batch."""
    return torch.from_numpy(recipe.points(1, n)).repeat(rows, 1, 1)


def test_two_ranks_on_half_batches_give_the_gradients_of_one_process(tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(_rank_gradients, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
    monkeypatch.setattr(point_sampling, 'random_points', fixed_points)
    output, labels = small_case(12, batch=4)
    labels[0] = 255
    losses = THEMaskCriterion(7, train_num_points=33)(output, ClipTarget.from_labels(labels, 7))
    whole = torch.autograd.grad(sum(losses.values()), leaves(output))
    for a, b, expected in zip(*ranks, whole):
        assert (a + b - expected).norm() <= 1e-5 * expected.norm()
