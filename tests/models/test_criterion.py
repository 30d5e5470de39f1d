"""The criterion: equal to the reference, equal to the plain formulation, and safe on bad input."""

from __future__ import annotations

import functools
import os
import socket
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plain
from mmseg.models.losses import THEMaskCriterion, mask_losses, point_sampling
from mmseg.models.structures import ClipTarget, DecoderOutput, MaskPrediction
from mmseg.registry import build
from mmseg.utils.errors import ConfigError
from tests.models.whole_masks import Whole, as_output
from tests.reference import recipe


@functools.cache
def seeded_points(rows, n, device):
    return torch.from_numpy(recipe.points(rows, n)).to(device)


@pytest.fixture
def reference_points(monkeypatch):
    for module in (point_sampling, plain):
        monkeypatch.setattr(module, 'random_points', seeded_points)


class Stages(NamedTuple):
    """Whole masks of the stages of both levels."""

    clip: list[Whole]
    frame: list[Whole] | None = None

    @property
    def output(self) -> DecoderOutput:
        return as_output(*self)


def prediction(seed: int, samples: int, frames: int, queries=100, classes=124, size=(12, 20)) -> Whole:
    return Whole(
        torch.from_numpy(2 * recipe.image(seed, samples, queries, classes + 1)).requires_grad_(),
        torch.from_numpy(4 * recipe.image(seed + 1, samples, queries, frames, *size)).requires_grad_(),
    )


def leaves(output: Stages) -> list[torch.Tensor]:
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
    return Stages(clip, frame if frame_level else None), labels


def assert_same_losses_and_gradients(output, labels, criterion):
    inputs = leaves(output)
    losses = criterion(output.output, ClipTarget.from_labels(labels, criterion.num_classes))
    gradients = torch.autograd.grad(sum(losses.values()), inputs)
    expected = plain.losses_of(*output, labels, criterion.empty_weight, criterion.num_points)
    assert losses.keys() == expected.keys()
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
    output = Stages(
        [prediction(1000 + seed, batch, frames) for seed in seeds],
        [prediction(2000 + seed, batch * frames, 1) for seed in seeds] if mode == 'video' else None,
    )
    labels = torch.stack([torch.from_numpy(recipe.labels(1500 + k, frames, 48, 80)) for k in range(batch)])
    criterion = THEMaskCriterion(124, train_num_points=512)
    losses = criterion(output.output, ClipTarget.from_labels(labels, 124), iteration)
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
def test_equals_the_plain_formulation(seed, batch, frames, queries, size, label, frame_level):
    with pytest.MonkeyPatch.context() as patch:
        for module in (point_sampling, plain):
            patch.setattr(module, 'random_points', seeded_points)
        output, labels = small_case(seed, batch, frames, 2, queries, 7, size, label, frame_level)
        criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=0)
        assert_same_losses_and_gradients(output, labels, criterion)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), frames=st.integers(1, 3), frame_level=st.booleans(),
       share=st.sampled_from([0.1, 0.6]), whole=st.booleans())
def test_what_is_unknown_takes_no_part(seed, batch, frames, frame_level, share, whole):
    """Unknown pixels, and whole frames of them, are left out by the plain formulation, row by row."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (point_sampling, plain):
            patch.setattr(module, 'random_points', seeded_points)
        output, labels = small_case(seed, batch, frames, 2, 9, 7, frame_level=frame_level)
        rng = np.random.default_rng(seed)
        labels[torch.from_numpy(rng.random(labels.shape) < share)] = 254
        if whole and frames > 1:
            labels[0, rng.integers(frames)] = 254
        assert_same_losses_and_gradients(output, labels, THEMaskCriterion(7, train_num_points=33, warmup_iters=0))


def test_an_unlabelled_frame_changes_nothing(reference_points):
    """Whatever its masks and classes at the frame level are, losses stay, and it gets no gradient from the masks."""
    output, labels = small_case(3, batch=1, frames=2)
    labels[0, 0] = 254
    criterion = THEMaskCriterion(7, train_num_points=33)

    def losses():
        return criterion(output.output, ClipTarget.from_labels(labels, 7))

    before = losses()
    gradients = torch.autograd.grad(sum(before.values()), [stage.masks for stage in output.frame])
    assert all(gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        for stage in output.frame:
            stage.masks[0] += 100
            stage.logits[0] *= -3
        for stage in output.clip:
            stage.masks[:, :, 0] -= 50
    assert losses() == before


def test_a_loss_that_knows_nothing_of_unknown_pixels_sees_the_others():
    x, t = torch.randn(2, 3, 8, requires_grad=True), torch.rand(2, 3, 8)
    known = torch.rand(2, 3, 8) < 0.5
    known[0, 0] = False
    ours = mask_losses.loss_of_known(mask_losses.bce_loss, x, t, known)
    theirs = mask_losses.loss_of_known(lambda x, t: mask_losses.bce_loss(x, t), x, t, known)
    torch.testing.assert_close(ours, theirs)
    assert ours[0, 0] == 0 and torch.autograd.grad(theirs.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize('frames', [1, 2])
def test_one_round_is_mask2former(reference_points, frames):
    """The baselines' losses and gradients: those of the plain formulation without its second round."""
    output, labels = small_case(5, batch=2, frames=frames, frame_level=False)
    rounds = [dict(name='', cost='full', losses=dict(mask=5.0, dice=5.0), labels='target')]
    criterion = THEMaskCriterion(7, train_num_points=33, rounds=rounds)
    inputs = leaves(output)
    losses = criterion(output.output, ClipTarget.from_labels(labels, 7))
    expected = plain.losses_of(*output, labels, criterion.empty_weight, 33, warming_up=True)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(sum(each.values()), inputs, materialize_grads=True) for each in (losses, expected)]
    for got, want in zip(*gradients):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9


@pytest.mark.parametrize('void', [(0,), (0, 1)])
def test_void_clips_give_zero_mask_losses_with_a_graph(reference_points, void):
    output, labels = small_case(1)
    labels[list(void)] = 255
    criterion = THEMaskCriterion(7, train_num_points=33)
    assert_same_losses_and_gradients(output, labels, criterion)
    losses = criterion(output.output, ClipTarget.from_labels(labels, 7))
    assert all(loss.requires_grad and torch.isfinite(loss) for loss in losses.values())
    if len(void) == 2:
        assert all(loss == 0 for name, loss in losses.items() if 'ce' not in name.split('_')[1])
        assert losses['loss_ce'] > 0
    gradients = torch.autograd.grad(sum(losses.values()), leaves(output))  # every output is part of the graph
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('void', [(), (1,), (0, 1)])
@pytest.mark.parametrize('frame_level', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_masks_are_products_of_their_factors(reference_points, frame_level, void, layout):
    """The losses and gradients of the plain formulation, which multiplies all masks; in any layout of the features."""
    stages, labels = small_case(13, frames=3, frame_level=frame_level)
    labels[list(void)] = 255
    features = torch.randn(6, 5, 6, 8).to(memory_format=layout).requires_grad_()
    shared = features.view(2, 3, 5, 6, 8)
    inputs = [features]

    def level(whole, features):
        factors = [MaskPrediction(stage.logits, torch.randn(len(features), 12, 5, requires_grad=True), features)
                   for stage in whole]  # fmt: skip
        inputs.extend(leaf for stage in factors for leaf in (stage.logits, stage.embedding))
        masks = [torch.einsum('nqc,ntchw->nqthw', stage.embedding, features) for stage in factors]
        return factors, [Whole(stage.logits, mask) for stage, mask in zip(factors, masks)]

    clip, whole_clip = level(stages.clip, shared)
    frame, whole_frame = level(stages.frame, features[:, None]) if frame_level else (None, None)
    criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=0)
    losses = criterion(DecoderOutput(clip, frame), ClipTarget.from_labels(labels, 7))
    expected = plain.losses_of(whole_clip, whole_frame, labels, criterion.empty_weight, 33)
    gradients = [
        torch.autograd.grad(torch.stack(list(each.values())).sum(), inputs, materialize_grads=True)
        for each in (losses, expected)
    ]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    for got, want in zip(*gradients):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9


def test_sixty_targets_with_a_hundred_queries(reference_points):
    labels = torch.arange(60).view(1, 1, 6, 10).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for frame_level in (False, True):
        output = Stages(
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
        permuted = Stages([Whole(p.logits[:, order], p.masks[:, order]) for p in output.clip])
        losses, moved = criterion(output.output, targets), criterion(permuted.output, targets)
    finally:
        point_sampling.random_points = saved
    for name, loss in losses.items():
        torch.testing.assert_close(moved[name], loss, rtol=1e-5, atol=1e-6)


def test_batched_clips_equal_single_clips(reference_points):
    """With the same number of targets, the loss of a batch is the mean of the losses of its clips."""
    output, labels = small_case(4, frame_level=True)
    labels[1] = labels[0]
    criterion = THEMaskCriterion(7, train_num_points=33)
    together = criterion(output.output, ClipTarget.from_labels(labels, 7))
    masks = 0.0
    for b in range(2):
        single = Stages(
            [Whole(p.logits[b : b + 1], p.masks[b : b + 1]) for p in output.clip],
            [Whole(p.logits[2 * b : 2 * b + 2], p.masks[2 * b : 2 * b + 2]) for p in output.frame],
        )
        alone = criterion(single.output, ClipTarget.from_labels(labels[b : b + 1], 7))
        masks += alone['loss_ce'] + alone['r1_loss_mask_unmatched'] + alone['r1_loss_dice_unmatched_0_aux']
    names = ('loss_ce', 'r1_loss_mask_unmatched', 'r1_loss_dice_unmatched_0_aux')  # without random points in the loss
    torch.testing.assert_close(sum(together[name] for name in names), masks / 2, rtol=1e-6, atol=1e-6)


def test_nan_logits_do_not_stop_the_matching_and_show_in_the_loss():
    output, labels = small_case(5)
    criterion = THEMaskCriterion(7, train_num_points=33)
    output.clip[-1].logits.data[0, 3] = float('nan')
    with pytest.warns(RuntimeWarning, match='stage 1, clip 0 .*class logits'):
        losses = criterion(output.output, ClipTarget.from_labels(labels, 7))
    assert losses['loss_ce'].isnan()
    assert torch.isfinite(losses['loss_ce_0'])
    for p in output.frame:
        p.masks.data[:] = float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # reported once
        losses = criterion(output.output, ClipTarget.from_labels(labels, 7))
    assert losses['r0_loss_mask_aux'].isnan() and losses['r1_loss_dice_unmatched_0_aux'].isnan()


def test_warm_up_follows_the_iteration_and_only_in_the_one_frame_stage(reference_points):
    output, labels = small_case(6, frame_level=False)
    targets = ClipTarget.from_labels(labels, 7)
    in_warm_up = {'loss_ce', 'loss_mask', 'loss_dice', 'loss_ce_0', 'loss_mask_0', 'loss_dice_0'}
    criterion = THEMaskCriterion(7, train_num_points=33, warmup_iters=10)
    assert set(criterion(output.output, targets, 9)) == in_warm_up
    assert len(criterion(output.output, targets, 10)) == 10
    released = THEMaskCriterion(7, train_num_points=33, warmup_iters=None)
    assert set(released(output.output, targets, 10**9)) == in_warm_up
    video, _ = small_case(6)
    assert len(released(video.output, targets, 0)) == 20


POINTS, CELLS = dict(mask=5.0, dice=5.0), dict(mask=0.5, dice=0.5)
TWO = [dict(name='r0_', losses=POINTS), dict(name='r1_', losses=CELLS, weight=0.5, labels='self')]


def test_the_papers_rounds_as_a_config(reference_points):
    output, labels = small_case(20)
    targets = ClipTarget.from_labels(labels, 7)
    default = THEMaskCriterion(7, train_num_points=33)(output.output, targets)
    written = THEMaskCriterion(7, train_num_points=33, rounds=TWO)(output.output, targets)
    assert default.keys() == written.keys() and all(torch.equal(default[name], written[name]) for name in default)


def test_one_round_is_that_of_mask2former(reference_points):
    output, labels = small_case(21, frame_level=False)
    targets = ClipTarget.from_labels(labels, 7)
    one = THEMaskCriterion(7, train_num_points=33, rounds=[dict(name='', losses=POINTS)])
    warm_up = THEMaskCriterion(7, train_num_points=33, warmup_iters=None)
    losses, expected = one(output.output, targets), warm_up(output.output, targets)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)
    assert set(one.last_statistics) == {'matched_primary', 'acc_primary'}


def test_a_third_round(reference_points):
    """It trains queries that the first two left, from its own iteration on, as the plain self-labels do."""
    case, labels = small_case(22, batch=1, stages=1, queries=24, frame_level=False)
    targets = ClipTarget.from_labels(labels, 7)
    third = dict(name='r2_', cost='mask', losses=dict(dice=3.0), weight=0.25, labels='self', start=7)
    criterion = THEMaskCriterion(7, train_num_points=33, rounds=[*TWO, third])
    before, after = criterion(case.output, targets, 6), criterion(case.output, targets, 7)
    assert set(after) - set(before) == {'r2_loss_dice_unmatched'}
    n = len(targets[0].classes)
    assert criterion.last_statistics['matched_2'].tolist() == [n, 24] and 'acc_2' in criterion.last_statistics
    output, masks = case.output, [target.masks.float() for target in targets]
    ((matches,),) = criterion.matcher(output.clip, targets, masks, ['full', 'full', 'mask'])
    assert len(set(torch.cat([match.query for match in matches]).tolist())) == 3 * n
    pairs = [(matches[2].query, matches[2].target)]
    x, t = plain.matched_masks(tuple(case.clip[0]), masks, pairs, False)
    dice = plain.secondary_losses(x, t, torch.ones_like(t, dtype=torch.bool))[1]
    torch.testing.assert_close(after['r2_loss_dice_unmatched'], 0.25 * 3 * dice / n / 2)


def test_matching_options(reference_points):
    output, labels = small_case(7)
    targets = ClipTarget.from_labels(labels, 7)
    default, same, clip, mask = (
        sum(THEMaskCriterion(7, train_num_points=33, **options)(output.output, targets).values()).item()
        for options in ({}, dict(match_masks='frame', round2_cost='full'), dict(match_masks='clip'),
                        dict(round2_cost='mask'))
    )  # fmt: skip
    assert default == same
    assert len({default, clip, mask}) == 3
    one_frame = as_output(output.clip)
    with pytest.raises(ValueError, match='frame level'):
        THEMaskCriterion(7, match_masks='frame')(one_frame, targets)


@pytest.mark.parametrize('options', [
    dict(round_weight=[1.0]), dict(round2_cost='dice'), dict(match_masks='both'), dict(oversample_ratio=0.5),
    dict(importance_sample_ratio=1.5), dict(rounds=[]), dict(rounds=[dict(name='', start=5)]),
    dict(rounds=[dict(name='a'), dict(name='a')]), dict(rounds=[dict(name='a', cost='dice')]),
    dict(rounds=[dict(name='a', losses=dict(focal=1.0))]), dict(rounds=[dict(name='a', wieght=1.0)]),
    dict(rounds=[dict(name='a', labels='self', losses=dict(other=1.0))]),
    dict(round_weight=[1.0, 0.5], rounds=[dict(name='')]), dict(round2_cost='full', rounds=[dict(name='')]),
    dict(matcher_cfg=dict(), rounds=[dict(name='')]), dict(cost_weights=dict(mask=1.0)),
])  # fmt: skip
def test_wrong_options_are_errors(options):
    with pytest.raises(ConfigError, match=rf'loss_cfg\.?{next(iter(options))}|{next(iter(options))}'):
        build(THEMaskCriterion, options, 'loss_cfg', num_classes=7)


def test_wrong_matcher_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"matcher_cfg\.mask_wieght.*did you mean 'mask_weight'"):
        THEMaskCriterion(7, matcher_cfg=dict(mask_wieght=1.0))
    THEMaskCriterion(7, matcher_cfg=dict(class_weight_unmatched=1.0))  # of the reference, without effect there too


def test_clip_length_must_fit():
    output, labels = small_case(8)
    with pytest.raises(ValueError, match='2 clips of 2 frames'):
        THEMaskCriterion(7)(output.output, ClipTarget.from_labels(labels[:, :1], 7))


def test_float32_under_autocast(reference_points):
    output, labels = small_case(9)
    targets = ClipTarget.from_labels(labels, 7)
    criterion = THEMaskCriterion(7, train_num_points=33)
    expected = criterion(output.output, targets)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = criterion(output.output, targets)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    half = DecoderOutput(*([MaskPrediction(*(x.bfloat16() for x in p)) for p in level] for level in output.output))
    assert all(loss.dtype == torch.float32 for loss in criterion(half, targets).values())


def test_random_points_are_drawn_anew_for_each_clip_and_each_mask_set(monkeypatch):
    calls = []

    def points(rows, n, device):
        calls.append((rows, n))
        return seeded_points(rows, n, device)

    monkeypatch.setattr(point_sampling, 'random_points', points)
    output, labels = small_case(10, batch=2, frames=2, stages=3)
    targets = ClipTarget.from_labels(labels, 7)
    THEMaskCriterion(7, train_num_points=40)(output.output, targets)
    rows = 2 * sum(min(len(target.classes), 12) for target in targets)
    assert calls == [(1, 40)] * 6 + [(rows, 120), (rows, 10)] * 6


def test_matching_statistics():
    output, labels = small_case(11, queries=16)
    targets = ClipTarget.from_labels(labels, 7)
    criterion = THEMaskCriterion(7, train_num_points=33)
    for p in output.clip:
        p.logits.data[:] = 0
        p.logits.data[:, :, 3] = 9.0  # every query says class 3
    criterion(output.output, targets)
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
    half = Stages(
        [Whole(p.logits[part], p.masks[part]) for p in output.clip],
        [Whole(p.logits[4 * rank : 4 * rank + 4], p.masks[4 * rank : 4 * rank + 4]) for p in output.frame],
    )
    labels[0] = 255  # a rank with a void clip
    losses = THEMaskCriterion(7, train_num_points=33)(half.output, ClipTarget.from_labels(labels[part], 7))
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
    losses = THEMaskCriterion(7, train_num_points=33)(output.output, ClipTarget.from_labels(labels, 7))
    whole = torch.autograd.grad(sum(losses.values()), leaves(output))
    for a, b, expected in zip(*ranks, whole):
        assert (a + b - expected).norm() <= 1e-5 * expected.norm()
