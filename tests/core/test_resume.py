"""A training that is killed again and again ends in the weights of one that never was, bit for bit."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from mmseg.core import read_checkpoint
from tests.processes import start
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw

ITERS = 12
EXTRA = """
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
checkpoint_config = dict(interval=2, max_keep_ckpts=2)
"""


def train(config, work_dir, kill_save_at=None):
    """Trains, going on where an earlier process was killed; kills itself in the middle of one save if told to."""
    from mmseg.apis.train import train_segmentor
    from mmseg.config import load_config
    from mmseg.utils import checkpoint as module

    os.chdir(os.path.dirname(config))
    torch.set_num_threads(1)
    if kill_save_at is not None:
        write = torch.save

        def save(content, file):
            write(content, file)
            if content['meta']['iter'] == kill_save_at:
                file.flush()
                os.truncate(file.fileno(), 10_000)
                os.kill(os.getpid(), signal.SIGKILL)

        module.torch.save = save
    cfg = load_config(config)
    cfg.work_dir = str(work_dir)
    cfg.resume_from = 'auto'
    train_segmentor(cfg, validate=False)


def finish(config, work_dir, **options):
    process = start(train, config, work_dir, *options.values())
    process.join(120)
    return process.exitcode


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Configs for 0 and 2 workers, and the last checkpoint of an uninterrupted run (with 0 workers)."""
    root = tmp_path_factory.mktemp('resume')
    write_vspw(root / 'vspw')
    configs = {
        workers: str(write_tiny_config(
            root / f'workers{workers}.py', root / 'vspw', iters=ITERS, interval=2, workers=workers, crop=32,
            extra=EXTRA))
        for workers in (0, 2)
    }
    assert finish(configs[0], root / 'whole') == 0
    return configs, read_checkpoint(root / 'whole' / f'iter_{ITERS}.pth')


def assert_same(one, other):
    for part in ('state_dict', 'trained_state_dict'):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for index, state in one['optimizer']['state'].items():
        assert all(torch.equal(value, other['optimizer']['state'][index][name]) for name, value in state.items())
    assert torch.equal(one['rng'][0]['torch'], other['rng'][0]['torch'])


def records(work_dir):
    """Iterations that all runs together have logged."""
    return sum(path.read_text().count('"mode"') for path in work_dir.glob('*.log.json'))


def wait_for_records(work_dir, count, process):
    while process.is_alive() and records(work_dir) < count:
        time.sleep(0.02)


@pytest.mark.parametrize('workers', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ten_kills_change_nothing(tmp_path, whole, workers):
    configs, expected = whole
    rng = np.random.default_rng(workers)
    for kill in range(10):
        process = start(train, configs[workers], tmp_path)
        if kill % 3:  # every third one comes during the start
            wait_for_records(tmp_path, records(tmp_path) + rng.integers(1, 4), process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
    assert finish(configs[workers], tmp_path) == 0
    assert_same(read_checkpoint(tmp_path / f'iter_{ITERS}.pth'), expected)


def test_a_kill_during_a_save_costs_only_that_interval(tmp_path, whole):
    configs, expected = whole
    assert finish(configs[0], tmp_path, kill_save_at=6) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob('iter_*')) == ['iter_2.pth', 'iter_4.pth']
    assert list(tmp_path.glob('.iter_6.pth.*')), 'the half-written file'
    assert finish(configs[0], tmp_path) == 0
    assert_same(read_checkpoint(tmp_path / f'iter_{ITERS}.pth'), expected)
    assert not list(tmp_path.glob('.iter*')), 'it is cleared away'


def test_sigterm_saves_and_resumes(tmp_path, whole):
    configs, expected = whole
    process = start(train, configs[2], tmp_path)
    wait_for_records(tmp_path, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, 'the loop ended by itself'
    done = max(int(path.stem[5:]) for path in tmp_path.glob('iter_*.pth'))
    assert 3 <= done < ITERS
    assert 'SIGTERM: stopped after iteration' in next(tmp_path.glob('*.log')).read_text()
    assert finish(configs[2], tmp_path) == 0
    assert_same(read_checkpoint(tmp_path / f'iter_{ITERS}.pth'), expected)
