"""Attention gives the numbers of torch's own, whichever form serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.kernels import cpu_native
from mmseg.kernels.layers import attention
from mmseg.kernels.native import BuildError
from tests.kernels.sanitize import run_sanitized

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def sets():
    names = cpu_native.instruction_sets()
    if not names:
        pytest.skip(f'no native attention: {cpu_native.native()}')
    return range(len(names))


def inputs(dtype=torch.float32, samples=2, heads=2, queries=37, keys=17, width=8, seed=0):
    """As the model makes them: heads are slices of the channels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, keys, keys)
    return [torch.randn(samples, n, heads, width, generator=generator).to(dtype).transpose(1, 2) for n in shapes]


def some(*shape, seed=0):
    """A mask with a true entry in every row."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    mask[..., shape[-1] // 2] = True
    return mask


def assert_equals_torch(query, key, value, mask=None):
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    tolerance = TOLERANCE[query.dtype]
    for number in sets():
        out = cpu_native.attention(query, key, value, mask, number)
        assert out.dtype == query.dtype and out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.integers(1, 80), st.integers(1, 70),
    st.sampled_from([None, 'shared', 'own']), st.integers(0, 99),
)  # fmt: skip
def test_native_attention_is_that_of_torch(dtype, samples, heads, queries, keys, width, masked, seed):
    mask = some(samples, heads if masked == 'own' else 1, queries, keys, seed=seed) if masked else None
    assert_equals_torch(*inputs(dtype, samples, heads, queries, keys, width, seed), mask)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_chunks_of_keys(dtype):
    """More keys than are packed at once; the maximum comes last, and for some queries the first chunks are masked."""
    query, key, value = inputs(dtype, 1, 2, 70, 1300, 32)
    key = key * torch.linspace(0, 3, 1300)[:, None].to(dtype)
    mask = some(1, 1, 70, 1300)
    mask[..., ::2, :1100] = False
    mask[..., 1200] = True
    assert_equals_torch(query, key, value)
    assert_equals_torch(query, key, value, mask)


def test_bfloat16_is_summed_in_float32_and_rounded_once():
    tensors = inputs(torch.bfloat16, keys=600)
    for number, name in enumerate(cpu_native.instruction_sets()):
        if not name.endswith('bf16'):  # there weights are bfloat16, too
            exact = cpu_native.attention(*(x.float() for x in tensors), None, number)
            assert torch.equal(cpu_native.attention(*tensors, None, number), exact.bfloat16())


def test_any_strides():
    query, key, value = (x.contiguous() for x in inputs(queries=9, keys=40))
    mask = some(2, 1, 40, 9).transpose(2, 3)
    mask[..., 5] = True
    assert mask.stride(-1) != 1
    key, value = key[:1].expand(2, -1, -1, -1), value[:, :1].expand(-1, 2, -1, -1)
    assert_equals_torch(query, key, value, mask)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_spoil_their_own_queries(bad):
    for number in sets():
        query, key, value = inputs(samples=1, heads=1)
        query[0, 0, 3, 2] = bad
        out = cpu_native.attention(query, key, value, None, number)
        assert out[0, 0, 3].isnan().all() and out[0, 0, [0, 1, 2, *range(4, 37)]].isfinite().all()
        query, key, value = inputs(samples=1, heads=1)
        value[0, 0, 5, 1] = bad
        out = cpu_native.attention(query, key, value, None, number)
        assert not out[..., 1].isfinite().any() and out[..., [0, *range(2, 8)]].isfinite().all()


def test_large_scores_do_not_overflow():
    query, key, value = inputs()
    for scale in (1e3, 1e6):
        assert_equals_torch(query * scale, key, value)


def test_any_number_of_threads_gives_the_same_bits():
    tensors = inputs(torch.bfloat16, 1, 3, 700, 600, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(cpu_native.attention(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_dropout_drops_weights_and_enlarges_the_others():
    torch.manual_seed(0)
    query, key, _ = inputs(samples=4, heads=3, queries=200, keys=40)
    value = torch.eye(40).expand(4, 3, 40, 40).clone().requires_grad_()
    out = attention(query, key, value, dropout=0.3)  # the weights themselves
    kept = out != 0
    weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(out[kept], weights[kept] / 0.7, rtol=1e-5, atol=1e-7)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / kept.numel()) ** 0.5)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])
    (gradient,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close(gradient, out.sum(dim=2)[..., None].expand_as(value).detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    """Which form was called."""
    made = []
    for owner, name in ((cpu_native, 'attention'), (F, 'scaled_dot_product_attention')):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function, n=name, **k: made.append(n) or f(*a, **k))
    return made


@pytest.mark.skipif(not cpu_native.usable(), reason='no native attention on this machine')
def test_who_serves(calls):
    mask = some(2, 1, 37, 17)
    with torch.no_grad():
        for dtype in TOLERANCE:
            assert attention(*inputs(dtype), mask).dtype == dtype
        with torch.autocast('cpu', torch.bfloat16):
            attention(*inputs(torch.bfloat16))
        assert calls == ['attention'] * 3
        calls.clear()
        for dtype in (torch.float64, torch.float16):
            attention(*inputs(dtype))
        attention(*inputs(), torch.zeros(37, 17))
        attention(*inputs(), mask[0])
        attention(*inputs(), mask, dropout=0.5)
        attention(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs()))
        attention(*inputs(samples=0))
        attention(*(x.to('meta') for x in inputs()))
    attention(*inputs())
    assert calls == ['scaled_dot_product_attention'] * 9


def test_shapes_that_do_not_fit_reach_torch(calls):
    """Whose errors name them; the native form would read memory that is not theirs."""
    query, key, value = inputs()
    wrong = [
        (query, key[..., :4], value), (query, key, value[:, :, :5]), (query, key[:1], value),
        (query[:, :1], key, value),
        (query, key, value, torch.ones(2, 1, 37, 17, dtype=torch.bool, device='meta')), (query[0], key[0], value[0]),
        (query, key.to('meta'), value),
    ]  # fmt: skip
    with torch.no_grad():
        for arguments in wrong:
            assert not cpu_native.serves_attention(*arguments[:3], *(arguments[3:] or (None,)))
        with pytest.raises(RuntimeError):
            attention(*wrong[0])
        with pytest.raises(RuntimeError):
            attention(query, key, value, torch.ones(2, 1, 37, 18, dtype=torch.bool))
    assert calls[0] == 'scaled_dot_product_attention'


def test_without_a_library_torch_serves_and_says_why(calls, monkeypatch):
    monkeypatch.setattr(cpu_native, '_X86', True)
    monkeypatch.setattr(cpu_native, 'native', lambda: BuildError('there is no compiler'))
    cpu_native.usable.cache_clear()
    try:
        with torch.no_grad(), pytest.warns(UserWarning, match='there is no compiler') as warned:
            attention(*inputs())
            attention(*inputs())
        assert len(warned) == 1 and calls == ['scaled_dot_product_attention'] * 2
        with pytest.raises(BuildError, match='no compiler'):
            cpu_native.attention(*inputs())
    finally:
        cpu_native.usable.cache_clear()


def test_a_torch_without_a_parallel_loop_is_named(monkeypatch):
    library = cpu_native.native()
    if isinstance(library, BuildError):
        pytest.skip(str(library))
    monkeypatch.setattr(cpu_native, '_torch_library', object)
    with pytest.raises(BuildError, match='has no torch_parallel_for'):
        cpu_native.load(library._name)


SANITIZED = """
import os
from pathlib import Path
from mmseg.kernels import cpu_native
library = cpu_native.load(Path(os.environ['LIBRARY']))
cpu_native.native = lambda: library
from tests.kernels.test_attention import *
assert len(sets()) > 1
test_any_strides()
test_any_number_of_threads_gives_the_same_bits()
for dtype in TOLERANCE:
    test_chunks_of_keys(dtype)
    for queries, keys, width in ((1, 1, 1), (9, 31, 3), (65, 33, 33), (130, 513, 64), (1100, 40, 32)):
        assert_equals_torch(*inputs(dtype, 2, 2, queries, keys, width), some(2, 1, queries, keys))
print('passed')
"""


@pytest.mark.slow
def test_compilers_and_sanitizers_find_nothing(tmp_path):
    run_sanitized(cpu_native.made_of(), SANITIZED, tmp_path)
