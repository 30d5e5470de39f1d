"""Rounds of matching: equal to the reference, and right where the reference failed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mmseg.models.losses import point_sampling
from mmseg.models.losses.matching import (
    Matcher,
    assign_rounds,
    classification_cost,
    dice_cost,
    mask_cost,
    masks_at,
    replace_non_finite,
)
from mmseg.models.structures import ClipTarget, MaskPrediction
from tests.models.whole_masks import as_factors
from tests.reference import recipe

SIZES = (1, 2, 3, 7, 12, 20, 50)


@pytest.fixture
def reference_points(monkeypatch):
    monkeypatch.setattr(
        point_sampling, 'random_points', lambda rows, n, device: torch.from_numpy(recipe.points(rows, n)).to(device)
    )


def reference_target(seed: int, n: int, frames: int) -> ClipTarget:
    rng = np.random.default_rng(seed)
    classes = np.sort(rng.choice(124, n, replace=False))
    cells = rng.integers(0, n, (frames, 6, 10))
    labels = classes[cells.repeat(8, 1).repeat(8, 2)]
    return ClipTarget(torch.from_numpy(classes), torch.from_numpy(labels))


def match(stage: MaskPrediction, targets: list[ClipTarget], round2_cost: str, points: int = 256):
    masks = [target.masks.float() for target in targets]
    return Matcher(num_points=points)([stage], targets, masks, ('full', round2_cost))[0]


@pytest.mark.parametrize('frames', [1, 2])
@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('name, round2_cost', [('1f', 'mask'), ('norm', 'full')])
def test_reference_costs_and_assignments(reference, reference_points, name, round2_cost, n, frames):
    gold = reference('matcher.npz')
    key = f'{name}/n{n}_t{frames}'
    target = reference_target(200 + n, n, frames)
    stage = as_factors(
        torch.from_numpy(2 * recipe.image(100 + n, 1, 100, 125)),
        torch.from_numpy(4 * recipe.image(101 + n, 1, 100, frames, 12, 20)),
    )
    costs = Matcher(num_points=256).costs(stage, target, target.masks.float(), ['full', round2_cost])
    ((primary, secondary),) = match(stage, [target], round2_cost)

    cost2 = costs[-1].clone()  # as the paper writes round 2
    cost2[primary.query] = 1000 * cost2.max().abs()
    for got, recorded in ((costs[0], gold[f'{key}/cost0']), (cost2, gold[f'{key}/cost1'])):
        got = got[:, : recorded.shape[1]].numpy()
        assert np.abs(got - recorded).max() <= 1e-6 * np.abs(recorded).max()
    for got, r in ((primary, 0), (secondary, 1)):
        order = np.argsort(gold[f'{key}/row{r}'])
        assert np.array_equal(got.query, gold[f'{key}/row{r}'][order])
        assert np.array_equal(got.target, gold[f'{key}/col{r}'][order])


@pytest.mark.parametrize('name, round2_cost', [('1f', 'mask'), ('norm', 'full')])
def test_reference_batch(reference, reference_points, name, round2_cost):
    gold = reference('matcher.npz')
    stage = as_factors(
        torch.from_numpy(2 * recipe.image(300, 2, 100, 125)),
        torch.from_numpy(4 * recipe.image(301, 2, 100, 2, 12, 20)),
    )
    matches = match(stage, [reference_target(301, 4, 2), reference_target(302, 9, 2)], round2_cost)
    for b, pair in enumerate(matches):
        for r, got in enumerate(pair):
            key = f'{name}/batch2/round{r}/b{b}'
            order = np.argsort(gold[f'{key}/row'])
            assert np.array_equal(got.query, gold[f'{key}/row'][order])
            assert np.array_equal(got.target, gold[f'{key}/col'][order])


def free_rows_round(cost2: np.ndarray, used: np.ndarray):
    """Round 2 as the best assignment of the free queries alone."""
    free = np.setdiff1d(np.arange(len(cost2)), used)
    row, column = linear_sum_assignment(cost2[free])
    return free[row], column


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 14), st.integers(0, 20), st.sampled_from([0.0, 0.5, 2.0]), st.integers(0, 10**6))
def test_round_two_is_the_best_assignment_of_the_free_queries(queries, n, shift, seed):
    rng = np.random.default_rng(seed)
    cost, cost2 = (rng.random((2, queries, n)) - shift).astype(np.float32)
    primary, secondary = assign_rounds([cost, cost2])
    assert len(primary.query) == min(queries, n)
    assert len(secondary.query) == min(queries - len(primary.query), n)
    for got in (primary, secondary):
        assert (got.query.diff() > 0).all()
        assert len(set(got.target.tolist())) == len(got.target)
    assert not set(primary.query.tolist()) & set(secondary.query.tolist())
    row, column = linear_sum_assignment(cost)
    row2, column2 = free_rows_round(cost2, row)
    assert np.array_equal(primary.query, row) and np.array_equal(primary.target, column)
    assert np.array_equal(secondary.query, row2) and np.array_equal(secondary.target, column2)


def test_round_two_avoids_used_queries_when_all_costs_are_zero():
    primary, secondary = assign_rounds([np.zeros((6, 3), np.float32)] * 2)
    assert len(secondary.query) == 3
    assert not set(primary.query.tolist()) & set(secondary.query.tolist())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 200), st.integers(0, 1000))
def test_costs_equal_their_definitions(queries, n, points, seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, 12, (queries, points)).astype(np.float32))
    t = torch.from_numpy(rng.random((n, points), dtype=np.float32))
    pairs = x[:, None].expand(-1, n, -1).double(), t.expand(queries, -1, -1).double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(*pairs, reduction='none').mean(2)
    torch.testing.assert_close(mask_cost(x, t).double(), bce, rtol=2e-6, atol=1e-6)
    s = pairs[0].sigmoid()
    dice = 1 - (2 * (s * pairs[1]).sum(2) + 1) / (s.sum(2) + pairs[1].sum(2) + 1)
    torch.testing.assert_close(dice_cost(x, t).double(), dice, rtol=2e-6, atol=1e-6)
    logits = x[:, :5] if points >= 5 else x
    classes = torch.tensor([0, logits.shape[1] - 1])
    torch.testing.assert_close(classification_cost(logits, classes), -logits.softmax(1)[:, classes])


def test_extreme_logits_cost_what_they_should():
    x = torch.tensor([[300.0, -300.0, 0.0] * 50, [float('nan')] * 150])
    t = torch.zeros(1, 150)
    cost = mask_cost(x, t)
    assert cost[0, 0] == pytest.approx((300 + np.log(2)) / 3, rel=1e-6)
    assert cost[1, 0].isnan()


def test_permuted_queries_permute_the_match(reference_points):
    target = reference_target(1, 6, 2)
    stage = as_factors(
        torch.from_numpy(recipe.image(7, 1, 20, 125)), torch.from_numpy(recipe.image(8, 1, 20, 2, 12, 20))
    )
    order = torch.randperm(20)
    permuted = as_factors(stage.logits[:, order], stage.masks[:, order])
    for got, expected in zip(match(permuted, [target], 'full')[0], match(stage, [target], 'full')[0]):
        moved = {(int(order[q]), int(t)) for q, t in zip(got.query, got.target)}
        assert moved == {(int(q), int(t)) for q, t in zip(expected.query, expected.target)}


def test_sixty_targets_with_a_hundred_queries_and_more_targets_than_queries():
    stage = as_factors(
        torch.from_numpy(recipe.image(7, 1, 100, 125)), torch.from_numpy(recipe.image(8, 1, 100, 1, 12, 20))
    )
    primary, secondary = match(stage, [reference_target(1, 60, 1)], 'mask')[0]
    assert (len(primary.query), len(secondary.query)) == (60, 40)
    few = as_factors(stage.logits[:, :10], stage.masks[:, :10])
    primary, secondary = match(few, [reference_target(1, 12, 1)], 'full')[0]
    assert (len(primary.query), len(secondary.query)) == (10, 0)


def test_a_clip_without_targets_matches_nothing():
    stage = as_factors(torch.zeros(2, 8, 5), torch.zeros(2, 8, 1, 4, 4))
    targets = [
        ClipTarget(torch.empty(0, dtype=torch.int64), torch.full((1, 16, 16), 255)),
        ClipTarget(torch.tensor([0, 1]), torch.arange(16).div(8, rounding_mode='floor').expand(1, 16, 16)),
    ]
    for round2_cost in ('full', 'mask'):
        empty, full = match(stage, targets, round2_cost)
        assert [len(m.query) for m in (*empty, *full)] == [0, 0, 2, 2]


def test_non_finite_costs_are_replaced_and_reported_once():
    stage = MaskPrediction(torch.randn(1, 8, 5), torch.randn(1, 8, 6), torch.randn(1, 1, 6, 4, 4))
    stage.embedding[0, 2] = float('nan')
    stage.embedding[0, 3] = float('inf')
    labels = torch.arange(16).div(4, rounding_mode='floor').expand(1, 16, 16)
    target = ClipTarget(torch.arange(4), labels)
    assigner = Matcher(num_points=32)
    with pytest.warns(RuntimeWarning, match=r'stage 0, clip 0 .*\(mask logits\)'):
        ((primary, _),) = assigner([stage], [target], [target.masks.float()])[0]
    assert not {2, 3} & set(primary.query.tolist())
    stage.logits[:] = float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ((primary, secondary),) = assigner([stage], [target], [target.masks.float()])[0]
    assert (len(primary.query), len(secondary.query)) == (4, 4)


def test_replaced_costs_are_worse_than_any_finite_one():
    cost = np.array([[1.0, np.nan], [np.inf, -3.0], [-np.inf, 2.0]], np.float32)
    clean, number = replace_non_finite(cost)
    assert number == 3 and np.isfinite(clean).all()
    assert clean[~np.isfinite(cost)].min() > 2.0
    assert replace_non_finite(np.full((2, 2), np.nan))[1] == 4
    assert replace_non_finite(clean)[0] is clean


@pytest.mark.parametrize('per_frame', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_masks_at_points_are_the_masks_read_at_points(per_frame, dtype):
    torch.manual_seed(0)
    features = torch.randn(1, 3, 8, 5, 7, dtype=dtype)
    embedding = torch.randn(1, *([3] if per_frame else []), 4, 8, dtype=dtype)
    prediction = MaskPrediction(torch.randn(1, 4, 5), embedding, features)
    points = torch.rand(1, 20, 2)
    equation = 'ntqc,ntchw->nqthw' if per_frame else 'nqc,ntchw->nqthw'
    masks = torch.einsum(equation, embedding.float(), features.float())
    got, expected = masks_at(prediction, points), point_sampling.sample_points(masks[0], points).flatten(1)
    assert got.dtype == torch.float32 and got.shape == (4, 60)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(0, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_rounds_share_no_query(queries, n, rounds, seed):
    """Each assigns as many targets as it finds free queries for, and is the best assignment of those."""
    costs = list(np.random.default_rng(seed).random((rounds, queries, n)).astype(np.float32) - 0.5)
    used = np.empty(0, np.int64)
    for cost, match in zip(costs, assign_rounds(costs), strict=True):
        assert len(match.query) == min(queries - len(used), n)
        row, column = free_rows_round(cost, used)
        assert np.array_equal(match.query, row) and np.array_equal(match.target, column)
        used = np.concatenate([used, row])
