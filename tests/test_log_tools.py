"""tools/analyze_logs.py and tools/print_config.py as processes."""

import json
import re
import sys

import cv2
import pytest

from tests.tool_process import run_tool
from tools import analyze_logs, print_config

CONFIG = 'local_configs/themask/1f_themask_mit_b1.py'


def write_log(path, first, last, loss, metrics=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{'exp_name': 'x', 'seed': 0}]
    records += [{'mode': 'train', 'iter': i, 'lr': 1e-3 / i, 'time': 0.5, 'eta': '0:01:00', 'decode.loss_ce': loss / i,
                 'loss': loss + i} for i in range(first, last + 1)]
    records += [{'mode': 'val', 'iter': i, 'mIoU': value} for i, value in metrics]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture
def runs(tmp_path):
    write_log(tmp_path / 'a' / '20260101_000000.log.json', 1, 30, 100, [(10, 0.25), (20, 0.5)])
    write_log(tmp_path / 'a' / '20260102_000000.log.json', 21, 40, 500, [(40, 0.375)])
    write_log(tmp_path / 'b.log.json', 1, 10, 7)
    with (tmp_path / 'b.log.json').open('a') as file:
        file.write('{"mode": "train", "it')  # killed while it wrote
    return tmp_path


def test_curves_of_two_runs(runs):
    out = runs / 'new' / 'curves.png'
    done = run_tool('analyze_logs', runs / 'a', runs / 'b.log.json', '--keys', 'loss', 'decode.*', 'mIoU', '--legend',
                    'one', 'two', '--smooth', 5, '--log-scale', '--out', out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'{out}: loss, decode.loss_ce, mIoU'
    picture = cv2.imread(str(out))
    assert picture.shape[1] > 1500 and picture.min() < 100


def test_a_resumed_run_counts_once(runs, capsys):
    (runs / 'a/20991231_235959.log.json').write_text('{"exp_name": "a"}\n')  # the last time nothing was left to train
    run = analyze_logs.read_run(runs / 'a', 'a')
    assert run.evaluated == {'mIoU'}
    assert run.curves['loss'][0] == [*range(1, 41)]
    analyze_logs.print_table([run], ['loss', 'mIoU'])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split('│')[2:-1]] for line in lines if '│' in line]
    assert rows[0] == ['loss', '40', '540', '40', '101', '1', '540', '40']
    assert rows[1] == ['mIoU', '3', '0.375', '40', '0.25', '10', '0.5', '20']


@pytest.mark.parametrize('args, message', [
    (['none'], 'cannot be read'),
    (['empty'], 'no file *.log.json'),
    (['b.log.json', '--keys', 'losss'], "did you mean 'loss'"),
    (['b.log.json', '--smooth', '0'], '--smooth'),
    (['picture.log.json'], 'line 1: no JSON record'),
])
def test_wrong_logs(runs, args, message, monkeypatch):
    (runs / 'empty').mkdir()
    (runs / 'picture.log.json').write_text('no json\nat all\n')
    monkeypatch.setattr(sys, 'argv', ['analyze_logs.py', str(runs / args[0]), *args[1:]])
    with pytest.raises(SystemExit, match=re.escape(message)):
        analyze_logs.main()


def test_final_config_can_be_read_again(tmp_path):
    out = tmp_path / 'final.py'
    done = run_tool('print_config', CONFIG, '--options', 'runner.max_iters=12', '--out', out)
    assert done.returncode == 0, done.stderr
    done = run_tool('print_config', CONFIG, '--diff', out)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ['- runner.max_iters = 160000', '+ runner.max_iters = 12', '1 differences']


def test_differences():
    first = dict(a=1, b=dict(c=[dict(d=1)], e=[]), only=None)
    second = dict(a=1, b=dict(c=[dict(d=2), dict(d=3)], e=[]))
    absent = print_config._ABSENT
    assert print_config.differences(first, second) == [
        ('b.c[0].d', 1, 2), ('only', None, absent), ('b.c[1].d', absent, 3)]
    assert print_config.differences(first, first) == []


def test_print_config():
    done = run_tool('print_config', CONFIG, '--options', 'data.workers_per_gpu=7')
    assert 'workers_per_gpu=7' in done.stdout and "type='mit_b1'" in done.stdout
    wrong = run_tool('print_config', CONFIG, '--options', 'runner.max_iter=5')
    assert wrong.returncode == 1 and 'max_iters' in wrong.stderr and 'Traceback' not in wrong.stderr


@pytest.mark.parametrize('tool', ['analyze_logs', 'print_config'])
def test_help_has_examples(tool):
    assert 'examples:' in run_tool(tool, '--help').stdout
