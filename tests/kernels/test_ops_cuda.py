"""The GPU kernels: compiled for every target, and their logic run on the CPU by an emulator of the CUDA language."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.kernels import library
from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused_pytorch, ms_deform_attn_pytorch
from tests.kernels.test_ops import problem, with_gradients

EMULATOR = Path(__file__).parent / 'gpu_emulator'


@pytest.fixture(scope='module')
def emulator(tmp_path_factory):
    compiler = library.find_compiler('cpu')
    if compiler is None or 'g++' not in Path(compiler[0]).name:
        pytest.skip('the emulator needs g++')
    path = tmp_path_factory.mktemp('emulator') / 'emulated.so'
    flags = ['-std=c++17', '-O1', '-fPIC', '-shared', '-Wno-unknown-pragmas', '-I', str(library.SOURCES)]
    subprocess.run([*compiler, *flags, str(EMULATOR / 'emulated_ops.cpp'), '-o', str(path)], check=True)
    return ctypes.CDLL(str(path))


def emulate(emulator, arguments, grad_out=None, deterministic=False):
    """Runs a kernel; returns the output, or the gradients of value, points and weights."""
    value, shapes, *others = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
    reference = others[0] if len(others) == 3 else None
    points, weights = others[-2:]
    n, pixels, heads, width = value.shape
    _, queries, _, levels, samples, _ = points.shape
    reference_n = n if reference is None else reference.shape[0]
    sizes = [n, pixels, heads, width, queries, levels, samples, reference_n, *np.array(shapes).ravel().tolist()]
    out = torch.full((n, queries, heads * width), float('nan'), dtype=value.dtype)
    grads = torch.zeros(value.shape, dtype=points.dtype), torch.full_like(points, torch.nan), weights * torch.nan
    function = getattr(emulator, 'emulate_' + str(value.dtype).removeprefix('torch.'))

    def pointer(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    function(
        (ctypes.c_int64 * len(sizes))(*sizes),
        *map(pointer, (value, points, weights, reference, grad_out)),
        ctypes.c_bool(deterministic),
        *map(pointer, (out, *grads)),
    )
    return out if grad_out is None else grads


CASES = [
    {'width': 32},
    {'width': 8},
    {'width': 1},
    {'width': 24, 'heads': 3},
    {'width': 33},
    {'width': 64, 'queries': 3},
    {'width': 160, 'queries': 2},
    {'shapes': ((1, 1), (2, 1), (3, 4), (5, 5), (6, 7)), 'width': 8},
    {'points': 1, 'width': 8},
    {'shapes': ((3, 4),), 'points': 500, 'width': 8, 'queries': 2, 'n': 1},
    {'n': 3, 'queries': 29, 'width': 16},
]


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_emulated_kernels_equal_the_pytorch_form(emulator, case, fused):
    arguments = problem(**case, dtype=torch.float64, fused=fused)
    form = ms_deform_attn_fused_pytorch if fused else ms_deform_attn_pytorch
    expected = form(*arguments)
    grad_out = torch.randn_like(expected)
    _, wanted = with_gradients(form, arguments, grad_out)
    torch.testing.assert_close(emulate(emulator, arguments), expected)
    wanted = [wanted[0], *wanted[-2:]]
    for grad, exact in zip(emulate(emulator, arguments, grad_out), wanted):
        torch.testing.assert_close(grad, exact)
    for grad, exact in zip(emulate(emulator, arguments, grad_out, deterministic=True), wanted):
        torch.testing.assert_close(grad, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
def test_emulated_kernels_in_every_precision(emulator, dtype, tolerance):
    value, shapes, *others = problem(width=32)
    arguments = value.to(dtype), shapes, *others
    out = emulate(emulator, arguments)
    expected = ms_deform_attn_fused_pytorch(*arguments)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    grad_out = torch.randn(expected.shape).to(dtype)
    _, wanted = with_gradients(ms_deform_attn_fused_pytorch, (arguments[0].float(), *arguments[1:]), grad_out.float())
    for grad, exact in zip(emulate(emulator, arguments, grad_out), (wanted[0], *wanted[-2:])):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, exact, atol=1e-4, rtol=1e-3)


def test_emulated_kernels_share_reference_points_and_ignore_unusable_locations(emulator):
    value, shapes, reference, offsets, logits = problem(dtype=torch.float64)
    offsets[:, :, 0, :, 0, 0] = torch.nan
    offsets[:, :, 1, :, 1, 1] = torch.inf
    offsets[:, :, 1, :, 0, 1] = -1e30
    arguments = value, shapes, reference[:1].contiguous(), offsets, logits
    expected = ms_deform_attn_fused_pytorch(*arguments)
    torch.testing.assert_close(emulate(emulator, arguments), expected)
    grad_out = torch.randn_like(expected)
    _, wanted = with_gradients(ms_deform_attn_fused_pytorch, arguments, grad_out)
    for grad, exact in zip(emulate(emulator, arguments, grad_out), (wanted[0], *wanted[-2:])):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize(('value', 'finite'), [(0.0, True), (1e-30, True), (1e30, True), (float('inf'), False)])
def test_deterministic_sums_cover_any_scale(emulator, value, finite):
    arguments = problem(width=4, fused=False)
    grad_out = torch.randn(2, 5, 8)
    expected = emulate(emulator, arguments, grad_out)[0] * value
    if not finite:
        grad_out[0, 0, 0] = value
        assert emulate(emulator, arguments, grad_out, deterministic=True)[0].isnan().all()
        return
    grad = emulate(emulator, arguments, grad_out * value, deterministic=True)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * value)


@pytest.mark.slow
def test_compiles_for_every_target(tmp_path, monkeypatch):
    """Needs nvcc, no GPU and no CUDA torch."""
    nvcc = library.find_compiler('cuda')
    if nvcc is None:
        pytest.skip('no nvcc here')
    monkeypatch.setenv('THEMASK_OPS_CACHE', str(tmp_path))
    monkeypatch.delenv('TORCH_CUDA_ARCH_LIST', raising=False)
    path = library.library('cuda')
    dump = shutil.which('cuobjdump') or str(Path(nvcc[0]).with_name('cuobjdump'))
    if not Path(dump).exists():
        pytest.skip('no cuobjdump here')
    images = subprocess.run(
        [dump, '--list-elf', '--list-ptx', str(path)], capture_output=True, text=True, check=True
    )
    for target in ('sm_80.cubin', 'sm_90.cubin', 'sm_100.cubin', 'sm_120.cubin', 'sm_120.ptx'):
        assert target in images.stdout
