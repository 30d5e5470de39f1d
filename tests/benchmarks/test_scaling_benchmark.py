"""The scaling benchmark: what it measures, the rows it writes, its counted operations, and a run of the command."""

from __future__ import annotations

import json

import cv2
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling, speed

SMALL = ['--backbone', 'mit_b0', '--sizes', '64x64', '64x96', '--frames', '1', '2', '--targets', '1', '3']
FIELDS = {
    'axis', 'work', 'allocator',
    'frames', 'height', 'width', 'targets', 'amount', 'ms', 'kernel_ms', 'peak_mib', 'amount_growth',
    'ms_growth', 'peak_growth', 'ms_per_unit', 'mib_per_unit', 'gflop', 'attention_gflop',
}  # fmt: skip


@pytest.mark.parametrize('targets', [1, 2, 6, 60])
def test_a_clip_holds_exactly_the_targets(targets):
    labels = scaling.grid_labels(targets, 3, 64, 96)
    assert labels.shape == (1, 3, 64, 96)
    for frame in labels[0]:
        assert frame.unique().tolist() == list(range(targets))
    assert targets == 1 or not torch.equal(labels[0, 0], labels[0, 1])


def test_one_of_the_three_grows_at_a_time():
    points = scaling.points_of(scaling.parse([*SMALL, '--work', 'eval', 'train']))
    assert [(p.axis, p.work, p.frames, p.width, p.targets) for p in points] == [
        ('frames', 'eval', 1, 64, 6), ('frames', 'eval', 2, 64, 6),
        ('frames', 'train', 1, 64, 6), ('frames', 'train', 2, 64, 6),
        ('size', 'eval', 1, 64, 6), ('size', 'eval', 1, 96, 6),
        ('size', 'train', 1, 64, 6), ('size', 'train', 1, 96, 6),
        ('targets', 'train', 2, 64, 1), ('targets', 'train', 2, 64, 3),
    ]  # fmt: skip
    assert points[5].amount == pytest.approx(64 * 96 / 1e6)


@pytest.mark.parametrize('work, call', [('eval', 'use_huge_pages'), ('train', 'keep_pages'), ('losses', 'keep_pages')])
def test_the_allocator_as_the_tools_set_it(work, call, monkeypatch, capsys):
    done = []
    for name in ('use_huge_pages', 'keep_pages'):
        monkeypatch.setattr(scaling.allocator, name, lambda name=name: done.append(name))
    monkeypatch.setattr(scaling, 'measure', lambda args, point: done.append('measure'))
    point = scaling.Point('frames', work, 1, 64, 64, 6)
    monkeypatch.setattr(speed, 'in_fresh_process', lambda module, arguments: scaling.main(arguments) or '{}')
    scaling.measure_apart(scaling.parse(['--as-tools']), point)
    scaling.measure_apart(scaling.parse([]), point)
    assert done == [call, 'measure', 'measure']
    with pytest.raises(SystemExit):
        scaling.parse(['--as-tools', '--same-process'])
    monkeypatch.setenv('MALLOC_ARENA_MAX', '1')
    with pytest.raises(SystemExit):
        scaling.parse(['--as-tools'])
    assert 'the environment sets the allocator too: MALLOC_ARENA_MAX=1' in capsys.readouterr().err


def test_growths_are_over_the_row_above_in_the_same_series():
    def row(work, frames, ms, peak):
        return {'axis': 'frames', 'work': work, 'allocator': 'default', 'amount': frames, 'ms': ms, 'peak_mib': peak}

    rows = scaling.with_growth([row('eval', 1, 10, 4), row('train', 1, 50, None), row('eval', 4, 30, 20)])
    assert rows[0]['ms_growth'] is None and rows[1]['peak_growth'] is None
    assert (rows[2]['amount_growth'], rows[2]['ms_growth'], rows[2]['peak_growth']) == (4, 3, 5)
    assert (rows[2]['ms_per_unit'], rows[2]['mib_per_unit']) == (7.5, 5)
    other = {**rows[2], 'allocator': 'MALLOC_ARENA_MAX=1'}
    rows = scaling.with_growth([rows[0], other, rows[2]])
    assert rows[1]['ms_growth'] is None and rows[2]['ms_growth'] == 3
    assert list(scaling.series_of(rows[::-1])) == [
        ('frames', 'eval', 'default'),
        ('frames', 'eval', other['allocator']),
    ]
    text = scaling.summary('frames', 'eval', 'default', [rows[0], rows[2]])
    assert text.endswith('4x the input, 3x the time, 5x the memory (**faster than the input**)')


def test_attention_is_counted_as_the_flop_counter_counts_it():
    point = scaling.Point('size', 'eval', 1, 96, 160, 6)
    args = scaling.argparse.Namespace(backbone='mit_b0', device='meta')
    with torch.device('meta'):
        mit = speed.model_of(args, 'video', 1).backbone.eval()
        image = torch.empty(1, 3, point.height, point.width)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        mit(image)
    products = counter.get_flop_counts()['Global'][torch.ops.aten.bmm]  # attention that is not fused, as on `meta`
    assert scaling.attention_flops(mit, point) == products > 0
    counted = scaling.operations('mit_b0', point)
    assert counted['attention_gflop'] == products / 1e9 < counted['gflop']


@pytest.mark.slow
def test_the_command_writes_rows_tables_and_a_picture(tmp_path, capsys):
    files = [tmp_path / 'a.json', tmp_path / 'b.json']
    arguments = [*SMALL, '--axis', 'size', 'targets', '--work', 'eval', 'losses', '--rounds', '1', '--same-process']
    scaling.main([*arguments, '--json', str(files[0])])
    rows = json.loads(files[0].read_text())
    assert len(rows) == 6 and all(set(row) == FIELDS for row in rows)
    assert all(row['ms'] > 0 and row['kernel_ms'] >= 0 and row['peak_mib'] >= 0 for row in rows)
    assert all((row['gflop'] is not None) == (row['work'] == 'eval') for row in rows)
    assert [row['amount_growth'] for row in rows] == [None, 1.5, None, 1.5, None, 3]
    printed = capsys.readouterr().out
    assert '6/6' in printed and 'Matching and losses against number of targets (2 frames of 64x64)' in printed

    scaling.main(['--from', str(files[0]), '--json', str(files[1]), '--plot', str(tmp_path / 'plot.png')])
    assert json.loads(files[1].read_text()) == rows
    again = capsys.readouterr().out
    assert again.strip() == printed[printed.index('Evaluation against') :].strip()
    height, width = cv2.imread(str(tmp_path / 'plot.png')).shape[:2]
    assert width > height > 400


@pytest.mark.slow
def test_every_point_gets_a_process_of_its_own(tmp_path):
    scaling.main([*SMALL, '--axis', 'size', '--work', 'train', '--rounds', '1', '--json', str(tmp_path / 'rows.json')])
    rows = json.loads((tmp_path / 'rows.json').read_text())
    assert len(rows) == 2 and all(row['peak_mib'] > 50 for row in rows)


@pytest.mark.parametrize('wrong', [['--sizes', '64'], ['--sizes', '60x64'], ['--targets', '0'], ['--targets', '125']])
def test_wrong_sizes_and_targets_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        scaling.parse(wrong)
    assert 'expected' in capsys.readouterr().err
