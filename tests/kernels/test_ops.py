"""MSDeformAttn: every backend against the PyTorch form, torch.library contracts, wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused_pytorch, ms_deform_attn_pytorch
from mmseg.models.decode_heads.mask2former.pixel_decoder.ops import ms_deform_attn, ms_deform_attn_fused
from tests.conftest import instruction_sets, need_native
from tests.reference import recipe

LEVELS = [(3, 5), (6, 10), (12, 20)]


def problem(
    shapes=((3, 4), (2, 2)), n=2, queries=5, heads=2, width=8, points=3, dtype=torch.float32, spread=1.5, fused=True
):
    """Random arguments; locations reach `spread` times as far as the map, so many samples are outside or on its rim."""
    pixels, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(n, pixels, heads, width, dtype=dtype)
    if fused:
        reference = torch.rand(n, queries, levels, 2, dtype=dtype)
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=dtype)[:, None]
        offsets = (torch.rand(n, queries, heads, levels, points, 2, dtype=dtype) - 0.5) * spread * sizes
        return value, list(shapes), reference, offsets, torch.randn(n, queries, heads, levels * points, dtype=dtype)
    locations = 0.5 + (torch.rand(n, queries, heads, levels, points, 2, dtype=dtype) - 0.5) * spread
    return value, list(shapes), locations, torch.rand(n, queries, heads, levels, points, dtype=dtype)


def forms(fused: bool):
    return (ms_deform_attn_fused, ms_deform_attn_fused_pytorch) if fused else (ms_deform_attn, ms_deform_attn_pytorch)


def bare(value, shapes, *others):
    """Arguments of ``torch.ops.themask.ms_deform_attn``, whose reference points are None in the plain form."""
    return (value, shapes, None, *others) if len(others) == 2 else (value, shapes, *others)


def with_gradients(function, arguments, grad_out=None):
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    out = function(*leaves)
    out.backward(torch.ones_like(out) if grad_out is None else grad_out)
    return out.detach(), [leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_equals_pytorch_form(arguments, fused, tolerance=1e-4):
    ours, form = forms(fused)
    expected = form(*arguments)
    grad_out = torch.randn(expected.shape, dtype=expected.dtype)
    expected, expected_grads = with_gradients(form, arguments, grad_out)
    out, grads = with_gradients(ours, arguments, grad_out)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    for grad, wanted in zip(grads, expected_grads):
        if wanted.numel() == 0:
            continue
        # Where a sample sits on a pixel border, rounding decides between two one-sided derivatives.
        difference = (grad - wanted).abs() / (1 + wanted.abs().max())
        assert torch.quantile(difference.float().flatten(), 0.98) < tolerance


def test_core_equals_the_reference(backend, reference):
    rng = np.random.default_rng(21)
    pixels = sum(h * w for h, w in LEVELS)
    value = torch.from_numpy(rng.standard_normal((2, pixels, 8, 32))).float()
    locations = torch.from_numpy(rng.uniform(-0.3, 1.3, (2, 50, 8, 3, 4, 2))).float()
    weights = rng.random((2, 50, 8, 12))
    weights = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float().view(2, 50, 8, 3, 4)
    out = ms_deform_attn(value, torch.tensor(LEVELS), locations, weights)
    difference, _ = recipe.check(reference('msdeform.npz'), 'core', out.numpy())
    assert difference < (1e-6 if backend == 'pytorch' else 2e-6)


SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(
    shapes=st.lists(SIZES, min_size=1, max_size=5),
    n=st.integers(1, 3),
    queries=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 8, 24, 32, 40, 64]),
    points=st.integers(1, 5),
    fused=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes_equal_the_pytorch_form(shapes, n, queries, heads, width, points, fused, seed):
    torch.manual_seed(seed)
    arguments = problem(shapes, n, queries, heads, width, points, fused=fused)
    for _ in instruction_sets():
        assert_equals_pytorch_form(arguments, fused)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize(
    'case',
    [
        {'width': 1},
        {'width': 8},
        {'width': 24},
        {'width': 32},
        {'width': 64},
        {'shapes': ((1, 1),)},
        {'shapes': ((1, 7), (7, 1), (1, 1))},
        {'shapes': ((1, 1), (2, 1), (3, 4), (5, 5), (6, 7))},
        {'points': 1},
        {'queries': 0},
        {'n': 0},
        {'points': 11, 'width': 33, 'heads': 3},
    ],
    ids=str,
)
def test_edge_cases(backend, case, fused):
    assert_equals_pytorch_form(problem(**case, fused=fused), fused)


@pytest.mark.parametrize('fused', [False, True])
def test_gradients_are_exact_in_float64(backend, fused):
    arguments = problem(width=3, queries=3, n=1, dtype=torch.float64, fused=fused)
    value, shapes, *others = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]

    def function(value, *others):
        return forms(fused)[0](value, shapes, *others)

    assert torch.autograd.gradcheck(function, (value, *others))


def test_gradients_of_shared_reference_points(backend):
    value, shapes, reference, offsets, logits = problem(dtype=torch.float64)
    reference = reference[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda points: ms_deform_attn_fused(value, shapes, points, offsets, logits), (reference,)
    )


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 1e30, -1e9, 3e4])
@pytest.mark.parametrize('fused', [False, True])
def test_unusable_locations_are_outside(backend, bad, fused):
    """Any coordinate that is not a number or far away silences its sample, and only its sample."""
    value, shapes, *others = problem(fused=fused, spread=0.5)
    points = others[-2]
    for axis in (0, 1):
        broken, outside = points.clone(), points.clone()
        broken[:, :, :, :, 0, axis] = bad
        outside[:, :, :, :, 0, axis] = 50.0
        out, grads = with_gradients(forms(fused)[0], (value, shapes, *others[:-2], broken, others[-1]))
        expected, wanted = with_gradients(forms(fused)[0], (value, shapes, *others[:-2], outside, others[-1]))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, wanted)
        assert all(grad.isfinite().all() for grad in grads)


def test_corners_outside_the_map_do_not_read_it(backend):
    """Rows beside the map in memory (the next level's, or the row's other end) may hold anything."""
    value, shapes, locations, weights = problem(shapes=((2, 3), (2, 2)), n=1, fused=False)
    value[:, 6:] = float('inf')
    value[:, 2] = float('inf')  # right end of the first row
    locations[..., 0, :, :] = torch.tensor([-0.1, 0.25])  # left of the first column
    locations[..., 1, :, :] = -4.0
    assert ms_deform_attn(value, shapes, locations, weights).isfinite().all()


def test_strided_inputs(backend):
    value, shapes, reference, offsets, logits = problem()
    expected = with_gradients(ms_deform_attn_fused, (value, shapes, reference, offsets, logits))

    def strided(tensor):
        spread_out = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float('nan'))
        spread_out[..., ::2] = tensor
        return spread_out[..., ::2]

    arguments = [a if isinstance(a, list) else strided(a) for a in (value, shapes, reference, offsets, logits)]
    assert not arguments[0].is_contiguous()
    torch.testing.assert_close(with_gradients(ms_deform_attn_fused, arguments), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('fused', [False, True])
def test_half_precision_is_computed_in_float32(backend, dtype, fused):
    arguments = problem(dtype=torch.float32, width=32, fused=fused)
    assert_sums_in_float32([a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments], fused)


def assert_sums_in_float32(half, fused):
    """A call with half precision arguments gives what one with the same values in float32 gives, rounded."""
    dtype = half[0].dtype
    exact = [a.float() if isinstance(a, torch.Tensor) else a for a in half]
    out, grads = with_gradients(forms(fused)[0], half)
    expected, wanted = with_gradients(forms(fused)[0], exact)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), rtol=0.01, atol=0.01)
    for grad, exact_grad in zip(grads, wanted):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.float(), exact_grad, rtol=0.02, atol=0.02 * float(exact_grad.abs().max()))


MIXES = [  # of value, points, weights
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
]


def assert_is_the_float32_call_rounded(arguments, fused, types):
    """Bit for bit, also the gradients: the same sums, whatever type the numbers are read from."""
    value, shapes, *others = arguments
    low = [value.to(types[0]), shapes, *others[:-2], others[-2].to(types[1]), others[-1].to(types[2])]
    exact = [a.float() if isinstance(a, torch.Tensor) else a for a in low]
    grad_out = torch.randn(others[-2].shape[0], others[-2].shape[1], value.shape[2] * value.shape[3]).to(types[0])
    out, grads = with_gradients(forms(fused)[0], low, grad_out)
    expected, wanted = with_gradients(forms(fused)[0], exact, grad_out.float())
    # The gradient of reference points is a sum of rounded ones.
    results, wanted = [out, grads[0], *grads[-2:]], [expected, wanted[0], *wanted[-2:]]
    for result, rounded, dtype in zip(results, wanted, (types[0], *types)):
        assert result.dtype == dtype
        torch.testing.assert_close(result, rounded.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('types', MIXES, ids=str)
def test_bfloat16_is_the_float32_call_rounded(backend, types, fused):
    for case in ({'width': 1}, {'width': 24}, {'width': 32}, {'width': 33}, {'points': 11, 'n': 1}, {'points': 1}):
        assert_is_the_float32_call_rounded(problem(**case, fused=fused), fused, types)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('types', MIXES[:2], ids=str)
def test_bfloat16_pixels_that_are_no_numbers(backend, types, fused):
    value, *others = problem(shapes=((6, 7), (3, 4)), queries=20, width=33, fused=fused)
    for pixel, bad in ((3, float('nan')), (20, float('inf')), (44, -float('inf'))):
        value[:, pixel] = bad
    out = forms(fused)[0](value.to(types[0]), *others)
    assert out.isnan().any() and out.isinf().any() and out.isfinite().any()
    assert_is_the_float32_call_rounded((value, *others), fused, types)


def test_bfloat16_results_are_rounded_to_nearest_even(backend):
    """Any two numbers, and sums just between two numbers: two maps of a pixel each, whose samples are added."""
    value = torch.randint(-(2**15), 2**15, (1, 2, 1, 4096), dtype=torch.int16).view(torch.bfloat16)
    value[..., :4] = torch.tensor([[1, 1 + 2**-7, -1, -1 - 2**-7], [2**-8, 2**-8, -(2**-8), -(2**-8)]])[:, None]
    value[..., 4:6] = torch.finfo(torch.bfloat16).max
    value[:, 1, :, 5] = 2.0**119
    arguments = value, [(1, 1), (1, 1)], torch.full((1, 1, 1, 2, 1, 2), 0.5), torch.ones(1, 1, 1, 2, 1)
    out = ms_deform_attn(*arguments)[0, 0]
    assert out[:6].tolist() == [1, 1 + 2**-6, -1, -1 - 2**-6, float('inf'), float('inf')]
    torch.testing.assert_close(out, value[0].float().sum(0)[0].bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('bits', [0x7FFFFFFF, 0x7F800001, -1])
def test_any_nan_stays_nan_in_bfloat16(backend, bits):
    """Rounding the bits of these would give zero or infinity."""
    value, shapes, locations, weights = problem(width=33, spread=0.5, fused=False)
    weights.view(torch.int32)[:] = bits
    assert ms_deform_attn(value.bfloat16(), shapes, locations, weights).isnan().all()


def test_half_precision_value_with_float32_points(backend):
    value, shapes, *others = problem(width=32)
    out, grads = with_gradients(ms_deform_attn_fused, (value.bfloat16(), shapes, *others))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.parametrize('fused', [False, True])
def test_autocast_computes_in_float32(backend, fused):
    arguments = problem(fused=fused)
    half = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in arguments]
    with torch.autocast('cpu', torch.bfloat16):
        out, grads = with_gradients(forms(fused)[0], half)
    assert out.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads)


def test_backward_is_the_same_for_any_number_of_threads(backend):
    if backend == 'pytorch':
        pytest.skip('a property of the native op')
    arguments = problem(shapes=((8, 9), (4, 5)), n=2, queries=300, heads=3, width=32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(with_gradients(ms_deform_attn_fused, arguments))
    finally:
        torch.set_num_threads(threads)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1]))


@pytest.mark.parametrize('fused', [False, True])
def test_opcheck(fused):
    need_native()
    value, shapes, *others = problem(queries=3, n=1, fused=fused)
    flat = [size for shape in shapes for size in shape]
    ops = torch.ops.themask
    leaves = [a.requires_grad_() for a in (value, *others)]
    torch.library.opcheck(ops.ms_deform_attn, bare(leaves[0], flat, *leaves[1:]))
    inputs = [a.detach() for a in leaves]
    grad_out = torch.randn(1, 3, 16)
    torch.library.opcheck(ops.ms_deform_attn_backward, (grad_out, *bare(inputs[0], flat, *inputs[1:]), False))


def test_no_second_derivative_is_an_error():
    need_native()
    value, shapes, *others = problem()
    value.requires_grad_()
    out = ms_deform_attn_fused(value, shapes, *others)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match='THEMASK_OPS_BACKEND=pytorch'):
        grad.square().sum().backward()


@pytest.mark.parametrize('fused', [False, True])
def test_compiles_into_one_graph(backend, fused):
    arguments = problem(fused=fused)
    value, shapes, *others = arguments
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda value, *others: forms(fused)[0](value, shapes, *others).sin(), fullgraph=True, backend='aot_eager'
    )
    expected = with_gradients(lambda value, *others: forms(fused)[0](value, shapes, *others).sin(), (value, *others))
    torch.testing.assert_close(with_gradients(compiled, (value, *others)), expected)


def test_compiles_once_for_any_size():
    need_native()
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(image, reference, offsets, logits):
        n, heads, width, h, w = image.shape
        value = image.permute(0, 3, 4, 1, 2).reshape(n, h * w, heads, width)
        return ms_deform_attn_fused(value, [(h, w)], reference, offsets, logits)

    for h, w in ((11, 13), (7, 17), (6, 19)):  # unlike the other sizes, which tracing would take for the same
        value, _, *others = problem(shapes=((h, w),))
        function(value.view(2, h, w, 2, 8).permute(0, 3, 4, 1, 2), *others)
    assert counter.frame_count == 1


@pytest.mark.parametrize('fused', [False, True])
def test_exports(backend, fused):
    value, shapes, *others = problem(fused=fused)

    class Model(torch.nn.Module):
        def forward(self, value, *others):
            return forms(fused)[0](value, shapes, *others)

    program = torch.export.export(Model(), (value, *others))
    torch.testing.assert_close(program.module()(value, *others), forms(fused)[0](value, shapes, *others))


@pytest.mark.parametrize('fused', [False, True])
def test_flops_are_counted(fused):
    need_native()
    arguments = problem(n=2, queries=5, heads=2, width=8, points=3, fused=fused)
    value = arguments[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = forms(fused)[0](value, *arguments[1:])
        samples = 2 * 5 * 2 * 2 * 3
        assert counter.get_total_flops() == samples * 8 * 8
        out.sum().backward()
        assert counter.get_total_flops() == 3 * samples * 8 * 8


WRONG = {
    'value': [
        (0, lambda t: t[0], ValueError),
        (0, lambda t: t[:, :-1], ValueError),
        (0, lambda t: t.long(), TypeError),
        (0, lambda t: t[..., :0], ValueError),
    ],
    'spatial_shapes': [
        (1, lambda t: [(3, 4)], ValueError),
        (1, lambda t: [3, 4], ValueError),
        (1, lambda t: [], ValueError),
        (1, lambda t: [(0, 4), (4, 4)], ValueError),
        (1, lambda t: torch.rand(2, 2), ValueError),
        (1, lambda t: torch.tensor([[3, 4, 2, 2]]), ValueError),
    ],
    'reference_points': [(2, lambda t: t[:, :-1], ValueError), (2, lambda t: t.to('meta'), ValueError)],
    'sampling_offsets': [
        (3, lambda t: t[..., 0], ValueError),
        (3, lambda t: t[:, :, :1], ValueError),
        (3, lambda t: t.int(), TypeError),
        (3, lambda t: t.to('meta'), ValueError),
        (3, lambda t: t[:, :, :, :, :0], ValueError),
    ],
    'attention_logits': [(4, lambda t: t[..., :-1], ValueError), (4, lambda t: t.view(2, 5, 2, 2, 3), ValueError)],
}


@pytest.mark.parametrize(
    ('name', 'index', 'spoil', 'error'),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_wrong_arguments_are_named(backend, name, index, spoil, error):
    arguments = list(problem())
    arguments[index] = spoil(arguments[index])
    with pytest.raises(error, match=name):
        ms_deform_attn_fused(*arguments)


@pytest.mark.parametrize('index', [0, 2])
def test_wrong_arguments_of_the_plain_form_are_named(backend, index):
    arguments = list(problem(fused=False))
    arguments[index + 1 if index == 2 else index] = arguments[index + 1 if index == 2 else index][:, :-1]
    with pytest.raises(ValueError, match='attention_weights' if index == 2 else 'value'):
        ms_deform_attn(*arguments)


@pytest.mark.parametrize(
    ('name', 'index', 'spoil'),
    [
        ('value', 0, lambda t: t[0]),
        ('value', 0, lambda t: t[:, :-1]),
        ('value', 0, lambda t: t.long()),
        ('spatial_shapes', 1, lambda t: [3, 4, 2]),
        ('spatial_shapes', 1, lambda t: [-3, -4, 2, 2]),
        ('reference_points', 2, lambda t: t[:, :-1]),
        ('sampling_offsets', 3, lambda t: t[..., 0]),
        ('sampling_offsets', 3, lambda t: t[:, :, :1]),
        ('attention_logits', 4, lambda t: t[..., :-1]),
    ],
)
def test_the_bare_op_checks_too(name, index, spoil):
    """Exported programs call the op without our Python checks; wrong memory must not be touched."""
    need_native()
    value, _, *others = problem()
    arguments = [value, [3, 4, 2, 2], *others]
    arguments[index] = spoil(arguments[index])
    with pytest.raises(RuntimeError, match=name):
        torch.ops.themask.ms_deform_attn(*arguments)
    with pytest.raises(RuntimeError, match=name):
        torch.ops.themask.ms_deform_attn_backward(torch.zeros(2, 5, 16), *arguments, False)


WRAPPING = {
    'product': [2**32, 2**32, 3, 4, 2, 2],
    'product of both levels': [2**32, 2**32, 2**32, 2**32, 3, 4, 2, 2],
    'product below zero': [2**62, 2, 2**62, 2, 3, 4, 2, 2],
    'sum': [2**62, 1, 2**62, 1, 2**62, 1, 2**62, 1, 16, 1],
    'largest': [2**63 - 1, 2**63 - 1, 3, 5],
    'two below zero': [-(2**32), -(2**32), 4, 4],
    'beside the smallest': [-(2**63), -1, 4, 4],
}


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('sizes', WRAPPING.values(), ids=WRAPPING)
def test_the_bare_op_checks_sizes_whose_products_or_sums_wrap(sizes, fused):
    """Taken for 16 pixels they would read and write far outside of value."""
    need_native()
    value, _, *others = problem(fused=fused, shapes=((1, 1),) * (len(sizes) // 2))
    value = value.new_zeros(2, 16, *value.shape[2:])
    arguments = bare(value, sizes, *others)
    with pytest.raises(RuntimeError, match='spatial_shapes'):
        torch.ops.themask.ms_deform_attn(*arguments)
    with pytest.raises(RuntimeError, match='spatial_shapes'):
        torch.ops.themask.ms_deform_attn_backward(torch.zeros(2, 5, 16), *arguments, False)
