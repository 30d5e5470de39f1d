"""tools/analyze_logs.py and tools/print_config.py."""

import json

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


def test_curves_of_two_runs(runs, capsys):
    out = runs / 'new' / 'curves.png'
    args = [runs / 'a', runs / 'b.log.json', '--keys', 'loss', 'decode.*', 'mIoU', '--legend', 'one', 'two',
            '--smooth', 5, '--log-scale', '--out', out]
    assert analyze_logs.main(list(map(str, args))) == 0
    assert capsys.readouterr().out.strip() == f'{out}: loss, decode.loss_ce, mIoU'
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
    (['b.log.json', '--legend', 'x', 'y'], '--legend'),
    (['b.log.json', '--out', 'x.xyz'], '--out: expected a file that ends in .png, .svg, .pdf'),
    (['b.log.json', '--out', 'b.log.json/x.png'], 'b.log.json'),
    (['b.log.json', '--out', 'link.png'], 'is the log'),
])
def test_wrong_usage(runs, args, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    (runs / 'empty').mkdir()
    (runs / 'link.png').symlink_to('b.log.json')
    before = (runs / 'b.log.json').read_bytes()
    assert analyze_logs.main(args) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line
    assert (runs / 'b.log.json').read_bytes() == before


@pytest.mark.parametrize('content, message', [
    (b'no json\nat all\n', 'line 1: no JSON record'),
    (bytes(range(256)) * 4, 'line 1: no JSON record'),
    (b'[1, 2]\n{}\n', 'line 1: expected one JSON object a line, got list'),
    (b'null\n', 'line 1: expected one JSON object a line, got NoneType'),
    (b'{"iter": null}\n', "line 1: 'iter' should be a whole number >= 0, and is None"),
    (b'{"iter": 1}\n{"iter": "2"}\n', "line 2: 'iter' should be"),
    (b'{"iter": -1, "loss": 1}\n', 'and is -1'),
    (b'{"iter": NaN, "loss": 1}\n', 'and is nan'),
    (b'{"iter": 1e999, "loss": 1}\n', 'and is inf'),
    (b'{"iter": [1], "loss": 1}\n', 'and is [1]'),
    (b'{"iter": %d, "loss": 1}\n' % 10**30, 'and is 1000'),
    (b'{"iter": 1, "loss": %s1\n{}\n' % (b'9' * 5000), 'line 1: no JSON record'),
    (b'[' * 100_000 + b'\n{}\n', 'line 1: no JSON record'),
    (b'{"loss": 1}\n{"exp_name": "x"}\n', 'the runs have nothing'),
    (b'', 'the runs have nothing'),
])
def test_a_broken_log_is_one_line(tmp_path, content, message, capsys):
    (tmp_path / 'x.log.json').write_bytes(content)
    assert analyze_logs.main([str(tmp_path), '--out', str(tmp_path / 'x.png')]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line
    assert [path.name for path in tmp_path.iterdir()] == ['x.log.json']


def test_values_that_are_no_numbers_leave_gaps(tmp_path, capsys):
    values = ['null', '"0.5"', '[1]', '{}', 'true', 'NaN', '1', 'Infinity', '-Infinity', 10**400, '2.5', '-1e400']
    lines = [f'{{"mode": "train", "iter": {i}, "loss": {value}, "acc_$_[/x]": {value}, "lr": NaN}}\n'
             for i, value in enumerate(values)]
    (tmp_path / '$_{ [run] caf\u00e9.log.json').write_text(''.join(lines), encoding='utf-8')
    (run,) = [str(path) for path in tmp_path.iterdir()]
    out = tmp_path / 'x.PNG'
    name = ['--legend', '[run] caf\u00e9']  # a long path would be folded
    assert analyze_logs.main([run, '--out', str(out), '--log-scale', '--title', '$_{', '--smooth', '2', *name]) == 0
    assert cv2.imread(str(out)) is not None
    assert analyze_logs.main([run, '--table', *name]) == 0
    shown = capsys.readouterr().out
    assert '[run] caf\u00e9' in shown and 'acc_$_[/x]' in shown
    rows = [[cell.strip() for cell in line.split('\u2502')[2:-1]] for line in shown.splitlines() if '\u2502' in line]
    assert ['loss', '7', '-inf', '11', '-inf', '8', 'inf', '9'] in rows
    assert ['lr', '12', 'nan', '11', 'nan', '0', 'nan', '0'] in rows


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs tools/print_config.py in this process: its status and what it prints."""

    def run(*args):
        monkeypatch.setattr('sys.argv', ['print_config.py', *map(str, args)])
        status = print_config.main()
        return status, *capsys.readouterr()

    return run


def test_final_config_can_be_read_again(tmp_path, printed):
    out = tmp_path / 'final.py'
    assert printed(CONFIG, '--options', 'runner.max_iters=12', '--out', out)[0] == 0
    status, shown, _ = printed(CONFIG, '--diff', out)
    assert status == 1
    assert shown.splitlines() == ['- runner.max_iters = 160000', '+ runner.max_iters = 12', '1 differences']


def test_differences():
    first = dict(a=1, b=dict(c=[dict(d=1)], e=[]), only=None)
    second = dict(a=1, b=dict(c=[dict(d=2), dict(d=3)], e=[]))
    absent = print_config._ABSENT
    assert print_config.differences(first, second) == [
        ('b.c[0].d', 1, 2), ('only', None, absent), ('b.c[1].d', absent, 3)]
    assert print_config.differences(first, first) == []


def test_print_config(printed):
    _, shown, _ = printed(CONFIG, '--options', 'data.workers_per_gpu=7')
    assert 'workers_per_gpu=7' in shown and "type='mit_b1'" in shown
    status, _, error = printed(CONFIG, '--options', 'runner.max_iter=5')
    assert status == 1 and 'max_iters' in error and len(error.splitlines()) == 1


@pytest.mark.parametrize('tool', ['analyze_logs', 'print_config'])
def test_help_has_examples(tool):
    assert 'examples:' in run_tool(tool, '--help').stdout


def test_no_base_of_a_config_is_overwritten(tmp_path, printed):
    base, config = tmp_path / 'base.py', tmp_path / 'mine.py'
    base.write_text('runner = dict(max_iters=3)  # my words\n')
    config.write_text("_base_ = ['base.py']\n")
    status, _, error = printed(config, '--out', base)
    assert status == 1 and 'base of the config' in error and '# my words' in base.read_text()


def test_home_folders_behind_an_equals_sign(tmp_path, printed, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert printed(CONFIG, '--out=~/final.py')[0] == 0
    assert (tmp_path / 'final.py').exists()
