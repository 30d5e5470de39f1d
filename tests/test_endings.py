"""How a training ends and goes on: errors anywhere, stalled data, signals, owed evaluations, runs in one folder."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmseg.apis import train as train_api
from mmseg.config import load_config
from mmseg.core import (
    CheckpointHook,
    EMAHook,
    EvalHook,
    Hook,
    JsonLoggerHook,
    UpdateConfig,
    newest_checkpoint,
    read_checkpoint,
)
from mmseg.utils.checkpoint import RUN, point_latest, run_of
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.lock import FolderLock
from tests.engine import batches, make_runner
from tests.processes import start
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, environment
from tests.vspw_fixture import write_vspw

SGD = dict(type='SGD', lr=0.1, momentum=0.9)


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Fails(Hook):
    """Raises ``error`` at ``point`` of iteration ``iteration`` (0-based)."""

    def __init__(self, error, iteration=3, point='after_train_iter'):
        self.error = error
        self.iteration = iteration
        setattr(self, point, self.fail)

    def fail(self, runner):
        if runner.iter == self.iteration:
            raise self.error


def resumed_equals_whole(tmp_path, name, iters=8, **options):
    """Goes on from the rescue checkpoint ``name`` and compares with a run that nothing ended."""
    whole = make_runner(tmp_path / 'whole', iters, [EMAHook(momentum=0.1)], **options)
    whole.run(batches())
    checkpoint = read_checkpoint(tmp_path / name)
    torch.manual_seed(77)
    resumed = make_runner(tmp_path, iters, [EMAHook(momentum=0.1)], **options)
    resumed.resume(checkpoint, name)
    resumed.run(batches(resumed.samples_done // 8))
    assert same_weights(whole.module.state_dict(), resumed.module.state_dict())


@pytest.mark.parametrize('point, done', [('before_train_iter', 3), ('after_train_iter', 4)])
@pytest.mark.parametrize('error', [ZeroDivisionError('in a hook'), OSError(5, 'Input/output error'), MemoryError()])
def test_any_error_saves_what_was_trained(tmp_path, caplog, error, point, done):
    runner = make_runner(tmp_path, 8, [EMAHook(momentum=0.1), Fails(error, point=point)])
    with pytest.raises(type(error)):
        runner.run(batches())
    assert caplog.messages == [f'the run ends after iteration {done}, saved as {tmp_path}/iter_{done}.pth']
    resumed_equals_whole(tmp_path, f'iter_{done}.pth')


def test_an_error_in_the_forward_pass_saves_the_generators_of_before(tmp_path):
    runner = make_runner(tmp_path, 8, [EMAHook(momentum=0.1)])
    forward = runner.model.forward

    def fails(clip, label, iteration):
        losses = forward(clip, label, iteration)  # has drawn its dropout
        if iteration == 5:
            raise RuntimeError('out of memory')
        return losses

    runner.model.forward = fails
    with pytest.raises(RuntimeError, match='out of memory'):
        runner.run(batches())
    resumed_equals_whole(tmp_path, 'iter_5.pth')


def test_an_update_that_breaks_off_is_never_saved(tmp_path, caplog):
    runner = make_runner(tmp_path, 8)
    runner.precision.step = lambda *_, **__: (_ for _ in ()).throw(RuntimeError('half an update'))
    with pytest.raises(RuntimeError, match='half an update'):
        runner.run(batches())
    assert not list(tmp_path.glob('*.pth')) and 'nothing is saved' in caplog.text


def test_an_error_inside_a_group_drops_the_half_group_and_loses_nothing_else(tmp_path):
    update = UpdateConfig(cumulative_iters=3)
    runner = make_runner(tmp_path, 8, [EMAHook(momentum=0.1), Fails(ValueError('x'), iteration=4)], update=update)
    with pytest.raises(ValueError, match='x'):
        runner.run(batches())
    assert [path.name for path in tmp_path.glob('iter_*')] == ['iter_3.pth']
    resumed_equals_whole(tmp_path, 'iter_3.pth', update=update)


def test_data_that_do_not_come_are_left_at_the_first_signal_even_inside_a_group(tmp_path):
    update = UpdateConfig(cumulative_iters=3)

    def stalls():
        for position, item in enumerate(batches()):
            if position == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield item

    runner = make_runner(tmp_path, 8, [EMAHook(momentum=0.1)], update=update)
    runner.run(stalls())
    assert runner.stopped_by == signal.SIGTERM and runner.iter == 4
    assert all(parameter.grad is None for parameter in runner.module.parameters())
    assert [path.name for path in tmp_path.glob('iter_*')] == ['iter_3.pth']
    resumed_equals_whole(tmp_path, 'iter_3.pth', update=update)


def test_a_longer_run_after_a_partial_group_begins_a_whole_group(tmp_path):
    """5 iterations in groups of 2, then up to 9: the first gradient after the resume is a mean over two."""
    update = UpdateConfig(cumulative_iters=2)
    make_runner(tmp_path, 5, interval=5, update=update, optimizer=SGD).run(batches())
    shares = []

    class Divisors(Hook):
        def after_train_iter(self, runner):
            shares[-1] = round(float(runner.outputs['loss']) / shares[-1])

    longer = make_runner(tmp_path, 10, [Divisors()], update=update, optimizer=SGD)
    longer.resume(read_checkpoint(tmp_path / 'iter_5.pth'), 'iter_5.pth')
    backward = longer.precision.backward
    longer.precision.backward = lambda loss: (shares.append(float(loss.detach())), backward(loss))
    longer.run(batches(5))
    assert shares == [2, 2, 2, 2, 1]


# ---------------------------------------------------------------------------------------------------- evaluations


class Scores:
    def __init__(self, *scores):
        self.scores = list(scores)

    def __call__(self, model):
        score = self.scores.pop(0)
        if isinstance(score, BaseException):
            raise score
        return {'mIoU': score}


def evaluated(tmp_path):
    return [line for path in sorted(tmp_path.glob('*.log.json')) for line in path.read_text().splitlines()
            if '"val"' in line]


def hooks(*scores):
    return [CheckpointHook(2), JsonLoggerHook(1), EvalHook(Scores(*scores), interval=4, save_best='mIoU')]


@pytest.mark.parametrize('error', [DataError('val/frame 7 is broken'), RuntimeError('worker killed')])
@pytest.mark.parametrize('iters', [4, 6])
def test_an_evaluation_that_broke_off_is_made_by_the_resumed_run(tmp_path, error, iters):
    with pytest.raises(type(error)):
        make_runner(tmp_path, iters, hooks(error), timestamp='one').run(batches())
    assert not evaluated(tmp_path) and not list(tmp_path.glob('best_*'))
    path, checkpoint = newest_checkpoint(tmp_path)
    assert path.name == 'iter_4.pth', 'the end of the run, too, owes its evaluation'
    resumed = make_runner(tmp_path, iters, hooks(0.5), timestamp='two')
    resumed.resume(checkpoint, path)
    resumed.run(batches(4))
    assert [record for record in evaluated(tmp_path) if '"iter": 4' in record and '0.5' in record]
    assert (tmp_path / 'best_mIoU_iter_4.pth').exists()


def test_an_evaluation_that_was_made_is_not_made_again(tmp_path):
    with pytest.raises(ValueError, match='later'):
        make_runner(tmp_path, 8, [*hooks(0.5), Fails(ValueError('later'), 4)], timestamp='one').run(batches())
    resumed = make_runner(tmp_path, 8, hooks(0.7), timestamp='two')
    resumed.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')
    resumed.run(batches(4))
    assert len(evaluated(tmp_path)) == 2, 'of iterations 4 and 8'


def test_the_log_has_what_the_checkpoint_has(tmp_path):
    """A kill between two hooks: whatever was saved has been logged before."""
    logged = {}

    class Looks(Hook):
        priority = 93  # after the checkpoint

        def after_train_iter(self, runner):
            for path in tmp_path.glob('iter_*.pth'):
                logged[path.name] = (tmp_path / 'one.log.json').read_text().count('"train"')

    make_runner(tmp_path, 4, [CheckpointHook(2), JsonLoggerHook(1), Looks()], timestamp='one').run(batches())
    assert logged == {'iter_2.pth': 4, 'iter_4.pth': 4}


def test_validation_data_without_masks_are_found_before_training(tmp_path):
    config = write_tiny_config(
        tmp_path / 'c.py', write_vspw(tmp_path / 'vspw'), extra="data['val']['split'] = 'test'\n"
        'evaluation = dict(interval=2)')
    cfg = load_config(config)
    cfg.work_dir = str(tmp_path / 'work')
    with pytest.raises(DataError, match=r"data\.val: split 'test' .* no masks"):
        train_api.train_segmentor(cfg)
    assert not list((tmp_path / 'work').glob('*.pth'))


# ------------------------------------------------------------------------------------------- runs in one work dir


def two_runs(tmp_path):
    """A longer run ``old`` and a shorter one ``new`` beside it."""
    make_runner(tmp_path, 6, interval=2, run_id='old').run(batches())
    make_runner(tmp_path, 3, [CheckpointHook(3, max_keep_ckpts=1)], run_id='new').run(batches())


def test_a_directory_means_the_run_that_latest_names(tmp_path):
    two_runs(tmp_path)
    assert sorted(path.name for path in tmp_path.glob('iter_*')) == [f'iter_{n}.pth' for n in (2, 3, 4, 6)], (
        'max_keep_ckpts deletes no file of another run')
    assert newest_checkpoint(tmp_path)[0].name == 'iter_3.pth'
    assert run_of(tmp_path / 'iter_6.pth') == 'old' and run_of(tmp_path / 'nothing.pth') is None


def test_a_damaged_latest_is_named_and_means_the_newest_of_its_run_that_is_whole(tmp_path, caplog):
    two_runs(tmp_path)
    make_runner(tmp_path, 5, interval=5, run_id='new').run(batches())
    path = tmp_path / 'iter_5.pth'
    path.write_bytes(path.read_bytes()[:-200])
    assert newest_checkpoint(tmp_path)[0].name == 'iter_3.pth'
    assert 'iter_5.pth' in caplog.text and 'trying the one before it' in caplog.text


def test_files_without_an_id_count_by_their_iteration(tmp_path):
    make_runner(tmp_path, 6, interval=2).run(batches())
    point_latest(tmp_path / 'iter_2.pth')
    assert newest_checkpoint(tmp_path)[0].name == 'iter_6.pth'


def test_the_best_score_of_another_run_does_not_count(tmp_path):
    make_runner(tmp_path, 4, hooks(0.9), run_id='old', timestamp='one').run(batches())
    make_runner(tmp_path, 4, hooks(0.2), run_id='new', timestamp='two').run(batches())
    hook = EvalHook(Scores(0.3), interval=4, save_best='mIoU')
    resumed = make_runner(tmp_path, 8, [JsonLoggerHook(1), hook], run_id='new', timestamp='three')
    resumed.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')
    assert hook.best_score == 0.2


@pytest.mark.parametrize('later, keeps', [((), True), (('mine',), False), (('other',), True)])
def test_a_run_keeps_its_id_where_it_goes_on_and_gets_a_new_one_where_it_turns_back(tmp_path, later, keeps):
    for run_id in later:
        torch.save({'meta': {RUN: run_id}, 'state_dict': {}}, tmp_path / 'iter_9.pth')
    found = train_api._run_id({'meta': {RUN: 'mine', 'iter': 4}}, tmp_path)
    assert (found == 'mine') is keeps
    assert train_api._run_id({'meta': {'iter': 4}}, tmp_path) is None
    assert train_api._run_id(None, tmp_path) != train_api._run_id(None, tmp_path)


def hold(folder, ready):
    lock = FolderLock(folder)  # noqa: F841 (held until the process dies)
    if os.fork() == 0:  # a worker that outlives its parent
        time.sleep(20)
        os._exit(0)
    ready.touch()
    time.sleep(60)


def test_a_work_dir_has_one_living_run(tmp_path):
    process = start(hold, tmp_path, tmp_path / 'ready')
    while not (tmp_path / 'ready').exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=rf'is in use by another run \(.*process {process.pid}, since'):
        FolderLock(tmp_path)
    process.kill()
    process.join()
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=f'process {os.getpid()}'):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_the_second_of_two_runs_is_refused_and_harms_nothing(tmp_path):
    config = write_tiny_config(tmp_path / 'c.py', write_vspw(tmp_path / 'vspw'))
    work = tmp_path / 'work'
    work.mkdir()
    lock = FolderLock(work)
    (work / '.iter_2.pth.x.part').write_bytes(b'half')
    cfg = load_config(config)
    cfg.work_dir = str(work)
    with pytest.raises(ConfigError, match='is in use'):
        train_api.train_segmentor(cfg)
    assert sorted(os.listdir(work)) == ['.iter_2.pth.x.part', '.lock']
    lock.release()


def test_a_config_in_the_work_dir_stays_as_its_author_wrote_it(tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    config = write_tiny_config(work / 'mine.py', write_vspw(tmp_path / 'vspw'), iters=1)
    written = config.read_text()
    for _ in range(2):
        cfg = load_config(config)
        cfg.work_dir = str(work)
        train_api.train_segmentor(cfg, validate=False)
    assert config.read_text() == written
    assert sorted(path.name for path in work.glob('*.py')) == ['mine.py', 'mine_merged.py']
    assert load_config(work / 'mine_merged.py').runner.max_iters == 1


# ------------------------------------------------------------------------------------- the command line, as it ends


@pytest.fixture(scope='module')
def stalled(tmp_path_factory):
    """Config of a data set one of whose masks never comes; it is in the first batch."""
    root = tmp_path_factory.mktemp('stalled')
    data = write_vspw(root / 'vspw', {'train': {'a': 1}, 'val': {'v0': 3}})
    mask = next((data / 'data/a/mask').iterdir())
    mask.unlink()
    os.mkfifo(mask)
    extra = 'data.update(stall_seconds=1)'
    configs = {n: write_tiny_config(root / f'{n}.py', data, workers=n, extra=extra) for n in (0, 2)}
    return configs, mask


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_whose_data_stall_says_so_and_obeys(tmp_path, stalled, workers):
    configs, mask = stalled
    process = subprocess.Popen(
        [sys.executable, 'tools/train.py', str(configs[workers]), '--work-dir', str(tmp_path)], cwd=ROOT, text=True,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f'reading {mask}' in line:
            assert 'delivered nothing for 1 s' in line
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, lines[-5:]
    assert any(line.startswith('SIGINT: stopping') for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason='mounts a file system')
def test_workers_without_shared_memory_are_an_error(tmp_path):
    config = write_tiny_config(tmp_path / 'c.py', write_vspw(tmp_path / 'vspw'), workers=2)
    script = f'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} tools/train.py {config}'
    run = subprocess.run(['unshare', '-m', 'sh', '-c', f'{script} --work-dir {tmp_path}/work'], cwd=ROOT, text=True,
                         capture_output=True, env=environment(), timeout=120)
    if 'mount' in run.stderr or 'unshare' in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 1 and 'of /dev/shm are free' in run.stderr and 'Traceback' not in run.stderr


def test_an_unexpected_error_is_one_line_and_a_traceback_in_the_log(tmp_path, monkeypatch, capsys):
    from tests.apis.test_train_cli import ROOT as root

    config = write_tiny_config(
        tmp_path / 'c.py', write_vspw(tmp_path / 'vspw'), extra="""
        custom_imports = dict(imports=['bad_hook'])
        custom_hooks = [dict(type='BadHook')]
        """)
    (tmp_path / 'bad_hook.py').write_text(
        'from mmseg.core import Hook\nfrom mmseg.registry import HOOKS\n\n\n@HOOKS.register_module(force=True)\n'
        'class BadHook(Hook):\n    def after_train_iter(self, runner):\n        return 1 / (runner.iter - 1)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import importlib

    tool = importlib.import_module('train')
    monkeypatch.setattr(tool, 'keep_pages', lambda: None)  # for the rest of the process
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config), '--work-dir', str(tmp_path / 'work')])
    assert tool.main() == 1
    err = capsys.readouterr().err
    (log,) = (tmp_path / 'work').glob('*.log')
    assert err == f'error: ZeroDivisionError: division by zero (traceback in {log})\n'
    assert 'bad_hook.py' in log.read_text() and (tmp_path / 'work/iter_2.pth').exists()
    for handler in list(logging.getLogger('mmseg').handlers):
        logging.getLogger('mmseg').removeHandler(handler)


def test_a_resumed_run_whose_frames_are_in_another_order_now_is_warned(tmp_path, caplog):
    data = write_vspw(tmp_path / 'vspw', {'train': {'a': 12}, 'val': {'v0': 3}})
    for path in sorted((data / 'data/a').rglob('*.*')):
        path.rename(path.with_stem(f'frame_{int(path.stem)}'))
    cfg = load_config(write_tiny_config(tmp_path / 'c.py', data, iters=1))
    cfg.work_dir = str(tmp_path / 'work')
    train_api.train_segmentor(cfg, validate=False)
    path, checkpoint = newest_checkpoint(tmp_path / 'work')
    for marked in (True, False):
        if not marked:
            del checkpoint['meta']['frame_order']
            torch.save(checkpoint, path)
        cfg.resume_from = str(path)
        logging.getLogger('mmseg').propagate = True
        train_api.train_segmentor(cfg, validate=False)
        (log,) = sorted((tmp_path / 'work').glob('*.log'))[-1:]
        assert ('natural order now' in log.read_text()) is not marked


class Stops:
    """An evaluation in which a signal comes."""

    def __call__(self, model):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return {'mIoU': 1.0}


def test_a_signal_in_the_last_evaluation_is_a_stop(tmp_path):
    hooks = [CheckpointHook(2), EvalHook(Stops(), interval=4)]
    runner = make_runner(tmp_path, 4, hooks)
    runner.run(batches())
    assert runner.stopped_by == signal.SIGTERM
    owing = make_runner(tmp_path, 4, [EvalHook(Stops(), interval=4)])
    owing.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')
    owing.run(batches(4))
    assert owing.stopped_by == signal.SIGTERM, 'and so in the one that it owes'


def test_a_hook_that_cannot_save_costs_its_own_part_alone(tmp_path, caplog):
    class Bad(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            raise KeyError('mine')

    runner = make_runner(tmp_path, 4, [Bad(), CheckpointHook(2)])
    with pytest.raises(KeyError):
        runner.run(batches())
    assert "Bad adds nothing to the checkpoint: 'mine'" in caplog.text
    assert read_checkpoint(tmp_path / 'iter_2.pth')['meta']['iter'] == 2


def test_a_draw_that_a_signal_breaks_off_leaves_the_generators_as_they_were(tmp_path):
    def draws():
        for position, item in enumerate(batches()):
            if position == 2:
                torch.manual_seed(5)  # as the loader does for each item, and puts back
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            yield item

    make_runner(tmp_path, 8, [EMAHook(momentum=0.1)]).run(draws())
    resumed_equals_whole(tmp_path, 'iter_2.pth')


def test_a_run_that_turns_back_knows_its_own_best_score_and_evaluations(tmp_path):
    make_runner(tmp_path, 8, hooks(0.6, 0.9), run_id='old', timestamp='one').run(batches())
    hook = EvalHook(Scores(0.5), interval=4, save_best='mIoU')
    turned = make_runner(tmp_path, 8, [JsonLoggerHook(1), hook], run_id='new', timestamp='two')
    turned.resume(read_checkpoint(tmp_path / 'iter_6.pth'), 'iter_6.pth')
    assert (hook.best_score, hook.best_path) == (0.6, None)
    turned.run(batches(6))
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_mIoU_iter_8.pth'], 'that of the old run stays'
    assert read_checkpoint(tmp_path / 'best_mIoU_iter_8.pth')['meta'][RUN] == 'old'
    again = make_runner(tmp_path, 4, hooks(), run_id='newer', timestamp='three')
    again.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')
    again.run(batches(4))  # its evaluation was made by the run that it comes from


def test_the_merged_config_of_a_run_may_be_trained_from_and_written_in(tmp_path):
    config = write_tiny_config(tmp_path / 'c.py', write_vspw(tmp_path / 'vspw'), iters=1)
    work = tmp_path / 'work'
    for source in (config, work / 'c.py'):
        cfg = load_config(source)
        cfg.work_dir = str(work)
        train_api.train_segmentor(cfg, validate=False)
        own = work / 'c.py'
        own.write_text(own.read_text() + '# my own words\n')
    assert (work / 'c.py').read_text().count('# my own words') == 2 and (work / 'c_merged.py').exists()


def test_workers_that_were_started_when_a_signal_came_are_ended(tmp_path, monkeypatch):
    import multiprocessing
    from multiprocessing.process import BaseProcess

    from mmseg.datasets import build_dataset, build_train_loader
    from tests.vspw_fixture import train_config

    begin, started = BaseProcess.start, []

    def interrupted(process):
        begin(process)
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseProcess, 'start', interrupted)
    loader = build_train_loader(build_dataset(train_config(write_vspw(tmp_path))), 2, workers_per_gpu=2)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    started[0].join(20)
    assert started[0].exitcode == -signal.SIGKILL and not multiprocessing.active_children()
