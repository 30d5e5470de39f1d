"""The benchmark for GPUs, run on the CPU: its cases, its processes, the rows it writes."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu

FIELDS = {'work', 'backbone', 'frames', 'precision', 'form', 'ms', 'per_second', 'ratio', 'peak_mib'}


def test_cases_are_those_of_the_command_line_the_largest_first():
    cases = gpu.cases_of(gpu.parse(['--backbone', 'mit_b0', 'mit_b5', '--frames', '1', '4']))
    assert len(set(cases)) == len(cases) == 2 * 2 * 2 * 2
    assert (cases[0].work, cases[0].backbone, cases[0].frames) == ('train', 'mit_b5', 4)
    assert {case.frames for case in gpu.cases_of(gpu.parse([])) if case.work == 'train'} == {2}


@pytest.mark.slow
def test_every_case_has_a_process_and_rows(tmp_path, capsys):
    path = tmp_path / 'rows.json'
    gpu.main([
        '--device', 'cpu', '--backbone', 'mit_b0', '--frames', '1', '--size', '64', '64', '--rounds', '1',
        '--jobs', '2', '--precision', 'fp32', '--without', 'compiled', 'checkpointed', '--json', str(path),
    ])  # fmt: skip
    rows = json.loads(path.read_text())
    assert [(row['work'], row['form']) for row in rows] == [
        ('train', 'plain'), ('train', 'ours'), ('eval', 'plain'), ('eval', 'ours')]  # fmt: skip
    for row in rows:
        assert row.keys() == FIELDS
        assert row['per_second'] == pytest.approx(1000 / row['ms'])
    assert rows[0]['ratio'] is None and rows[1]['ratio'] == pytest.approx(rows[0]['ms'] / rows[1]['ms'])
    assert capsys.readouterr().out.count('mit_b0') == 4


def test_a_case_that_fails_is_named_and_the_others_go_on(monkeypatch, capfd):
    good = gpu.Case('eval', 'mit_b0', 1, 'fp32')
    monkeypatch.setattr(gpu, 'cases_of', lambda args: [gpu.Case('eval', 'mit_b9', 1, 'fp32'), good])
    argv = ['--device', 'cpu', '--size', '64', '64', '--rounds', '1', '--jobs', '2', '--without', 'ours', 'compiled']
    (rows,) = gpu.all_rows(gpu.parse(argv), argv)
    assert [row['backbone'] for row in rows] == ['mit_b0']
    assert "backbone='mit_b9'" in capfd.readouterr().err


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match='no GPU'):
        gpu.main([])
