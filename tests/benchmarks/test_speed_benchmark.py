"""The speed benchmark runs every part on small sizes and writes the rows it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speed

ROW = {'name', 'plain_ms', 'ours_ms', 'ratio', 'plain_peak_mib', 'ours_peak_mib'}


def test_rows_and_printed_table(tmp_path, capsys):
    arguments = [
        '--part',
        'post',
        '--size',
        '64',
        '96',
        '--rounds',
        '1',
        '--no-peaks',
        '--json',
        str(tmp_path / 'a.json'),
    ]
    speed.main(arguments)
    (row,) = json.loads((tmp_path / 'a.json').read_text())
    assert set(row) == ROW
    assert row['ratio'] == pytest.approx(row['plain_ms'] / row['ours_ms'])
    printed = capsys.readouterr().out
    assert 'threads of' in printed and 'allocator' in printed and row['name'] in printed


def test_both_arms_of_every_part_do_the_same_kind_of_work():
    args = speed.parse(['--backbone', 'mit_b0', '--size', '32', '64', '--frames', '2'])
    names = {part: [case.name for case in speed.cases_of(args, part)] for part in speed.PARTS}
    assert [len(names[part]) for part in speed.PARTS] == [2, 3, 1, 1, 1, 1, 8, 8]
    for arm in speed.ARMS:
        labels = speed.cases_of(args, 'eval')[0].make(arm)()
        assert labels.shape == (1, 2, 32, 64)
    assert torch.equal(speed.cases_of(args, 'post')[0].make('plain')(), speed.cases_of(args, 'post')[0].make('ours')())


def test_peak_memory_counts_what_a_run_allocates():
    def run():
        torch.ones(64, 2**20).sum()  # 256 MiB

    assert 200 < speed.own_peak(run, 'cpu') < 400


@pytest.mark.slow
def test_the_command_measures_memory_in_fresh_processes(tmp_path):
    command = [
        sys.executable,
        '-m',
        'benchmarks.speed',
        '--part',
        'eval',
        'train',
        '--backbone',
        'mit_b0',
        '--frames',
        '1',
    ]
    command += ['--size', '64', '96', '--rounds', '1', '--json', str(tmp_path / 'rows.json')]
    subprocess.run(command, check=True, cwd=Path(speed.__file__).parents[1])
    rows = json.loads((tmp_path / 'rows.json').read_text())
    assert len(rows) == 5
    assert all(set(row) == ROW and row['plain_peak_mib'] > 0 and row['ours_peak_mib'] > 0 for row in rows)
