"""The op's benchmark times torch-ms-deform-attn by the interface that its documentation gives, or does without."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from benchmarks import ms_deform_attn as benchmark
from mmseg.kernels import library
from mmseg.kernels.ms_deform_attn import (
    ms_deform_attn_fused_pytorch,
    ms_deform_attn_pytorch,
)

PACKAGE = 'torch_ms_deform_attn'


def install(monkeypatch, **contents):
    module = ModuleType(PACKAGE)
    module.__spec__ = ModuleSpec(PACKAGE, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, PACKAGE, module)


@pytest.fixture
def arguments():
    return benchmark.inputs(1, 32, 64)


@pytest.fixture
def own_settings(monkeypatch):
    """Puts back what a run of the benchmark leaves: the number of threads, the kernel of the slowest form."""
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    before = library.instruction_set() if library.instruction_sets() else None
    yield
    if before:
        library.choose_instruction_set(before)


@pytest.fixture
def grad_out(arguments):
    return torch.randn(1, arguments[0].shape[1], benchmark.HEADS * benchmark.WIDTH)


def test_the_package_is_given_the_same_problem(arguments, grad_out, monkeypatch):
    outputs = []

    def ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step=64, *,
        check_cuda_metadata=False
    ):
        assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
        assert spatial_shapes.tolist() == [[1, 2], [2, 4], [4, 8]] and level_start_index.tolist() == [0, 2, 10]
        shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
        outputs.append(ms_deform_attn_pytorch(value, shapes, sampling_locations, attention_weights))
        return outputs[-1]

    install(monkeypatch, ms_deform_attn=ms_deform_attn)
    run = benchmark.package_runner(arguments, grad_out)
    outputs.clear()
    run(False)
    run(True)
    assert [out.requires_grad for out in outputs] == [False, True]
    torch.testing.assert_close(outputs[0], ms_deform_attn_fused_pytorch(*arguments))


def test_a_package_that_does_not_run_here_is_one_line(arguments, grad_out, monkeypatch, capsys):
    def cuda_alone(*_):
        raise RuntimeError('Not implemented on the CPU\nException raised from ...')

    monkeypatch.setitem(sys.modules, PACKAGE, None)
    assert benchmark.package_runner(arguments, grad_out) is None
    assert capsys.readouterr().err == '', 'not installed'
    for contents, reason in (
        (dict(ms_deform_attn=cuda_alone), 'RuntimeError: Not implemented on the CPU'),
        ({}, "ImportError: cannot import name 'ms_deform_attn'"),
    ):
        install(monkeypatch, **contents)
        assert benchmark.package_runner(arguments, grad_out) is None
        said = capsys.readouterr().err
        assert said.startswith(f'torch-ms-deform-attn is installed but does not run here and is left out: {reason}')
        assert said.count('\n') == 1 and said.endswith('\n')


def test_rows_of_all_forms(own_settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(benchmark.SIZES, '480x864 N=1', (1, 32, 64))
    monkeypatch.setattr(benchmark, 'bandwidth', lambda device: 1e9)
    monkeypatch.setattr(sys, 'argv', [
        'ms_deform_attn', '--size', '480x864 N=1', '--repeats', '1', '--json', str(tmp_path / 'rows.json')])
    install(monkeypatch, ms_deform_attn=lambda value, shapes, starts, locations, weights: ms_deform_attn_pytorch(
        value, [tuple(shape) for shape in shapes.tolist()], locations, weights))
    benchmark.main()
    rows = json.loads((tmp_path / 'rows.json').read_text())
    for label in ('forward', 'forward+backward'):
        names = [row['name'] for row in rows if row['pass'] == label]
        assert names[0] == 'PyTorch form' and names[-1] == 'torch-ms-deform-attn'
    assert all(row['ratio'] > 0 and row['bytes'] > 0 for row in rows)
    assert capsys.readouterr().out.count('torch-ms-deform-attn') == 2
