"""Attention gives the numbers of torch's own, whichever form serves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mmseg.kernels import library
from mmseg.kernels.layers import attention
from mmseg.kernels.torch_ops import native_attention
from tests.conftest import instruction_sets, need_native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def native(query, key, value, mask=None):
    """The native op, also with the portable code."""
    mask = mask if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.themask.attention(query, key, value, mask)


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
    for _ in instruction_sets():
        out = native(query, key, value, mask)
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
    for _ in instruction_sets():
        assert torch.equal(native(*tensors), native(*(x.float() for x in tensors)).bfloat16())


def test_any_strides():
    query, key, value = (x.contiguous() for x in inputs(queries=9, keys=40))
    mask = some(2, 1, 40, 9).transpose(2, 3)
    mask[..., 5] = True
    assert mask.stride(-1) != 1
    key, value = key[:1].expand(2, -1, -1, -1), value[:, :1].expand(-1, 2, -1, -1)
    assert_equals_torch(query, key, value, mask)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_spoil_their_own_queries(bad):
    for _ in instruction_sets():
        query, key, value = inputs(samples=1, heads=1)
        query[0, 0, 3, 2] = bad
        out = native(query, key, value)
        assert out[0, 0, 3].isnan().all() and out[0, 0, [0, 1, 2, *range(4, 37)]].isfinite().all()
        query, key, value = inputs(samples=1, heads=1)
        value[0, 0, 5, 1] = bad
        out = native(query, key, value)
        assert not out[..., 1].isfinite().any() and out[..., [0, *range(2, 8)]].isfinite().all()


def test_large_scores_do_not_overflow():
    query, key, value = inputs()
    for scale in (1e3, 1e6):
        assert_equals_torch(query * scale, key, value)


def test_any_number_of_threads_gives_the_same_bits():
    need_native()
    tensors = inputs(torch.bfloat16, 1, 3, 700, 600, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native(*tensors))
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
    """The calls of torch's own form."""
    made = []
    function = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, **k: made.append(a) or function(*a, **k))
    return made


def test_which_form_is_used(calls, monkeypatch):
    if library.instruction_sets()[:1] in ([], ['portable']):
        pytest.skip('no native attention on this machine')
    mask = some(2, 1, 37, 17)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    with torch.no_grad():
        for dtype in TOLERANCE:
            assert attention(*inputs(dtype), mask).dtype == dtype
        with torch.autocast('cpu', torch.bfloat16):
            attention(*inputs(torch.bfloat16))
        attention(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs()))
        assert not calls
        for dtype in (torch.float64, torch.float16):
            attention(*inputs(dtype))
        attention(*inputs(), torch.zeros(37, 17))
        attention(*inputs(), mask[0])
        attention(*inputs(), mask, dropout=0.5)
        attention(*inputs(samples=0))
        attention(*(x.to('meta') for x in inputs()))
        for _ in instruction_sets('portable'):
            attention(*inputs())
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)
        attention(*inputs(torch.bfloat16))
        assert native_attention(*inputs()) is not None and native_attention(*inputs(torch.bfloat16), mask) is not None
    attention(*inputs())
    assert len(calls) == 10


@torch.no_grad()
def test_shapes_that_do_not_fit_reach_torch(calls):
    """Its errors name them."""
    query, key, value = inputs()
    wrong = [
        (query, key[..., :4], value), (query, key, value[:, :, :5]), (query, key[:1], value),
        (query[:, :1], key, value),
        (query, key, value, torch.ones(2, 1, 37, 17, dtype=torch.bool, device='meta')), (query[0], key[0], value[0]),
        (query, key.to('meta'), value),
    ]  # fmt: skip
    assert all(native_attention(*arguments) is None for arguments in wrong)
    with pytest.raises(RuntimeError):
        attention(*wrong[0])
    assert calls
    with pytest.raises(RuntimeError):
        attention(query, key, value, torch.ones(2, 1, 37, 18, dtype=torch.bool))


def test_the_bare_op_checks_too():
    need_native()
    query, key, value = inputs()
    torch.library.opcheck(torch.ops.themask.attention, (query, key, value, some(2, 2, 37, 17)))
    mask = torch.ones(2, 2, 37, 17)
    for message, *arguments in (
        ('tokens', query[0], key, value), ('key', query, key[..., :4], value), ('value', query, key, value[:, :, :5]),
        ('float32', query, key, value.double()), ('float32', query.half(), key.half(), value.half()),
        ('mask', query, key, value, mask.bool()[:, :1]), ('mask', query, key, value, mask),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f'attention: .*{message}'):
            torch.ops.themask.attention(*arguments, *([None] if len(arguments) == 3 else []))


def test_the_flop_counter_sees_it():
    need_native()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        native(*inputs())
    assert counter.get_total_flops() == 2 * 2 * (2 * 2 * 37 * 17 * 8)


def test_without_a_library_torch_is_used_and_says_why(calls, fresh_library, monkeypatch):
    monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    with torch.no_grad(), pytest.warns(UserWarning, match='attention .* no C.. compiler') as warned:
        attention(*inputs())
        attention(*inputs())
    assert len(warned) == 1 and warned[0].filename == __file__ and len(calls) == 2


LITTLE_MEMORY = """
import resource, torch
from tests.kernels.test_attention import inputs, native, need_native
need_native()
query, key, value = inputs(samples=1, heads=1, width=200_000)
native(*(x[..., :8] for x in (query, key, value)))
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
try: native(query, key, value)
except MemoryError: print('no memory')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='limits memory')
def test_no_memory_is_a_memory_error():
    need_native()
    done = subprocess.run([sys.executable, '-c', LITTLE_MEMORY], capture_output=True, text=True)
    assert done.stdout == 'no memory\n', done.stderr
