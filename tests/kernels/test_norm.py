"""LayerNorm beside a residual sum gives torch's numbers, whichever form serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmseg.kernels import cpu_native
from mmseg.kernels.norm import post_norm, post_norm_and_cast, pre_norm
from mmseg.models.backbones.mit import MixTransformer
from mmseg.models.decode_heads.pixel_decoder import MSDeformAttnEncoder
from tests.kernels.sanitize import run_sanitized

needs_native = pytest.mark.skipif(not cpu_native.instruction_sets(), reason='no native library')
TYPES = [  # of x and of its branch
    (torch.float32, None),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16),
]


def inputs(rows=5, channels=32, branch=None, seed=0, dtype=torch.float32):
    """``x`` of a type, the branch, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, rows, channels, generator=generator)
    weight, bias = torch.randn(2, channels, generator=generator)
    return x.to(dtype), None if branch is None else other.to(branch), weight, bias


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(TYPES), st.integers(0, 99))
def test_native_norm_is_that_of_torch(rows, channels, types, seed):
    x, other, weight, bias = inputs(rows, channels, types[1], seed, types[0])
    total = x if other is None else x + other
    assert total.dtype == x.dtype
    expected = F.layer_norm(total.double(), (channels,), weight.double(), bias.double(), 1e-5)
    rounding = 2**-8 if x.dtype == torch.bfloat16 else 1e-4
    for number in range(len(cpu_native.instruction_sets())):
        own, out, low = cpu_native.norm(x, other, weight, bias, 1e-5, (other is not None, True, True), number)
        assert own is None if other is None else torch.equal(own, total)
        assert out.dtype == x.dtype and low.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-4)
        assert torch.equal(low, out.bfloat16())


@needs_native
def test_only_what_is_wanted_is_made():
    x, other, weight, bias = inputs(branch=torch.bfloat16)
    whole = cpu_native.norm(x, other, weight, bias, 1e-5, (True, True, True))
    for keep in ((True, False, True), (True, False, False), (False, True, True), (False, True, False)):
        for result, wanted, kept in zip(cpu_native.norm(x, other, weight, bias, 1e-5, keep), whole, keep):
            assert torch.equal(result, wanted) if kept else result is None


@needs_native
def test_rows_that_differ_little_far_from_zero():
    """The variance is that of what is left without the mean: nothing is lost."""
    x, _, weight, bias = inputs(rows=50, channels=64)
    x = x + 1000
    x[7] = 3.0  # no variance at all
    expected = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-5)
    for number in range(len(cpu_native.instruction_sets())):
        _, out, _ = cpu_native.norm(x, None, weight, bias, 1e-5, (False, True, False), number)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(out[7], bias)


@needs_native
def test_one_row_does_not_reach_another():
    """Also across threads, and NaN stays in its row."""
    x, other, weight, bias = inputs(rows=3000, channels=64, branch=torch.float32)
    x[1234, 5] = float('nan')
    whole, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu_native.norm(x, other, weight, bias, 1e-5, (False, True, False))[1])
    finally:
        torch.set_num_threads(whole)
    alone = cpu_native.norm(x[77:78], other[77:78], weight, bias, 1e-5, (False, True, False))[1]
    assert torch.equal(results[0][77:78], alone)
    assert results[0].isnan().any(dim=1).nonzero().tolist() == [[1234]]
    for result in results:
        assert torch.equal(result.nan_to_num(), results[0].nan_to_num())


@pytest.fixture
def natively(monkeypatch):
    """The calls that went to the native form."""
    calls = []
    norm = cpu_native.norm
    monkeypatch.setattr(cpu_native, 'norm', lambda *args: calls.append(args) or norm(*args))
    return calls


def layer(channels=32):
    norm = nn.LayerNorm(channels, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.skipif(not cpu_native.usable(), reason='no native norm on this machine')
@pytest.mark.parametrize(('dtype', 'branch'), TYPES)
@pytest.mark.parametrize('autocast', [False, True])
def test_both_orders_equal_torch(natively, dtype, branch, autocast):
    norm, (x, other, *_) = layer(), inputs(branch=branch, dtype=dtype)
    added = x if other is None else other
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        total, normed = pre_norm(norm, x, other)
        y, tokens = post_norm_and_cast(norm, x, added)
        assert torch.equal(post_norm(norm, x, added), y)
        cast = autocast and dtype == torch.float32
        assert [keep for *_, keep in natively][1:] == [(False, True, cast), (False, True, False)]
        wanted = x if other is None else x + other
        assert torch.equal(total, wanted) and total.dtype == dtype
        close = dict(rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        torch.testing.assert_close(y, norm(x + added), **close)
        assert torch.equal(tokens, y.bfloat16() if autocast else y)
        if autocast:
            close = dict(rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(normed, norm(wanted).to(torch.bfloat16 if autocast else dtype), **close)


@pytest.mark.skipif(not cpu_native.usable(), reason='no native norm on this machine')
@pytest.mark.parametrize('autocast', [False, True])
def test_all_norms_of_backbone_and_encoder_are_native(natively, autocast):
    """Also in bfloat16, where the residual stream itself is in bfloat16."""
    backbone = MixTransformer((32, 32, 32, 32), (2, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    encoder = MSDeformAttnEncoder(32, num_levels=3, num_layers=2, hidden=64, num_heads=4, dropout=0.0).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        maps = backbone(torch.randn(1, 3, 64, 64))
        assert len(natively) == 2 * 5 + 4 + (2 + 1 + 1) + 4  # in blocks; of patches, reduced keys and stages
        natively.clear()
        maps = encoder(maps[:0:-1])
        assert len(natively) == 2 * 2
    assert {x.dtype for x in maps} == {torch.bfloat16 if autocast else torch.float32}


def test_elsewhere_it_is_torch(natively):
    """With gradients, for other types and layouts, on other devices, and for norms without weights."""
    norm, (x, other, *_) = layer(), inputs(branch=torch.float32)
    for total, y in (pre_norm(norm, x, other), reversed(post_norm_and_cast(norm, x, other))):
        assert torch.equal(y, norm(x + other)) and y.requires_grad
        assert torch.equal(total, x + other) or torch.equal(total, y)
    assert pre_norm(norm, x)[0] is x
    with torch.no_grad():
        assert torch.equal(post_norm(wide := layer().double(), x.double(), other.double()), wide(x.double() + other))
        assert torch.equal(post_norm(norm, x.bfloat16(), other), norm(x.bfloat16() + other))
        low = layer().bfloat16()
        assert torch.equal(pre_norm(low, x.bfloat16())[1], low(x.bfloat16()))
        turned = torch.randn(32, 5).T
        assert torch.equal(pre_norm(norm, turned)[1], norm(turned))
        assert torch.equal(pre_norm(norm, x, other[:1])[0], x + other[:1])
        plain = nn.LayerNorm(32, elementwise_affine=False)
        assert torch.equal(post_norm(plain, x, other), plain(x + other))
        assert pre_norm(layer().to('meta'), x.to('meta'), other.to('meta'))[1].shape == x.shape
        assert post_norm(norm, x[:0], other[:0]).shape == (0, 32)
        with torch.autocast('cpu', torch.float16):
            assert torch.equal(post_norm_and_cast(norm, x, other)[1], norm(x + other))
    assert not natively


SANITIZED = """
import os
from pathlib import Path
import torch
from mmseg.kernels import cpu_native
library = cpu_native.load(Path(os.environ['LIBRARY']))
cpu_native.native = lambda: library
for number in range(len(cpu_native.instruction_sets())):
    for rows, channels in ((1, 1), (3, 17), (700, 48)):
        whole, weight, bias = torch.randn(rows, channels), torch.randn(channels), torch.randn(channels)
        low = whole.bfloat16()
        for x, other in ((whole, None), (whole, whole), (whole, low), (low, None), (low, low)):
            for keep in ((other is not None, True, True), (False, True, False), (other is not None, False, True)):
                if other is None or keep[0] or keep[1]:
                    cpu_native.norm(x, other, weight, bias, 1e-5, keep, number)
print('passed')
"""


@pytest.mark.slow
def test_no_access_outside_of_tensors(tmp_path):
    run_sanitized(cpu_native.made_of(), SANITIZED, tmp_path)
