"""Sweeps: what runs, what a killed sweep repeats, and what the summary says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmseg.apps.sweep import markdown, read_sweep, runs_of, summarise, write_summary
from mmseg.utils.errors import ConfigError, DataError
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, environment, run_tool
from tests.vspw_fixture import write_vspw


def sweep_file(folder, text, config='c.py'):
    (folder / 'c.py').touch()
    (folder / 'sweep.py').write_text(f"config = '{config}'\n{text}\n")
    return folder / 'sweep.py'


def test_arms_are_combinations_or_named_runs(tmp_path):
    grid = "grid = {'optimizer.lr': [0.1, 0.2], 'model.decode_head.x': ['a/b', None]}"
    sweep = read_sweep(sweep_file(tmp_path, f'{grid}\nseeds = [3, 4]'))
    assert list(sweep.arms) == ['lr=0.1_x=a_b', 'lr=0.1_x=None', 'lr=0.2_x=a_b', 'lr=0.2_x=None']
    runs = runs_of(sweep, tmp_path / 'w')
    assert len(runs) == 8 and [run.seed for run in runs] == [3] * 4 + [4] * 4
    assert runs[1].options == ['optimizer.lr=0.1', 'model.decode_head.x=None'] and runs[1].state == 'waiting'
    named = read_sweep(sweep_file(tmp_path, "runs = {'a': {}, 'b': {'x': [1, 2]}}\noptions = {'y': 1}"))
    assert [run.options for run in runs_of(named, tmp_path)] == [['y=1'], ['y=1', 'x=[1,2]']]
    assert list(read_sweep(sweep_file(tmp_path, 'seeds = [0, 1]')).arms) == ['all']


@pytest.mark.parametrize('text, message', [
    ("grid = {}\nruns = {}", 'grid and runs are two ways'), ("sedes = [1]", "sedes.*did you mean 'seeds'"),
    ("seeds = []", 'at least one seed'), ("grid = {'a.x': [1], 'b.x': [1, '1']}", 'values in grid that differ'),
    ("config = 'gone.py'", 'gone.py. does not exist'), ('x = (', 'cannot be read'),
    ("seeds = ['a']", 'seeds.0.: expected'),
])
def test_a_wrong_sweep_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(tmp_path, text))


def finished(folder, scores):
    """Writes what a test leaves: ``{arm: {seed: {video: mIoU}}}``."""
    for arm, seeds in scores.items():
        for seed, videos in seeds.items():
            path = folder / arm / f'seed_{seed}/test/metrics.json'
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({
                'mIoU': float(np.mean(list(videos.values()))), 'VC8': None,
                'per_video': [{'video': video, 'mIoU': value, 'VC8': None} for video, value in videos.items()]}))


def test_means_deviations_and_paired_intervals(tmp_path):
    rng = np.random.default_rng(1)
    videos = [f'v{i}' for i in range(20)]
    base = {seed: dict(zip(videos, rng.random(20))) for seed in (0, 1, 2)}
    gain = rng.normal(0.05, 0.02, (3, 20))
    better = {seed: {v: x + g for (v, x), g in zip(base[seed].items(), gain[seed])} for seed in base}
    finished(tmp_path / 'w', {'a': base, 'b': better})
    sweep = read_sweep(sweep_file(tmp_path, "runs = {'a': {}, 'b': {}}\nseeds = [0, 1, 2]\nmetrics = ['mIoU', 'VC8']"))
    runs = runs_of(sweep, tmp_path / 'w')
    assert all(run.state == 'done' for run in runs)
    summary = summarise(sweep, runs)
    means = [np.mean(list(base[seed].values())) for seed in base]
    assert summary['arms'][0]['mIoU'] == pytest.approx(np.mean(means))
    assert summary['arms'][0]['mIoU sd'] == pytest.approx(np.std(means, ddof=1))
    row = summary['differences'][0]
    assert row['difference'] == pytest.approx(gain.mean()) and row['low'] < gain.mean() < row['high']
    spread = gain.mean(0).std() / np.sqrt(20)
    assert row['high'] - row['low'] == pytest.approx(2 * 1.96 * spread, rel=0.1)  # though scores scatter by 0.3
    assert summary['differences'][1]['difference'] is None and summary['videos'] == []
    write_summary(summary, sweep.metrics, tmp_path)
    text = (tmp_path / 'summary.md').read_text()
    assert f'| a | 3 | {100 * np.mean(means):.2f} ± ' in text and '| b | VC8 | - | - |' in text
    assert len((tmp_path / 'summary.csv').read_text().splitlines()) == 7
    assert (tmp_path / 'summary.png').stat().st_size > 5000


def test_few_videos_give_a_table_and_no_interval(tmp_path):
    finished(tmp_path / 'w', {'a': {0: {'v': 0.5, 'w': 0.7}}, 'b': {0: {'v': 0.6, 'w': 0.7}}})
    sweep = read_sweep(sweep_file(tmp_path, "runs = {'a': {}, 'b': {}, 'c': {}}\nmetrics = ['mIoU']"))
    summary = summarise(sweep, runs_of(sweep, tmp_path / 'w'))
    assert summary['differences'] == [dict(
        arm='b', to='a', metric='mIoU', seeds=1, difference=pytest.approx(0.05), low=None, high=None)]
    lines = list(markdown(summary, ['mIoU']))
    assert '| b | v | 60.00 |' in lines and '| a | 1 | 60.00 |' in lines
    with pytest.raises(DataError, match='no run of the sweep is finished'):
        summarise(sweep, runs_of(sweep, tmp_path / 'nothing'))


def tiny_sweep(tmp_path, text):
    root = write_vspw(tmp_path / 'vspw')
    write_tiny_config(tmp_path / 'tiny.py', root, iters=4, crop=32)
    (tmp_path / 'sweep.py').write_text(f"config = 'tiny.py'\nmetrics = ['mIoU', 'VC2']\n{text}\n")
    return tmp_path / 'sweep.py'


def test_a_sweep_trains_tests_and_repeats_nothing(tmp_path):
    file = tiny_sweep(tmp_path, "runs = {'low': {'optimizer.lr': 1e-4}, 'wrong': {'optimizer.lrr': 1}}")
    done = run_tool('sweep', file, '--work-dir', tmp_path / 'w', '--jobs', '2')
    assert done.returncode == 1 and "failed: " in done.stderr and "'lrr'" in done.stderr, done.stderr
    assert '| low | 1 | ' in done.stdout and '| low | v0 | ' in done.stdout
    saved = (tmp_path / 'w/low/seed_0/iter_4.pth').stat().st_mtime_ns
    file.write_text(file.read_text().replace("'wrong': {'optimizer.lrr': 1}", ''))
    done = run_tool('sweep', file, '--work-dir', tmp_path / 'w')
    assert done.returncode == 0 and (tmp_path / 'w/low/seed_0/iter_4.pth').stat().st_mtime_ns == saved
    done = run_tool('sweep', file, '--work-dir', tmp_path / 'w', '--index', '3')
    assert done.returncode == 1 and 'there are 1 runs, 0 to 0' in done.stderr


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    """A grid of 12 runs, killed three times at random moments."""
    grid = "grid = {'optimizer.lr': [1e-4, 1e-3], 'lr_config.power': [0.5, 1.0]}"
    file = tiny_sweep(tmp_path, f'{grid}\nseeds = [0, 1, 2]')
    assert run_tool('sweep', file, '--work-dir', tmp_path / 'whole', '--jobs', '2').returncode == 0
    draw = random.Random(0)
    command = [sys.executable, 'tools/sweep.py', str(file), '--work-dir', str(tmp_path / 'killed'), '--jobs', '2']
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(8, 25))
        os.kill(process.pid, number)
        process.wait()
    assert run_tool('sweep', file, '--work-dir', tmp_path / 'killed', '--jobs', '2').returncode == 0
    tables = [(tmp_path / name / 'summary.md').read_text() for name in ('whole', 'killed')]
    assert tables[0] == tables[1] and tables[0].count('\n| lr=') >= 4
