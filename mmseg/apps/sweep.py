"""Many trainings of one config: overrides and seeds, run by processes, and a table of what they give.

A run is a training and a test, each a process of its own with the ordinary command lines; it is finished when its
``metrics.json`` is there.  So a sweep that is started again repeats nothing, goes on with runs that were broken off,
and may be shared by machines.  Differences between arms come with a paired bootstrap over videos (Efron and Tibshirani,
1993): videos are drawn with replacement, the same ones for both arms.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from mmseg.registry import check_arguments
from mmseg.utils.arguments import Count, Index
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import write_atomically, write_json

MIN_VIDEOS = 10
"""Videos from which on differences have an interval."""

_ROOT = Path(__file__).parents[2]
_METRICS = 'metrics.json'
_DRAWS = 10_000
_DIE_WITH_PARENT = 1  # of Linux's prctl
_NOT_IN_NAMES = re.compile(r'[^\w.=-]+')


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep file holds, a Python file with these names.

    Attributes:
        config: the config file of all runs, as seen from the sweep file.
        grid: dotted key -> values; every combination is an arm.
        runs: instead of ``grid``: name of an arm -> its overrides.
        options: overrides of all arms.
        seeds: each arm is run with each.
        metrics: as of ``tools/test.py --eval``; the table has these columns.
        finetune_from: work dir or checkpoint from which all start; ``{seed}`` becomes the seed.
    """

    config: str
    grid: Mapping[str, Sequence[Any]] | None = None
    runs: Mapping[str, Mapping[str, Any]] | None = None
    options: Mapping[str, Any] | None = None
    seeds: Sequence[Index] = (0,)
    metrics: Sequence[str] = ('mIoU', 'VC8', 'VC16')
    finetune_from: str | None = None

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Name of each arm -> its overrides."""
        if self.runs is not None:
            return {name: dict(options) for name, options in self.runs.items()}
        keys = list(self.grid or {})
        combinations = itertools.product(*(self.grid or {}).values())
        return {_name(dict(zip(keys, values))): dict(zip(keys, values)) for values in combinations}


def _name(options: Mapping[str, Any]) -> str:
    """A folder's name for overrides: the last part of each key and its value."""
    parts = [f'{key.split(".")[-1]}={value}' for key, value in options.items()]
    return _NOT_IN_NAMES.sub('_', ','.join(parts)).strip('_') or 'all'


def read_sweep(path: Path) -> SweepConfig:
    """Reads a sweep file.

    Raises:
        ConfigError: it cannot be read, a name in it is unknown, or it describes no run.
    """
    try:
        content = Config.fromfile(str(path), lazy_import=False).to_dict()
    except (Exception, SystemExit) as error:  # it is code: anything may come out of it
        raise ConfigError(f"sweep file '{path}' cannot be read: {type(error).__name__}: {error}") from error
    sweep = SweepConfig(**check_arguments(SweepConfig, content, str(path)))
    if sweep.grid is not None and sweep.runs is not None:
        raise ConfigError(f'{path}: grid and runs are two ways to say the same; give one')
    if len(sweep.arms) < len(list(itertools.product(*(sweep.grid or {}).values()))) or not sweep.seeds:
        raise ConfigError(f'{path}: expected at least one seed, and values in grid that differ in their names')
    config = path.parent / sweep.config
    if not config.is_file():
        raise ConfigError(f"{path}: config '{config}' does not exist")
    object.__setattr__(sweep, 'config', str(config))
    return sweep


@dataclass
class Run:
    """One training and its test.

    Attributes:
        arm: name of its overrides.
        seed: of the training.
        folder: work dir.
        options: overrides, as ``--options`` takes them.
        state: ``waiting``, ``training``, ``testing``, ``done`` or ``failed``.
        process: that of the state, if any.
    """

    arm: str
    seed: int
    folder: Path
    options: list[str]
    state: str = 'waiting'
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What the test has written, if it has."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / 'test' / _METRICS).read_bytes())
        return None

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder / 'sweep.log'

    def progress(self) -> str:
        """The newest iteration in the log of the training."""
        lines = []
        for path in sorted(self.folder.glob('*.log.json')):
            with contextlib.suppress(OSError):
                lines += path.read_bytes().splitlines()[-1:]
        with contextlib.suppress(ValueError, IndexError):
            return str(json.loads(lines[-1]).get('iter', ''))
        return ''


def runs_of(sweep: SweepConfig, folder: Path) -> list[Run]:
    """All runs, seed by seed: an interrupted sweep has something to compare."""
    runs = []
    for seed, (arm, options) in itertools.product(sweep.seeds, sweep.arms.items()):
        words = [f'{key}={_word(value)}' for key, value in {**(sweep.options or {}), **options}.items()]
        run = Run(arm, seed, folder / arm / f'seed_{seed}', words)
        run.state = 'done' if run.metrics is not None else 'waiting'
        runs.append(run)
    return runs


def _word(value: Any) -> str:
    return value if isinstance(value, str) else repr(value).replace(' ', '')


@dataclass
class Sweep:
    """Runs that are not finished yet, several at a time.

    Args:
        sweep: what to run.
        runs: of :func:`runs_of`.
        jobs: runs at a time.
        gpus: GPU of each job, in turn; empty: as the environment has it.
    """

    sweep: SweepConfig
    runs: Sequence[Run]
    jobs: Count = 1
    gpus: Sequence[str] = ()
    _slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._slots = list(range(self.jobs))

    def step(self) -> bool:
        """Starts what can start and notes what has ended; returns whether anything is left to do."""
        for run in self.runs:
            if run.process is not None and run.process.poll() is not None:
                self._ended(run, run.process.returncode)
            if run.state == 'waiting' and self._slots:
                run.slot = self._slots.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                self._start(run, 'training')
        return any(run.state in ('waiting', 'training', 'testing') for run in self.runs)

    def stop(self) -> None:
        """Ends all processes, which save what they have, and waits for them."""
        running = [run.process for run in self.runs if run.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def _ended(self, run: Run, status: int) -> None:
        run.process = None
        if status == 0 and run.state == 'training':
            self._start(run, 'testing')
            return
        run.state = 'done' if status == 0 and run.metrics is not None else 'failed'
        self._slots.append(run.slot)

    def _start(self, run: Run, state: str) -> None:
        tool = ['train.py', self.sweep.config, '--work-dir', str(run.folder), '--seed', str(run.seed), '--no-validate']
        if state == 'training' and list(run.folder.glob('iter_*.pth')):
            tool += ['--resume-from', 'auto']
        elif state == 'training' and self.sweep.finetune_from:
            tool += ['--finetune-from', self.sweep.finetune_from.format(seed=run.seed)]
        elif state == 'testing':
            tool = ['test.py', self.sweep.config, str(run.folder), '--work-dir', str(run.folder / 'test'), '--eval',
                    *self.sweep.metrics]
        environment = dict(os.environ)
        if self.gpus:
            environment['CUDA_VISIBLE_DEVICES'] = self.gpus[run.slot % len(self.gpus)]
        command = [sys.executable, str(_ROOT / 'tools' / tool[0]), *tool[1:], '--options', *run.options]
        with open(run.log, 'ab') as log:
            run.process = subprocess.Popen(
                command if run.options else command[:-1], stdout=log, stderr=subprocess.STDOUT, env=environment,
                preexec_fn=_die_with_parent)
        run.state = state


def _die_with_parent() -> None:
    """A sweep that is killed leaves no process behind that would hold the work dir."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


# The summary


def summarise(sweep: SweepConfig, runs: Sequence[Run]) -> dict[str, Any]:
    """Scores of every run, mean and standard deviation over seeds, and differences to the first arm.

    Returns:
        ``runs``: a row a finished run; ``arms``: a row an arm; ``differences``: of each other arm to the first, over
        the seeds that both have, with ``low`` and ``high`` of the 95 % interval where there are ten videos or more;
        ``videos``: mean over seeds of each video's scores, where there are fewer.

    Raises:
        DataError: no run is finished.
    """
    rows: list[dict[str, Any]] = []
    of_video: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for run in runs:
        metrics = run.metrics
        if metrics is not None:
            rows.append({'arm': run.arm, 'seed': run.seed, **{name: metrics.get(name) for name in sweep.metrics}})
            of_video.setdefault(run.arm, {})[run.seed] = {
                row['video']: {name: _number(row.get(name)) for name in sweep.metrics} for row in metrics['per_video']}
    if not rows:
        raise DataError('no run of the sweep is finished')
    arms = [_arm(arm, [row for row in rows if row['arm'] == arm], sweep.metrics) for arm in of_video]
    videos = next(iter(next(iter(of_video.values())).values()))
    few = len(videos) < MIN_VIDEOS
    first, *others = of_video
    return {
        'runs': rows, 'arms': arms,
        'differences': [_difference(first, arm, of_video, name, few) for arm in others for name in sweep.metrics],
        'videos': _by_video(of_video, sweep.metrics) if few else [],
    }  # fmt: skip


def _number(value: Any) -> float:
    return float('nan') if value is None else float(value)


def _arm(arm: str, rows: list[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {'arm': arm, 'seeds': len(rows)}
    for name in metrics:
        values = [each[name] for each in rows if each[name] is not None]
        row[name] = statistics.fmean(values) if values else None
        row[f'{name} sd'] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _difference(
    first: str, arm: str, of_video: Mapping[str, Mapping[int, Mapping[str, Any]]], metric: str, few: bool
) -> dict[str, Any]:
    """Mean over videos and common seeds of an arm's score less the first arm's."""
    seeds = sorted(of_video[first].keys() & of_video[arm].keys())
    row: dict[str, Any] = {'arm': arm, 'to': first, 'metric': metric, 'seeds': len(seeds), 'difference': None,
                           'low': None, 'high': None}  # fmt: skip
    if not seeds:
        return row
    videos = list(of_video[first][seeds[0]])
    each = np.array([[of_video[arm][seed][video][metric] - of_video[first][seed][video][metric] for video in videos]
                     for seed in seeds])
    with np.errstate(invalid='ignore'):
        per_video = each.mean(0)
    per_video = per_video[~np.isnan(per_video)]
    if per_video.size:
        row['difference'] = float(per_video.mean())
    if not few and per_video.size >= MIN_VIDEOS:
        drawn = np.random.default_rng(0).integers(0, per_video.size, (_DRAWS, per_video.size))
        row['low'], row['high'] = np.percentile(per_video[drawn].mean(1), [2.5, 97.5]).tolist()
    return row


def _by_video(of_video: Mapping[str, Mapping[int, Mapping[str, Any]]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for arm, seeds in of_video.items():
        for video in next(iter(seeds.values())):
            means = {name: float(np.mean([seeds[seed][video][name] for seed in seeds])) for name in metrics}
            rows.append({'arm': arm, 'video': video, **{k: None if v != v else v for k, v in means.items()}})
    return rows


def write_summary(summary: Mapping[str, Any], metrics: Sequence[str], folder: Path) -> None:
    """Writes ``summary.json``, ``.csv`` (a row a run), ``.md`` and ``.png`` (arms with their seeds)."""
    write_json(folder / 'summary.json', summary)
    header = ['arm', 'seed', *metrics]
    rows = [','.join(f'"{row[key]}"' if key == 'arm' else str(row[key]) for key in header) for row in summary['runs']]
    write_atomically(folder / 'summary.csv', '\n'.join([','.join(header), *rows]) + '\n')
    write_atomically(folder / 'summary.md', '\n'.join(markdown(summary, metrics)) + '\n')
    _plot(summary, metrics, folder / 'summary.png')


def markdown(summary: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[str]:
    """The summary as tables of Markdown, in per cent."""
    yield from _rows(['arm', 'seeds', *metrics], (
        [row['arm'], str(row['seeds']), *(_percent(row[name], row[f'{name} sd']) for name in metrics)]
        for row in summary['arms']))
    if summary['differences']:
        yield ''
        yield from _rows(['difference to the first, mean over videos', 'metric', 'points', '95 % interval'], (
            [row['arm'], row['metric'], _percent(row['difference']), '-' if row['low'] is None else
             f'{100 * row["low"]:.2f} to {100 * row["high"]:.2f}'] for row in summary['differences']))
    if summary['videos']:
        yield ''
        yield from _rows(['arm', 'video', *metrics], (
            [row['arm'], row['video'], *(_percent(row[name]) for name in metrics)] for row in summary['videos']))


def _rows(header: Sequence[str], rows: Iterator[Sequence[str]] | Any) -> Iterator[str]:
    yield f'| {" | ".join(header)} |'
    yield f'|{"---|" * len(header)}'
    yield from (f'| {" | ".join(row)} |' for row in rows)


def _percent(value: float | None, deviation: float | None = None) -> str:
    if value is None or value != value:
        return '-'
    return f'{100 * value:.2f}' + ('' if deviation is None else f' ± {100 * deviation:.2f}')


def _plot(summary: Mapping[str, Any], metrics: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    arms = [row['arm'] for row in summary['arms']]
    figure, axes = plt.subplots(
        1, len(metrics), squeeze=False, sharey=True, figsize=(1 + 3 * len(metrics), 1 + 0.4 * len(arms)))
    for axis, name in zip(axes[0], metrics):
        for place, arm in enumerate(arms):
            values = [100 * row[name] for row in summary['runs'] if row['arm'] == arm and row[name] is not None]
            axis.plot(values, [place] * len(values), 'o', color='tab:blue', alpha=0.5)
            if values:
                axis.plot(statistics.fmean(values), place, '|', color='black', markersize=16)
        axis.set(title=name, xlabel='per cent', yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
        axis.grid(axis='x', alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
