"""tools/get_flops.py and tools/benchmark.py as processes, and the counting of FLOPs."""

import errno
import io
import json
import locale
import os
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmseg.config import load_config
from mmseg.kernels import convolution
from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused_pytorch
from mmseg.models import build_segmentor
from mmseg.models.decode_heads import pixel_decoder as msdeformattn
from tests.tiny_config import write_tiny_config
from tests.tool_process import run_tool
from tests.vspw_fixture import write_vspw
from tools import benchmark, get_flops, print_config


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

    There activations must not be fused into convolutions by the CPU's own kernels, which torch's counter leaves out.
    """
    monkeypatch.setattr(msdeformattn, 'ms_deform_attn_fused', ms_deform_attn_fused_pytorch)
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


def call(monkeypatch, *args, tool=benchmark):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, args)])
    return tool.main()


def test_benchmark_on_data(config, tmp_path, monkeypatch, capsys):
    call(monkeypatch, config, '--device', 'cpu', '--data', '--rounds', 2, '--warmup', 0, '--frames', 2)
    assert 'data.test, loading included, clips of 2' in capsys.readouterr().out


@pytest.mark.parametrize('tool, args, message', [
    (benchmark, ['--rounds', '0'], '--rounds: expected int, at least 1, got 0'),
    (benchmark, ['--warmup', '-1'], '--warmup: expected int, at least 0'),
    (benchmark, ['--frames', '0'], '--frames: expected'),
    (benchmark, ['--threads', '0'], '--threads: expected'),
    (benchmark, ['--threads', '-2'], '--threads: expected'),
    (benchmark, ['--size', '0', '0'], '--size[0]: expected int, at least 1, got 0'),
    (benchmark, ['--out-size', '9', '-1'], '--out-size[1]: expected'),
    (benchmark, ['--data', '--batch', '2'], '--batch'),
    (benchmark, ['none.pth', '--device', 'cpu'], 'does not exist'),
    (benchmark, ['--device', 'cuda'], "device: 'cuda', but this machine"),
    (benchmark, ['--device', 'smoke'], "got 'smoke'"),
    (benchmark, ['--device', 'meta'], "got 'meta'"),
    (benchmark, ['--options', 'data.test=None'], 'data.test: missing in the config'),
    (benchmark, ['--size', '32', '32', '--frames', '1', '--device', 'cpu'], 'frames of at most 32x32 pixels'),
    (get_flops, ['--frames', '0'], '--frames: expected int, at least 1 or None, got 0'),
    (get_flops, ['--size', '0', '0'], '--size[0]: expected int, at least 32'),
    (get_flops, ['--options', 'data.test=None'], 'data.test: missing in the config'),
    (get_flops, ['--options', 'model=None'], "model: missing in the config"),
    (print_config, ['--diff', 'none.py'], "config file 'none.py' does not exist"),
])
def test_wrong_usage_is_one_line(config, monkeypatch, capsys, tool, args, message):
    assert call(monkeypatch, config, *args, tool=tool) == 1
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and message in said


@pytest.mark.parametrize('tool, option, args', [
    (get_flops, '--json', ['--size', '64', '64', '--frames', '1']),
    (benchmark, '--json', ['--size', '64', '64', '--frames', '1', '--rounds', '1', '--warmup', '0', '--device', 'cpu']),
    (print_config, '--out', []),
])
def test_a_result_takes_the_place_of_no_input(config, tmp_path, monkeypatch, capsys, tool, option, args):
    own = tmp_path / 'own.py'
    own.write_text(config.read_text())
    (tmp_path / 'link.py').symlink_to(own)
    assert call(monkeypatch, own, option, tmp_path / 'link.py', *args, tool=tool) == 1
    assert 'is the config and would be overwritten' in capsys.readouterr().err
    assert own.read_text() == config.read_text()
    assert call(monkeypatch, own, option, own / 'out', *args, tool=tool) == 1  # below a file
    assert capsys.readouterr().err.startswith(f'error: {own}')

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    out = tmp_path / 'out.py'
    assert call(monkeypatch, own, option, out, *args, tool=tool) == 1
    assert capsys.readouterr().err == f'error: {out}: No space left on device\n'
    assert {path.name for path in tmp_path.iterdir()} == {'own.py', 'link.py'}


def test_a_config_is_written_and_printed_in_any_locale(config, tmp_path, monkeypatch, capsys):
    own = tmp_path / 'own.py'
    own.write_text(config.read_text() + "\nown_words = 'größer ✓'\n", encoding='utf-8')
    monkeypatch.setattr(locale, 'getpreferredencoding', lambda *_: 'ascii')
    assert call(monkeypatch, own, '--out', tmp_path / 'out.py', tool=print_config) == 0
    assert 'größer ✓' in (tmp_path / 'out.py').read_text(encoding='utf-8')
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    assert call(monkeypatch, own, tool=print_config) == 0
    stream.flush()
    assert b'gr\\xf6\\xdfer' in stream.buffer.getvalue()
