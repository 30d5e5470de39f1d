"""Random points and bilinear sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.kernels.layers import smallest
from mmseg.models.losses import point_sampling
from tests.reference import recipe


def naive_sample(image: np.ndarray, x: float, y: float) -> float:
    """Bilinear value at (x, y) in 0..1, pixel centres at (i + 0.5) / size, zero outside."""
    height, width = image.shape
    x, y = x * width - 0.5, y * height - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    value = 0.0
    for i, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for j, wx in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            if 0 <= i < height and 0 <= j < width:
                value += wy * wx * float(image[i, j])
    return value


def test_random_points_are_uniform_and_follow_the_seed():
    torch.manual_seed(3)
    points = point_sampling.random_points(4, 5000, 'cpu')
    assert points.shape == (4, 5000, 2) and points.dtype == torch.float32
    assert points.min() >= 0 and points.max() < 1
    assert abs(points.mean() - 0.5) < 0.01
    assert abs(points.var() - 1 / 12) < 0.002
    following = point_sampling.random_points(4, 5000, 'cpu')
    together = torch.stack([points.flatten(), following.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.02
    torch.manual_seed(3)
    assert torch.equal(points, point_sampling.random_points(4, 5000, 'cpu'))
    assert torch.equal(following, point_sampling.random_points(4, 5000, 'cpu'))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_sampling_is_bilinear_and_zero_outside(height, width, seed):
    maps = torch.from_numpy(recipe.image(seed, 2, 3, height, width))
    points = torch.from_numpy(recipe.points(2, 7))
    sampled = point_sampling.sample_points(maps, points)
    expected = [[[naive_sample(c, *p) for p in row.tolist()] for c in m.numpy()] for m, row in zip(maps, points)]
    np.testing.assert_allclose(sampled, expected, atol=2e-5)


def test_shared_points_serve_every_map():
    maps = torch.from_numpy(recipe.image(1, 3, 2, 5, 6))
    points = torch.from_numpy(recipe.points(1, 11))
    assert torch.equal(
        point_sampling.sample_points(maps, points), point_sampling.sample_points(maps, points.repeat(3, 1, 1))
    )
    assert point_sampling.sample_points(maps[:0], points).shape == (0, 2, 11)


def test_uncertain_points_are_the_smallest_logits(monkeypatch):
    calls = []

    def points(rows, n, device):
        calls.append((rows, n))
        return torch.from_numpy(recipe.points(rows, n))

    monkeypatch.setattr(point_sampling, 'random_points', points)
    logits = torch.from_numpy(recipe.image(5, 3, 8, 9))
    chosen = point_sampling.uncertain_points(logits, 17, 3.0, 0.75)
    assert calls == [(3, 51), (3, 5)]
    assert chosen.shape == (3, 17, 2)
    candidates = recipe.points(3, 51)
    for row in range(3):
        certainty = [abs(naive_sample(logits[row].numpy(), x, y)) for x, y in candidates[row]]
        best = candidates[row][np.argsort(certainty)[:12]]
        assert {tuple(p) for p in best.tolist()} == {tuple(p) for p in chosen[row, :12].tolist()}
        assert np.array_equal(chosen[row, 12:], recipe.points(3, 5)[row])


def test_all_uncertain_or_none():
    logits = torch.from_numpy(recipe.image(6, 2, 8, 9))
    assert point_sampling.uncertain_points(logits, 10, 2.0, 1.0).shape == (2, 10, 2)
    assert point_sampling.uncertain_points(logits, 10, 2.0, 0.0).shape == (2, 10, 2)


@given(rows=st.integers(1, 4), length=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_smallest_values_are_those_of_topk(rows, length, share, seed):
    values = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))
    n = int(share * length)
    chosen = smallest(values, n)
    assert chosen.shape == (rows, n) and chosen.dtype == torch.int64
    expected = values.topk(n, dim=1, largest=False).values
    assert torch.equal(values.gather(1, chosen).sort(dim=1).values, expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('height, width', [(1, 1), (3, 1), (5, 8)])
def test_features_are_read_as_maps_are(height, width, layout):
    torch.manual_seed(0)
    maps = torch.randn(3, 6, height, width).to(memory_format=layout)
    edges = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.5, 0.0], [0.0, 0.5]])
    points = torch.cat([torch.rand(50, 2), edges])
    expected = point_sampling.sample_points(maps, points[None]).transpose(1, 2)
    for got, wanted in zip(point_sampling.sample_features(maps, points), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
