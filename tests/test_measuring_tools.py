"""tools/get_flops.py and tools/benchmark.py as processes, and the counting of FLOPs."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmseg.models import build_segmentor, convolution, cpu_native
from mmseg.models.decode_heads.mask2former.pixel_decoder import msdeformattn
from mmseg.models.decode_heads.mask2former.pixel_decoder.ops.pytorch import ms_deform_attn_fused_pytorch
from mmseg.utils.config import load_config
from tests.tiny_config import write_tiny_config
from tests.tool_process import run_tool
from tests.vspw_fixture import write_vspw
from tools import benchmark, get_flops


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('measure')
    return write_tiny_config(folder / 'tiny.py', write_vspw(folder / 'data'), base='video_themask_mit_b0')


def test_flops_process(config, tmp_path):
    out = tmp_path / 'flops.json'
    done = run_tool('get_flops', config, '--size', 64, 96, '--frames', 2, '--json', out)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())['parts']
    model = build_segmentor(load_config(config).model)
    assert parts['total']['parameters'] == sum(p.numel() for p in model.parameters())
    whole = ('backbone', 'pixel decoder', 'mask decoder', 'scores')
    assert parts['total']['flops'] == sum(parts[name]['flops'] for name in whole)
    assert all(parts[name]['flops'] > 0 for name in (*whole, 'deformable attention'))
    assert f'{parts["total"]["flops"] / 1e9:.2f}' in done.stdout


def test_flops_of_parts_that_are_known(config):
    cfg = load_config(config)
    one, two = get_flops.count(cfg, 1, (64, 96)), get_flops.count(cfg, 2, (64, 96))
    assert two['backbone']['flops'] == 2 * one['backbone']['flops']
    tokens = sum((64 // s) * (96 // s) for s in (32, 16, 8))
    samples_and_channels = 32 * 3 * 4  # all heads together have 32 channels; 3 levels, 4 points
    assert one['deformable attention']['flops'] == tokens * samples_and_channels * 8
    pixels, queries, channels, classes = 16 * 24, 8, 32, 124
    assert one['scores']['flops'] == 2 * 2 * pixels * queries * (channels + classes)  # clip and frame level


def test_flops_equal_those_of_a_real_pass(config, monkeypatch):
    """Nothing is computed on the meta device; the same operations are counted as on a real one.

    There neither attention nor activations must run in the CPU's own kernels, which torch's counter leaves out.
    """
    monkeypatch.setattr(msdeformattn, 'ms_deform_attn_fused', ms_deform_attn_fused_pytorch)
    monkeypatch.setattr(cpu_native, 'usable', lambda: False)
    monkeypatch.setattr(convolution, '_fused_types', tuple)
    model = build_segmentor(load_config(config).model).eval().requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.scores(torch.randn(1, 2, 3, 64, 96))
    counted = get_flops.count(load_config(config), 2, (64, 96))
    assert counter.get_total_flops() == counted['total']['flops'] - counted['deformable attention']['flops']


def test_part_counter():
    parts = {'a': nn.Linear(4, 8), 'b': nn.Linear(8, 2)}
    counter = get_flops.PartCounter(parts)
    with torch.no_grad(), counter.counting():
        parts['b'](parts['a'](torch.ones(3, 4)))
    assert counter.flops == {'a': 2 * 3 * 4 * 8, 'b': 2 * 3 * 8 * 2}


def test_benchmark_process(config, tmp_path):
    out = tmp_path / 'benchmark.json'
    done = run_tool('benchmark', config, '--device', 'cpu', '--size', 64, 96, '--out-size', 60, 90, '--frames', 2,
                    '--rounds', 3, '--warmup', 1, '--threads', 1, '--json', out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report['latency_p10_ms'] <= report['latency_ms'] <= report['latency_p90_ms']
    assert report['frames_per_second'] == pytest.approx(2 / report['latency_ms'] * 1000)
    assert report['memory_mib'] > 50
    assert 'median of 3 rounds after 1 warm-up rounds' in done.stdout and '1 threads' in done.stdout


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, args)])
    benchmark.main()


def test_benchmark_on_data(config, tmp_path, monkeypatch, capsys):
    call(monkeypatch, config, '--device', 'cpu', '--data', '--rounds', 2, '--warmup', 0, '--frames', 2)
    assert 'data.test, loading included, clips of 2' in capsys.readouterr().out


@pytest.mark.parametrize('args, message', [
    (['--rounds', '0'], '--rounds'),
    (['--data', '--batch', '2'], '--batch'),
    (['none.pth', '--device', 'cpu'], 'does not exist'),
])
def test_benchmark_wrong_usage(config, monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, config, *args)
