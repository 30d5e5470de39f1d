"""The training loop: hooks, logs, accumulation, precision, evaluation, averages, NaN, signals, resume."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.core import (
    CheckpointHook,
    EMAHook,
    EvalHook,
    Hook,
    JsonLoggerHook,
    NonFiniteLossError,
    Precision,
    TensorboardLoggerHook,
    TextLoggerHook,
    UpdateConfig,
    freeze,
    open_checkpoint,
    read_checkpoint,
)
from mmseg.registry import HOOKS, build, check_arguments
from mmseg.utils.errors import CheckpointError, ConfigError, DataError
from tests.engine import Model, batch, batches, make_runner


def weights(runner):
    return {name: tensor.clone() for name, tensor in runner.module.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Recorder(Hook):
    def __init__(self, name='', log=None):
        self.name = name
        self.log = [] if log is None else log

    def before_run(self, runner):
        self.log.append((self.name, 'before_run'))

    def before_iter(self, runner):
        self.log.append((self.name, 'before_iter', runner.iter))

    def after_train_iter(self, runner):
        self.log.append((self.name, 'after_train_iter', runner.iter, self.every_n_iters(runner, 2)))

    def before_epoch(self, runner):
        self.log.append((self.name, 'before_epoch'))

    def after_run(self, runner):
        self.log.append((self.name, 'after_run'))


def test_hooks_are_called_at_their_points_with_mmcv_counting(tmp_path):
    hook = Recorder()
    make_runner(tmp_path, 2, [hook]).run(batches())
    assert [entry[1:] for entry in hook.log] == [
        ('before_run',), ('before_epoch',), ('before_iter', 0), ('after_train_iter', 0, False), ('before_iter', 1),
        ('after_train_iter', 1, True), ('after_run',)]


def test_priorities_order_hooks_and_registration_breaks_ties(tmp_path):
    log = []
    runner = make_runner(tmp_path, 1)
    for name, priority in (('c', 'LOW'), ('a', 'VERY_HIGH'), ('b1', None), ('b2', 50), ('d', 99)):
        runner.register_hook(Recorder(name, log), priority)
    runner.run(batches())
    assert [entry[0] for entry in log if entry[1] == 'before_run'] == ['a', 'b1', 'b2', 'c', 'd']
    for bad in ('URGENT', 101, -1, True):
        with pytest.raises(ConfigError, match=r'here\.priority'):
            runner.register_hook(Recorder(), bad, where='here')


def test_a_hook_that_would_never_be_called_is_an_error(tmp_path):
    class Slip(Hook):
        def after_train_iters(self, runner):
            pass

    runner = make_runner(tmp_path)
    with pytest.raises(ConfigError, match=r"Slip.after_train_iters would never be called.*'after_train_iter'"):
        runner.register_hook(Slip())
    with pytest.raises(ConfigError, match=r'dict is no hook'):
        runner.register_hook({})
    with pytest.raises(ConfigError, match=r"unknown hook 'TextLogerHook'.*TextLoggerHook"):
        build(HOOKS, dict(type='TextLogerHook'), 'log_config.hooks[0]')
    with pytest.raises(ConfigError, match=r'custom_hooks\[0\].momentun'):
        build(HOOKS, dict(type='EMAHook', momentun=0.1), 'custom_hooks[0]')


def test_logs_hold_means_since_the_last_record(tmp_path, caplog):
    class Extra(Hook):
        def after_train_iter(self, runner):
            runner.log_buffer['extra'] = float(runner.iter)

    caplog.set_level('INFO', 'mmseg')
    recorder = {'loss': []}

    class Losses(Hook):
        def after_train_iter(self, runner):
            recorder['loss'].append(float(runner.outputs['loss']))

    hooks = [Extra(), Losses(), TextLoggerHook(3), JsonLoggerHook(3), TensorboardLoggerHook(3)]
    runner = make_runner(tmp_path, 7, hooks, timestamp='now')
    runner.run(batches())
    lines = [json.loads(line) for line in (tmp_path / 'now.log.json').read_text().splitlines()]
    assert lines[0]['seed'] == 3
    assert [line['iter'] for line in lines[1:]] == [3, 6, 7]
    assert [line['extra'] for line in lines[1:]] == [1.0, 4.0, 6.0]
    assert lines[1]['loss'] == pytest.approx(np.mean(recorder['loss'][:3]), rel=1e-6)
    assert lines[1]['decode.loss_ce'] == lines[1]['loss'], 'only names with "loss" are summed'
    assert {'lr', 'eta', 'time', 'rate', 'data_time', 'memory', 'grad_norm', 'decode.accuracy'} <= lines[1].keys()
    assert lines[1]['rate'] == pytest.approx(1 / lines[1]['time'])
    text = next(record.getMessage() for record in caplog.records if 'Iter [3/7]' in record.getMessage())
    for word in ('lr: ', 'eta: ', 'it/s', 'memory: ', 'decode.loss_ce: ', 'grad_norm: ', 'extra: 1.0000'):
        assert word in text

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / 'tf_logs')).Reload()
    assert [(e.step, e.value) for e in events.Scalars('train/extra')] == [(3, 1.0), (6, 4.0), (7, 6.0)]
    assert {'learning_rate', 'info/memory', 'train/loss'} <= set(events.Tags()['scalars'])


class Matching(Model):
    """Describes its batch by shares, one of them a share of nothing in every second iteration."""

    def statistics(self):
        odd = self.seen[-1] % 2
        return {'matched': torch.tensor([1.0 + odd, 4.0]), 'acc': torch.tensor([1.0, 2.0] if odd else [0.0, 0.0])}


def test_shares_are_logged_and_shares_of_nothing_harm_no_mean(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level('INFO', 'mmseg')
    hooks = [TextLoggerHook(2), JsonLoggerHook(2), TensorboardLoggerHook(2)]
    make_runner(tmp_path, 3, hooks, model=Matching(), timestamp='now').run(batches())
    _, both, last = map(json.loads, (tmp_path / 'now.log.json').read_text().splitlines())
    assert (both['matched'], both['acc']) == (0.375, 0.5)
    assert last['matched'] == 0.25 and 'acc' not in last
    first, second = (record.getMessage() for record in caplog.records if 'Iter [' in record.getMessage())
    assert 'matched: 0.3750, acc: 0.5000' in first and 'acc:' not in second
    events = EventAccumulator(str(tmp_path / 'tf_logs')).Reload()
    assert [(e.step, e.value) for e in events.Scalars('train/matched')] == [(2, 0.375), (3, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars('train/acc')] == [(2, 0.5)]


def test_a_full_disk_neither_ends_a_run_nor_leaves_gaps_in_its_curves(tmp_path, caplog, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Disk(Hook):
        """From iteration 2 to 6 no file can grow by more than a part of a record."""

        priority = 'HIGHEST'

        def after_train_iter(self, runner):
            sizes = [path.stat().st_size for path in (*tmp_path.glob('*.json'), *tmp_path.glob('tf_logs/*'))]
            if runner.iter == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) + 10, limits[1]))
            self.sizes = sizes if runner.iter == 2 else getattr(self, 'sizes', None)
            if runner.iter == 6:
                assert sizes == self.sizes, 'no half records'
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    hooks = [Disk(), JsonLoggerHook(1), TensorboardLoggerHook(1)]
    try:
        make_runner(tmp_path, 8, hooks, timestamp='now').run(batches())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [json.loads(line) for line in (tmp_path / 'now.log.json').read_text().splitlines()]
    assert [line['iter'] for line in lines[1:]] == [1, 2, 3, 4, 5, 6, 7, 8]
    events = EventAccumulator(str(tmp_path / 'tf_logs')).Reload()
    assert [event.step for event in events.Scalars('train/loss')] == [1, 2, 3, 4, 5, 6, 7, 8]
    errors = [record.getMessage() for record in caplog.records if record.levelname == 'ERROR']
    assert len(errors) == 2 and all('cannot write' in e and 'File too large' in e for e in errors), 'once a file'
    assert 'Traceback' not in capsys.readouterr().err


def test_curves_of_a_resumed_run_hide_what_the_broken_off_run_drew_beyond(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_runner(tmp_path, 5, [TensorboardLoggerHook(1)]).run(batches())
    resumed = make_runner(tmp_path, 4, [TensorboardLoggerHook(1)])
    resumed.iter = 2
    resumed.run(batches(2))
    events = EventAccumulator(str(tmp_path / 'tf_logs')).Reload()
    assert [event.step for event in events.Scalars('train/loss')] == [1, 2, 3, 4]


def test_a_log_folder_that_cannot_be_made_does_not_end_a_run(tmp_path, caplog):
    (tmp_path / 'file').touch()
    runner = make_runner(tmp_path, 2, [TensorboardLoggerHook(1, log_dir=str(tmp_path / 'file' / 'logs'))])
    runner.run(batches())
    assert runner.iter == 2
    assert [record.getMessage().startswith('cannot write') for record in caplog.records] == [True]


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    """3 + 3 + 1 iterations: the last group is shorter, and its mean is over what it holds."""
    model, same = Model().eval(), Model().eval()
    same.load_state_dict(model.state_dict())
    sgd = dict(type='SGD', lr=0.1)  # unlike Adam it shows the scale of a gradient
    runner = make_runner(tmp_path, 7, model=model, optimizer=sgd, update=UpdateConfig(cumulative_iters=3))
    runner.train_mode = lambda: None  # dropout off, so that the two runs can be compared
    runner.run(batches())

    def joined(first, last):
        parts = [batch(i) for i in range(first, last)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    large = make_runner(tmp_path, 3, model=same, optimizer=sgd)
    large.train_mode = lambda: None
    large.schedule = lambda_schedule(runner.schedule, [2, 5, 6])
    large.run(iter([joined(0, 3), joined(3, 6), joined(6, 7)]))
    for name, tensor in large.module.state_dict().items():
        torch.testing.assert_close(runner.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def lambda_schedule(schedule, iterations):
    """The rate of another iteration: the update of a group takes place in its last one."""

    class Mapped:
        @staticmethod
        def apply(optimizer, iteration):
            schedule.apply(optimizer, iterations[iteration])

    return Mapped()


def test_checkpoints_wait_for_the_end_of_a_group(tmp_path):
    runner = make_runner(tmp_path, 8, interval=4, update=UpdateConfig(cumulative_iters=3))
    runner.run(batches())
    assert sorted(path.name for path in tmp_path.glob('iter_*')) == ['iter_6.pth', 'iter_8.pth']
    assert read_checkpoint(tmp_path / 'iter_6.pth')['meta']['samples'] == 48


@pytest.mark.parametrize('options', [
    {}, dict(update=UpdateConfig(dict(max_norm=0.1), cumulative_iters=2)),
    dict(precision=dict(dtype='bfloat16')), dict(precision=dict(loss_scale='dynamic'))])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options):
    def runner(folder):
        more = dict(options)
        if 'precision' in more:
            more['precision'] = Precision(torch.device('cpu'), **more['precision'])
        return make_runner(tmp_path / folder, 10, [EMAHook(momentum=0.1)], interval=4, **more)

    whole = runner('whole')
    whole.run(batches())
    path, checkpoint = tmp_path / 'whole/iter_4.pth', read_checkpoint(tmp_path / 'whole/iter_4.pth')
    torch.manual_seed(99)
    resumed = runner('resumed')
    resumed.resume(checkpoint, path)
    assert resumed.iter == 4 and resumed.samples_done == 32
    resumed.run(batches(start=4))
    assert equal(weights(whole), weights(resumed))
    last, again = (read_checkpoint(tmp_path / folder / 'iter_10.pth') for folder in ('whole', 'resumed'))
    assert equal(last['state_dict'], again['state_dict'])
    assert equal(last['trained_state_dict'], again['trained_state_dict'])
    assert last['scaler'] == again['scaler'] and torch.equal(last['rng'][0]['torch'], again['rng'][0]['torch'])


def test_resuming_needs_a_full_checkpoint(tmp_path):
    runner = make_runner(tmp_path, 2, [CheckpointHook(2, save_optimizer=False)])
    runner.run(batches())
    path, checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r'weights only; use --load-from'):
        make_runner(tmp_path).resume(checkpoint, path)


def test_latest_and_kept_checkpoints(tmp_path):
    make_runner(tmp_path, 9, [CheckpointHook(2, max_keep_ckpts=2)]).run(batches())
    assert sorted(os.listdir(tmp_path)) == ['.latest.run', 'iter_8.pth', 'iter_9.pth', 'latest.pth']
    assert os.readlink(tmp_path / 'latest.pth') == 'iter_9.pth'
    make_runner(tmp_path / 'x', 3, [CheckpointHook(2, save_last=False)]).run(batches())
    assert sorted(os.listdir(tmp_path / 'x')) == ['.latest.run', 'iter_2.pth', 'latest.pth']


@pytest.mark.parametrize('make', [
    *(lambda hook=hook, value=value: check_arguments(hook, value, 'section') for hook, value in (
        (CheckpointHook, {'interval': 0}), (CheckpointHook, {'max_keep_ckpts': 0}), (TextLoggerHook, {'interval': 0}),
        (EvalHook, {'interval': 0}), (EvalHook, {'rule': 'more'}), (EvalHook, {'save_best': True}))),
    lambda: EvalHook(dict, save_best='speed'), lambda: EMAHook(momentum=1.0),
    lambda: build(UpdateConfig, dict(cumulative_iters=0), ''),
    lambda: build(UpdateConfig, dict(grad_clip=dict(norm_type=2)), '')])
def test_values_out_of_range_are_errors(make):
    with pytest.raises(ConfigError):
        make()


class Scores:
    def __init__(self, *scores):
        self.scores = list(scores)
        self.seen = []

    def __call__(self, model):
        assert not model.training
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {'aAcc': 0.1, 'mIoU': self.scores.pop(0)}


@pytest.mark.parametrize('save_best, rule, scores, best', [
    ('mIoU', None, [0.2, 0.5, 0.3, math.nan], 4), ('auto', None, [0.9, 0.9, 0.9, 0.9], 2),
    ('mIoU', 'less', [0.2, 0.5, 0.1, 0.3], 6)])
def test_the_best_checkpoint_is_kept(tmp_path, save_best, rule, scores, best):
    evaluate = Scores(*scores)
    runner = make_runner(tmp_path, 8, [EvalHook(evaluate, interval=2, save_best=save_best, rule=rule)])
    runner.run(batches())
    key = 'aAcc' if save_best == 'auto' else save_best
    assert [path.name for path in tmp_path.glob('best_*')] == [f'best_{key}_iter_{best}.pth']
    assert runner.module.training
    saved = read_checkpoint(tmp_path / f'best_{key}_iter_{best}.pth')
    assert equal(saved['state_dict'], evaluate.seen[best // 2 - 1])


def test_a_resumed_run_knows_the_best_score(tmp_path):
    hooks = [CheckpointHook(2), EvalHook(Scores(0.5, 0.7), interval=2, save_best='mIoU'), JsonLoggerHook()]
    make_runner(tmp_path, 4, hooks).run(batches())
    hook = EvalHook(Scores(0.6, 0.9), interval=2, save_best='mIoU')
    runner = make_runner(tmp_path, 8, [hook])
    runner.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')  # saved before the evaluation of 4
    assert hook.best_score == 0.7
    runner.run(batches())
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_mIoU_iter_8.pth']


def test_evaluation_starts_where_told_and_unknown_figures_are_named(tmp_path):
    scores = Scores(0, 0, 0)
    make_runner(tmp_path, 8, [EvalHook(scores, interval=3, start=2)]).run(batches())
    assert len(scores.seen) == 3
    runner = make_runner(tmp_path, 8, [EvalHook(Scores(0), interval=3, save_best='mIuO', rule='greater')])
    with pytest.raises(ConfigError, match=r"no figure 'mIuO'.*mIoU"):
        runner.run(batches())


def test_the_average_is_evaluated_and_saved_and_training_goes_on_with_the_weights(tmp_path):
    scores = Scores(0)
    values = []

    class Watch(Hook):
        def after_train_iter(self, runner):
            values.append(runner.module.predictor.bias.detach().clone())

    runner = make_runner(tmp_path, 5, [Watch(), EMAHook(momentum=0.3, warm_up=2), EvalHook(scores, interval=5),
                                       CheckpointHook(5)])
    start = runner.module.predictor.bias.detach().clone()
    runner.run(batches())
    average = start
    for n, value in enumerate(values):
        decay = min(0.7, (1 + n) / (2 + n))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(scores.seen[0]['predictor.bias'], average)
    saved = read_checkpoint(tmp_path / 'iter_5.pth')
    torch.testing.assert_close(saved['state_dict']['predictor.bias'], average)
    assert torch.equal(saved['trained_state_dict']['predictor.bias'], values[-1])
    assert torch.equal(runner.module.predictor.bias, values[-1])


class Poisoned(Model):
    """Gives NaN in chosen iterations: in the loss, or only in the gradient."""

    def __init__(self, where, iterations=(3,)):
        super().__init__()
        self.where = where
        self.iterations = iterations

    def forward(self, clip, label, iteration=0):
        losses = super().forward(clip, label, iteration)
        if iteration in self.iterations:
            if self.where == 'loss':
                losses['decode.loss_ce'] = losses['decode.loss_ce'] * math.nan
            else:
                losses['decode.loss_extra'] = (self.predictor.weight * 0).sum().clamp(min=0).sqrt() * 0
                losses['decode.loss_extra'] = losses['decode.loss_extra'] + (self.predictor.bias * 0).abs().sqrt().sum()
        return losses


@pytest.mark.parametrize('where, name', [('loss', 'decode.loss_ce = nan'), ('gradient', 'grad_norm = nan')])
def test_a_nan_stops_with_iteration_and_name_and_loses_nothing(tmp_path, where, name):
    runner = make_runner(tmp_path, 8, model=Poisoned(where))
    with pytest.raises(NonFiniteLossError, match=f'iteration 4: .*{name}'):
        runner.run(batches())
    path, checkpoint = open_checkpoint(tmp_path)
    assert path.name == 'iter_3.pth'
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint['state_dict'].values())
    assert equal(checkpoint['state_dict'], weights(runner))


@pytest.mark.parametrize('cumulative', [1, 2])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_a_nan_can_be_skipped(tmp_path, caplog, where, cumulative):
    watched = []

    class Watch(Hook):
        def after_train_iter(self, runner):
            watched.append(weights(runner))

    update = UpdateConfig(cumulative_iters=cumulative)
    runner = make_runner(tmp_path, 8, [Watch()], model=Poisoned(where), update=update, nan_loss='skip')
    runner.run(batches())
    assert 'iteration 4' in caplog.text and 'skipped' in caplog.text
    assert equal(watched[3], watched[3 - cumulative]) and not equal(watched[3], watched[7])
    assert all(torch.isfinite(tensor).all() for tensor in weights(runner).values())


def test_an_overflow_of_scaled_gradients_is_no_error(tmp_path):
    precision = Precision(torch.device('cpu'), loss_scale='dynamic')
    runner = make_runner(tmp_path, 8, model=Poisoned('gradient'), precision=precision)
    runner.run(batches())
    assert precision.scaler.get_scale() == 32768.0
    assert runner.log_buffer['loss_scale'] == 32768.0


def test_bad_data_ends_the_run_with_a_checkpoint(tmp_path):
    def until_bad():
        for position in range(3):
            yield batch(position)
        raise DataError('v/1.jpg: truncated')

    runner = make_runner(tmp_path, 8)
    with pytest.raises(DataError, match=r'v/1.jpg'):
        runner.run(until_bad())
    assert open_checkpoint(tmp_path)[1]['meta']['iter'] == 3


def test_skipped_clips_are_collected(tmp_path):
    runner = make_runner(tmp_path, 2)
    runner.run(iter([batch(0) | {'skipped': ['v/1.jpg: empty']}, batch(1)]))
    assert runner.skipped == ['v/1.jpg: empty']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_saves_and_resumes_bit_for_bit(tmp_path, number):
    whole = make_runner(tmp_path / 'whole', 8)
    whole.run(batches())

    class Send(Hook):
        def before_train_iter(self, runner):
            if runner.iter == 4:
                os.kill(os.getpid(), number)

    runner = make_runner(tmp_path, 8, [Send()])
    before = signal.getsignal(number)
    runner.run(batches())
    assert signal.getsignal(number) == before, 'the handler is put back'
    assert runner.stopped_by == number and runner.module.seen == [0, 1, 2, 3, 4]
    path, checkpoint = open_checkpoint(tmp_path)
    assert path.name == 'iter_5.pth'
    resumed = make_runner(tmp_path, 8)
    resumed.resume(checkpoint, path)
    resumed.run(batches(start=5))
    assert resumed.stopped_by is None and equal(weights(whole), weights(resumed))


def test_a_signal_during_an_evaluation_interrupts_it(tmp_path):
    steps = []

    def evaluate(model):
        for step in range(1000):
            steps.append(step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return {'mIoU': 1.0}

    runner = make_runner(tmp_path, 8, [EMAHook(), EvalHook(evaluate, interval=3, save_best='mIoU')])
    trained = []

    class Watch(Hook):
        priority = 'HIGHEST'

        def after_train_iter(self, runner):
            trained.append(weights(runner))

    runner.register_hook(Watch())
    runner.run(batches())
    assert len(steps) < 1000 and runner.stopped_by == signal.SIGTERM
    saved = open_checkpoint(tmp_path)
    assert saved[0].name == 'iter_3.pth'
    assert equal(saved[1]['trained_state_dict'], trained[-1]), 'the averaged weights were put away again'


def test_frozen_parts_run_in_eval_mode_where_so_configured(tmp_path):
    for frozen_eval in (False, True):
        model = Model()
        model.features = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        freeze(model, ('predictor',))
        runner = make_runner(tmp_path, model=model, frozen_eval=frozen_eval)
        runner.train_mode()
        assert model.features[1].training != frozen_eval
        assert model.drop.training and model.predictor.training


def test_a_run_that_has_finished_does_nothing_more(tmp_path):
    make_runner(tmp_path, 4, interval=4).run(batches())
    before = Path(tmp_path / 'iter_4.pth').stat().st_mtime_ns
    runner = make_runner(tmp_path, 4, interval=4)
    runner.resume(read_checkpoint(tmp_path / 'iter_4.pth'), 'iter_4.pth')
    runner.run(batches())
    assert runner.module.seen == [] and Path(tmp_path / 'iter_4.pth').stat().st_mtime_ns == before
