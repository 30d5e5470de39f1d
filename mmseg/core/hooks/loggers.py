"""Where the numbers of a training go: text, JSON lines, TensorBoard; each a mean over the iterations since the last."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
import socket
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg.core.hooks.hook import Hook
from mmseg.registry import HOOKS, retired
from mmseg.utils.allocator import peak_memory
from mmseg.utils.arguments import Count
from mmseg.utils.errors import ConfigError

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner

_INFO = ('lr', 'eta', 'time', 'rate', 'data_time', 'memory')


class LoggerHook(Hook):
    """Collects the numbers of each iteration and hands their means to :meth:`write`, on rank 0 only.

    Args:
        interval: iterations between two records; the last iteration is always recorded.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: Count = 10) -> None:
        self.interval = interval
        self._values: dict[str, list[float]] = defaultdict(list)

    def after_train_iter(self, runner: IterBasedRunner) -> None:
        """Adds this iteration; writes where a record is due."""
        if runner.rank:
            return
        for name, value in runner.log_buffer.items():
            self._values[name].append(value)
        if self.every_n_iters(runner, self.interval) or self.is_last_iter(runner):
            means = {name: sum(values) / len(values) for name, values in self._values.items()}
            self._values.clear()
            self.write(runner, 'train', runner.iters_run, self._info(runner, means) | means)

    @staticmethod
    def _info(runner: IterBasedRunner, means: dict[str, float]) -> dict[str, Any]:
        seconds = means.pop('time')
        left = runner.seconds_per_iter * (runner.max_iters - runner.iter - 1)
        return {
            'lr': max(group['lr'] for group in runner.optimizer.param_groups),
            'eta': str(datetime.timedelta(seconds=int(left))),
            'time': seconds,
            'rate': 1 / seconds,
            'data_time': means.pop('data_time'),
            'memory': int(peak_memory(runner.device)),
        }

    def after_val_epoch(self, runner: IterBasedRunner) -> None:
        """Writes the figures of an evaluation."""
        if runner.rank == 0:
            self.write(runner, 'val', runner.iters_run, dict(runner.val_results))

    def write(self, runner: IterBasedRunner, mode: str, iteration: int, record: dict[str, Any]) -> None:
        """Stores one record.

        Args:
            runner: the running training.
            mode: ``train`` or ``val``.
            iteration: number of iterations that have run.
            record: names and values; in ``train`` mode ``lr``, ``eta`` (text), ``time`` (s an iteration), ``rate``
                (iterations a second), ``data_time`` (s), ``memory`` (peak, MiB) and all losses.
        """
        raise NotImplementedError


@HOOKS.register_module()
@retired(by_epoch=(False,), ignore_last=(), reset_flag=(), interval_exp_name=(), out_dir=(None,))
class TextLoggerHook(LoggerHook):
    """One line a record, to the terminal and the log file."""

    def write(self, runner: IterBasedRunner, mode: str, iteration: int, record: dict[str, Any]) -> None:
        """Writes the line."""
        if mode == 'val':
            values = ', '.join(f'{name}: {value:.4f}' for name, value in record.items())
            runner.logger.info('Iter(val) [%d/%d]\t%s', iteration, runner.max_iters, values)
            return
        losses = ', '.join(f'{name}: {value:.4f}' for name, value in record.items() if name not in _INFO)
        runner.logger.info(
            'Iter [%d/%d]\tlr: %.3e, eta: %s, time: %.3f, rate: %.2f it/s, data_time: %.3f, memory: %d, %s',
            *(iteration, runner.max_iters, *(record[name] for name in _INFO), losses),
        )


class _FileLoggerHook(LoggerHook):
    """Writes to a file that grows by whole records.

    What cannot be written (the disk is full) is kept and tried again with the next record: a training neither ends nor
    has gaps in its curves for it.
    """

    _path: Path | None = None
    _unwritten = b''
    _failed = False

    def _append(self, runner: IterBasedRunner, record: bytes) -> None:
        """Writes ``record``; the first of several failures is an error in the log."""
        if self._path is None:  # the run has not begun
            return
        self._unwritten += record
        try:
            self._write(self._path)
        except OSError as error:
            if not self._failed:
                runner.logger.error('cannot write %s: %s; training goes on, and its records are kept until it can be '
                                    'written', self._path, error)
            self._failed = True
        else:
            self._unwritten, self._failed = b'', False

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('ab') as file:
            whole = file.tell()
        try:
            with path.open('ab') as file:
                file.write(self._unwritten)
        except OSError:
            os.truncate(path, whole)  # no half record
            raise


@HOOKS.register_module()
@retired(by_epoch=(False,), ignore_last=(), reset_flag=())
class JsonLoggerHook(_FileLoggerHook):
    """One JSON object a line in ``<work dir>/<start time>.log.json``; the first line describes the run."""

    def before_run(self, runner: IterBasedRunner) -> None:
        """Writes the first line."""
        if runner.rank == 0:
            self._path = Path(runner.work_dir) / f'{runner.timestamp}.log.json'
            about = {key: runner.meta.get(key) for key in ('exp_name', 'mmseg_version', 'seed')}
            self._append_line(runner, {**about, 'run': runner.run_id})

    def write(self, runner: IterBasedRunner, mode: str, iteration: int, record: dict[str, Any]) -> None:
        """Appends the line."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._append_line(runner, {'mode': mode, 'iter': iteration, **numbers})

    def _append_line(self, runner: IterBasedRunner, record: dict[str, Any]) -> None:
        self._append(runner, f'{json.dumps(record)}\n'.encode())


def evaluations_of(work_dir: str | Path, run_id: str | None) -> list[dict[str, Any]]:
    """The evaluations in a run's JSON logs, by iteration; of one that was made twice the newer."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(Path(work_dir).glob('*.log.json')):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a file that is damaged proves nothing
            about, *records = map(json.loads, path.read_text(encoding='utf-8').splitlines())
            if about.get('run') == run_id:
                found |= {record['iter']: record for record in records
                          if record.get('mode') == 'val' and isinstance(record.get('iter'), int)}
    return [found[iteration] for iteration in sorted(found)]


def was_evaluated(work_dir: str | Path, run_id: str | None, iteration: int) -> bool:
    """Whether a run's JSON logs hold an evaluation after ``iteration`` iterations."""
    return any(record['iter'] == iteration for record in evaluations_of(work_dir, run_id))


def tag_of(mode: str, name: str) -> str:
    """Name of a number in TensorBoard or a service: ``train/<loss>``, ``val/<metric>``, ``info/time``."""
    return 'learning_rate' if name == 'lr' else f'info/{name}' if name in _INFO else f'{mode}/{name}'


@HOOKS.register_module()
@retired(by_epoch=(False,), ignore_last=(), reset_flag=())
class TensorboardLoggerHook(_FileLoggerHook):
    """TensorBoard scalars: ``train/<loss>``, ``val/<metric>``, ``learning_rate``, and time and memory under ``info/``.

    The event file is written here and not by a ``SummaryWriter``, whose thread ends for good at the first error.

    Args:
        interval: iterations between two records.
        log_dir: folder of the event files; ``<work dir>/tf_logs`` where None.
    """

    def __init__(self, interval: Count = 10, log_dir: str | None = None) -> None:
        super().__init__(interval)
        self.log_dir = log_dir
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ConfigError('TensorboardLoggerHook: tensorboard is not installed (pip install tensorboard)') from None
        self._events, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter

    def before_run(self, runner: IterBasedRunner) -> None:
        """Opens the event file; after a resume, points beyond the resumed iteration are hidden."""
        if runner.rank == 0:
            folder = Path(self.log_dir or Path(runner.work_dir) / 'tf_logs')
            name = f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'
            self._path = folder / name
            started = self._events.SessionLog(status=self._events.SessionLog.START)
            begin = {'step': runner.iter + 1, 'session_log': started}
            self._append_events(runner, {'file_version': 'brain.Event:2'}, begin)

    def write(self, runner: IterBasedRunner, mode: str, iteration: int, record: dict[str, Any]) -> None:
        """Adds the scalars."""
        values = []
        for name, value in record.items():
            if not isinstance(value, str):
                values.append(self._summaries.Summary.Value(tag=tag_of(mode, name), simple_value=value))
        self._append_events(runner, {'step': iteration, 'summary': self._summaries.Summary(value=values)})

    def _append_events(self, runner: IterBasedRunner, *events: dict[str, Any]) -> None:
        records = io.BytesIO()
        for event in events:
            message = self._events.Event(wall_time=time.time(), **event)
            self._record_writer(records).write(message.SerializeToString())
        self._append(runner, records.getvalue())
