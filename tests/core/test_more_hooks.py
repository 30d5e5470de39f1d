"""Early stopping, and loggers that send records to a service."""

from __future__ import annotations

import sys
import types

import pytest

from mmseg.core import CheckpointHook, EvalHook, JsonLoggerHook
from mmseg.core.hooks import EarlyStoppingHook, MlflowLoggerHook, WandbLoggerHook
from mmseg.utils.checkpoint import read_checkpoint
from mmseg.utils.errors import ConfigError
from tests.engine import batches, make_runner


def hooks_of(scores, **options):
    scores = iter(scores)
    evaluation = EvalHook(lambda model: {'mIoU': next(scores), 'loss': 1.0}, interval=2)
    return [CheckpointHook(2), evaluation, JsonLoggerHook(), EarlyStoppingHook(**options)]


@pytest.mark.parametrize('scores, options, end', [
    ([0.1, 0.2, 0.2, 0.19, 0.5], dict(patience=2), 8),  # equal is no improvement
    ([0.1, 0.2, 0.3, 0.4, 0.5], dict(patience=1), 10), ([0.3, float('nan'), 0.2], dict(patience=2), 6),
    ([0.1, 0.14, 0.18, 0.21, 0.3], dict(patience=3, min_delta=0.1), 10),
    ([0.1, 0.14, 0.18, 0.3, 0.3], dict(patience=2, min_delta=0.1), 6),
    ([0.1] * 5, dict(patience=2, monitor='loss'), 6), ([0.4, 0.3, 0.2, 0.1, 0.3], dict(patience=2, rule='less'), 10),
])
def test_a_training_ends_where_it_no_longer_improves(tmp_path, scores, options, end):
    """The last checkpoint is there, and hooks after the run are called."""
    runner = make_runner(tmp_path, 10, hooks_of(scores, **options))
    runner.run(batches())
    assert runner.iters_done == end and (tmp_path / f'iter_{end}.pth').exists()


def test_a_resumed_run_counts_on_and_one_that_has_ended_stays_ended(tmp_path):
    make_runner(tmp_path, 4, hooks_of([0.3, 0.2], patience=3)).run(batches())
    for scores, end in (([0.1, 0.3, 0.1, 0.1], 8), ([], 8)):
        runner = make_runner(tmp_path, 20, hooks_of(scores, patience=3))
        newest = max(tmp_path.glob('iter_*.pth'), key=lambda path: int(path.stem[5:]))
        runner.resume(read_checkpoint(newest), newest.name)
        runner.run(batches())
        assert runner.iters_done == end


def test_a_figure_that_nobody_makes_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"EarlyStoppingHook.monitor: no figure 'mIuO' .did you mean 'mIoU'"):
        make_runner(tmp_path, 4, hooks_of([0.1], monitor='mIuO', rule='greater')).run(batches())
    with pytest.raises(ConfigError, match="is more of 'speed' better"):
        EarlyStoppingHook(monitor='speed')


class Service(types.ModuleType):
    """Notes every call; ``fails`` is raised by those that send."""

    def __init__(self, name, fails=None):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            if self.fails and name.startswith('log'):
                raise self.fails
        return call


@pytest.mark.parametrize('hook, package, begin, send, end', [
    (WandbLoggerHook, 'wandb', 'init', 'log', 'finish'),
    (MlflowLoggerHook, 'mlflow', 'start_run', 'log_metrics', 'end_run')])
def test_services_get_the_scalars(tmp_path, monkeypatch, hook, package, begin, send, end):
    service = Service(package)
    monkeypatch.setitem(sys.modules, package, service)
    evaluation = EvalHook(lambda model: {'mIoU': 0.5}, interval=4)
    make_runner(tmp_path, 4, [hook(interval=2), evaluation]).run(batches())
    names = [name for name, *_ in service.calls]
    assert names.index(begin) < names.index(send) and names[-1] == end and names.count(send) == 3
    sent = [(args[0], options['step']) for name, args, options in service.calls if name == send]
    assert [step for _, step in sent] == [2, 4, 4]
    assert {'learning_rate', 'train/decode.loss_ce', 'info/time'} <= sent[0][0].keys()
    assert {'val/mIoU': 0.5} in [numbers for numbers, _ in sent]
    assert all(type(value) is float for numbers, _ in sent for value in numbers.values())


def test_options_reach_the_services(tmp_path, monkeypatch):
    for package in ('wandb', 'mlflow'):
        monkeypatch.setitem(sys.modules, package, Service(package))
    runner = make_runner(tmp_path, 1, [
        WandbLoggerHook(init_kwargs=dict(project='p', name='n')), MlflowLoggerHook('e', 'file:x', {'a': 1})])
    runner.run(batches())
    (_, _, given), *_ = sys.modules['wandb'].calls
    assert (given['project'], given['name'], given['id']) == ('p', 'n', runner.run_id)
    calls = {name: (args, options) for name, args, options in sys.modules['mlflow'].calls}
    assert calls['set_tracking_uri'][0] == ('file:x',) and calls['set_experiment'][0] == ('e',)
    assert calls['set_tags'][0][0] == {'run': runner.run_id, 'seed': 3, 'a': 1}


def test_a_service_that_fails_costs_no_training_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', Service('wandb', ConnectionError('no network')))
    runner = make_runner(tmp_path, 4, [WandbLoggerHook(interval=1)])
    said = []
    monkeypatch.setattr(runner.logger, 'error', lambda text, *values: said.append(text % values))
    runner.run(batches())
    assert runner.iters_done == 4 and said == ['WandbLoggerHook: ConnectionError: no network; training goes on']
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ConfigError, match=r'MlflowLoggerHook: mlflow is not installed \(pip install mlflow\)'):
        MlflowLoggerHook()
