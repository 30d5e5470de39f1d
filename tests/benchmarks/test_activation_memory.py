"""The count of a training step's memory, beside sums made by hand and beside the same step on real tensors."""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import activation_memory as memory
from mmseg.models import build_segmentor
from tests.tiny import tiny_model

SMALL = ['--frames', '2', '--batch', '1', '--size', '64', '96', '--targets', '3']


@pytest.fixture
def tiny(monkeypatch):
    """A small model in the place of those of the configs."""

    def model_of(args, stage, num_frames, checkpointing=False):
        section = tiny_model(stage)
        section['backbone']['with_cp'] = section['decode_head']['pixel_decoder_cfg']['with_cp'] = checkpointing
        torch.manual_seed(0)
        return build_segmentor(section)

    monkeypatch.setattr(memory.speed, 'model_of', model_of)


def saved_of(module, forward):
    saved = memory.SavedTensors(iter(module.parameters()))
    saved.part = 'part'
    with saved.hooks():
        out = forward()
    assert out.grad_fn is not None
    return {dtype: size for (_, dtype), size in saved.tally.alive.items() if size}


def test_saved_bytes_of_linear_and_relu():
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    x = torch.randn(4, 8)
    assert saved_of(module, lambda: module(x)) == {'float32': (4 * 8 + 4 * 16) * 4}  # the linear's input, the result
    with torch.autocast('cpu', torch.bfloat16):
        assert saved_of(module, lambda: module(x)) == {'bfloat16': (4 * 8 + 4 * 16) * 2}
    both = nn.Sequential(module, nn.Linear(16, 2))  # its input is the result of the relu, which counts once
    assert saved_of(both, lambda: both(x)) == {'float32': (4 * 8 + 4 * 16) * 4}


def test_what_was_kept_is_gone_with_the_graph():
    saved = memory.SavedTensors(iter(()))
    with saved.hooks():
        out = torch.randn(4, 8, requires_grad=True).relu()  # keeps its own result
    assert saved.tally.total == 4 * 8 * 4
    del out
    assert saved.tally.total == 0


def test_checkpointing_keeps_the_input_alone():
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    x = torch.randn(4, 8)
    assert saved_of(module, lambda: checkpoint(module, x, use_reentrant=False)) == {'float32': 4 * 8 * 4}


def test_norms_keep_float32_as_on_cuda():
    norm = nn.LayerNorm(8)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        kept = saved_of(norm, lambda: norm(x))
        assert kept['bfloat16'] >= 4 * 8 * 2
        memory.as_on_cuda(norm)
        assert norm(x).dtype == torch.float32
        assert saved_of(norm, lambda: norm(x)) == {'float32': (4 * 8 + 4 + 4) * 4}  # input, means, deviations


def test_live_bytes_rise_and_fall():
    kib = 1024
    with memory.LiveTensors() as live:
        live.start('a')
        x = torch.zeros(256)
        view = x[:128]
        assert live.tally.alive == {'a': kib}
        live.start('b')
        y = x + 1
        z = y * 2
        del y
        z = z + 1  # two of them for a moment
        assert (live.peak, live.tally.total) == (3 * kib, 2 * kib)
        assert live.at_peak == {'a': kib, 'b': 2 * kib}
        live.tally.relabel(z, 'c')
        del x
        assert live.tally.alive['a'] == kib  # the view holds the storage
        del view
        assert (live.tally.alive['a'], live.tally.alive['b'], live.tally.alive['c']) == (0, 0, kib)
        live.start('d')
        assert live.peak == kib


def test_fake_tensors_count_like_real_ones(tiny):
    args, variant = memory.parse(SMALL), memory.Variant(low=True, checkpointing=True)
    fake = memory.count(args, variant)

    def real_model(args, variant):
        model = memory.speed.model_of(args, 'video', args.frames, variant.checkpointing).train()
        memory.as_on_cuda(model)
        model.to_empty = lambda device: model
        return model

    def nothing(**_):
        return contextlib.nullcontext()

    with mock.patch.multiple(memory, fake_model=real_model, FakeTensorMode=nothing, hostless=nothing):
        real = memory.count(args, variant)
    assert real.saved == fake.saved
    assert real.peaks == fake.peaks
    assert real.largest == fake.largest


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_rows(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.setattr(memory, 'VARIANTS', memory.VARIANTS[:2])
    asked = []
    monkeypatch.setattr(memory.speed, 'in_fresh_process', lambda *call: asked.append(call) or '12.5\n')
    arguments = [*SMALL, '--card', '1', '--measure', '--json', str(tmp_path / 'rows.json')]
    memory.main(arguments)
    assert asked == [('benchmarks.activation_memory', [*arguments, '--peak-of', index]) for index in '01']
    rows = json.loads((tmp_path / 'rows.json').read_text())
    assert [row['variant'] for row in rows] == ['bf16, checkpointing', 'bf16, no checkpointing']
    assert rows[0]['saved_gib'] < rows[1]['saved_gib'] and rows[0]['forward_gib'] < rows[1]['forward_gib']
    for row in rows:
        peak = max(row[f'{phase}_gib'] for phase in ('forward', 'backward', 'update'))
        assert sum(row['parts_gib'].values()) == pytest.approx(peak)
        assert row['total_gib'] == pytest.approx(1.15 * peak + 1.6)
        assert row['card_gib'] == pytest.approx(1e9 / 2**30)
        assert row['measured_mib'] == 12.5 and row['counted_mib'] > 0
        states = row['update_gib'] / row['parts_gib']['weights']
        assert 4 < states < 4.6  # weights, gradients, two moments, and the input
    printed = capsys.readouterr().out
    assert '1 clips of 2 frames of 64x96, 3 targets each' in printed and '| backbone |' in printed


@pytest.mark.slow
def test_the_count_is_near_what_a_process_needs():
    arguments = ['--backbone', 'mit_b0', '--batch', '1', '--size', '320', '320']
    fp32 = len(memory.VARIANTS) - 2
    assert str(memory.VARIANTS[fp32]) == 'fp32, no checkpointing'
    counted = memory.count(memory.parse(arguments), memory.VARIANTS[fp32]).above_weights / 2**20
    measured = memory.speed.in_fresh_process('benchmarks.activation_memory', [*arguments, '--peak-of', str(fp32)])
    assert float(measured) == pytest.approx(counted, rel=0.3)
