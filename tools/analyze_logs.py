"""Draws curves of losses, learning rate, speed and metrics from the JSON logs of one or several trainings."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.registry import nearest
from mmseg.utils.console import table_console
from mmseg.utils.errors import ConfigError, DataError

EPILOG = """RUN is a .log.json file, or a work dir: then all its logs in order of their time.  Where a training was
resumed the later log counts from its first iteration on.  Keys may hold * and ?.

examples:
  python tools/analyze_logs.py work_dirs/demo/1f                         # loss, lr, metrics -> curves.png
  python tools/analyze_logs.py runs/a runs/b --keys loss lr 'mIoU' --out ab.png   # two runs in one plot
  python tools/analyze_logs.py runs/a --keys 'decode.loss_*' --log-scale --smooth 20
  python tools/analyze_logs.py runs/a --keys 'matched_*' 'acc_*'                  # what the rounds matched, how well
  python tools/analyze_logs.py runs/a runs/b --table                              # time, last and best values
"""
_NOT_CURVES = {'mode', 'iter', 'epoch'}
_SHARES = ('matched_', 'acc_')
"""Keys whose distance from zero counts."""
_COLUMNS = 4
_DEFAULT_KEYS = ('loss', 'lr', 'grad_norm', 'matched_*', 'acc_*', 'mIoU*', 'VC*')


@dataclass
class Run:
    """The records of a training.

    Attributes:
        name: of the legend.
        curves: key -> (iterations, values), ascending in iterations.
        evaluated: keys that come from evaluations.
    """

    name: str
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    evaluated: set[str] = field(default_factory=set)


def read_run(path: Path, name: str) -> Run:
    """Reads a log file, or all of a work dir.

    Raises:
        DataError: there is no log, or it is no JSON log.
    """
    files = sorted(path.glob('*.log.json')) if path.is_dir() else [path]
    if not files:
        raise DataError(f'{path}: no file *.log.json')
    points: dict[str, dict[int, float]] = defaultdict(dict)
    run = Run(name)
    for file in files:
        records = [r for r in _read_records(file) if 'iter' in r]
        if not records:  # of a training that had nothing left to do
            continue
        first = min(r['iter'] for r in records)
        for values in points.values():
            for iteration in [i for i in values if i >= first]:
                del values[iteration]
        for record in records:
            for key, value in record.items():
                if key not in _NOT_CURVES and isinstance(value, (int, float)):
                    points[key][record['iter']] = float(value)
                    if record.get('mode') == 'val':
                        run.evaluated.add(key)
    for key, values in points.items():
        if values:
            run.curves[key] = (sorted(values), [values[i] for i in sorted(values)])
    return run


def _read_records(path: Path) -> list[dict]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):  # the training was killed while it wrote this line, or is writing it now
                break
            raise DataError(f'{path}, line {number}: no JSON record; expected a .log.json file') from None
    if not all(isinstance(record, dict) for record in records):
        raise DataError(f'{path}: expected one JSON object a line')
    return records


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values."""
    means = []
    for i in range(len(values)):
        part = values[max(0, i - window + 1):i + 1]
        means.append(sum(part) / len(part))
    return means


def choose_keys(runs: Sequence[Run], patterns: Sequence[str] | None) -> list[str]:
    """Keys to draw, in the order of ``patterns``.

    Raises:
        ConfigError: a pattern that no run has.
    """
    known = sorted({key for run in runs for key in run.curves})
    chosen: dict[str, None] = {}
    for pattern in patterns or _DEFAULT_KEYS:
        found = [key for key in known if fnmatchcase(key, pattern)]
        if not found and patterns:
            raise ConfigError(f"--keys: no run has '{pattern}'{nearest(pattern, known)}")
        chosen.update(dict.fromkeys(found))
    if not chosen:
        raise ConfigError(f'--keys: name what to draw; the runs have {", ".join(known) or "nothing"}')
    return list(chosen)


def draw(runs: Sequence[Run], keys: Sequence[str], out: Path, window: int, log_scale: bool, title: str | None) -> None:
    """One panel a key, one curve a run."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = math.ceil(len(keys) / _COLUMNS)
    columns = math.ceil(len(keys) / rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False,
                                   layout='constrained')
    for axis, key in zip(axes.flat, keys):
        for i, run in enumerate(runs):
            if key not in run.curves:
                continue
            iterations, values = run.curves[key]
            colour = f'C{i % 10}'
            if key in run.evaluated:
                axis.plot(iterations, values, marker='o', markersize=4, color=colour, label=run.name)
                continue
            if key == 'lr':
                axis.plot(iterations, values, color=colour, linewidth=1.4, label=run.name)
                continue
            if window > 1:
                axis.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(iterations, smooth(values, window), color=colour, linewidth=1.4, label=run.name)
        axis.set_title(key)
        if key.startswith(_SHARES):
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
        if log_scale and key.rpartition('.')[2].startswith(('loss', 'r0_', 'r1_')):
            axis.set_yscale('log')
    for axis in axes.flat[len(keys):]:
        axis.remove()
    axes.flat[0].legend()
    if title:
        figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def print_table(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Last, smallest and largest value of every key, and the mean time of an iteration."""
    from rich.table import Table

    table = Table()
    for column in ('run', 'key', 'points', 'last', 'at', 'smallest', 'at', 'largest', 'at'):
        table.add_column(column, justify='left' if column in ('run', 'key') else 'right')
    for run in runs:
        for key in (*keys, 'time'):
            if key not in run.curves:
                continue
            iterations, values = run.curves[key]
            cells = []
            for position in (len(values) - 1, values.index(min(values)), values.index(max(values))):
                cells += [f'{values[position]:.4g}', str(iterations[position])]
            table.add_row(run.name, key, str(len(values)), *cells)
    table_console().print(table)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--keys', nargs='+', metavar='KEY', help=f'what to draw (default {" ".join(_DEFAULT_KEYS)})')
    parser.add_argument('--legend', nargs='+', metavar='NAME', help='names of the runs (default: their paths)')
    parser.add_argument('--out', type=Path, default=Path('curves.png'),
                        help='picture, .png, .svg or .pdf (default %(default)s)')
    parser.add_argument('--smooth', type=int, default=1, metavar='N', help='mean over the last N records')
    parser.add_argument('--log-scale', action='store_true', help='losses on a logarithmic axis')
    parser.add_argument('--title')
    parser.add_argument('--table', action='store_true', help='print a table instead of drawing')
    args = parser.parse_args()
    try:
        if args.legend and len(args.legend) != len(args.runs):
            raise ConfigError(f'--legend: {len(args.legend)} names for {len(args.runs)} runs')
        if args.smooth < 1:
            raise ConfigError(f'--smooth: expected at least 1, got {args.smooth}')
        runs = [read_run(path, name) for path, name in zip(args.runs, args.legend or map(str, args.runs))]
        keys = choose_keys(runs, args.keys)
    except (ConfigError, DataError) as error:
        sys.exit(f'error: {error}')
    if args.table:
        print_table(runs, keys)
    else:
        draw(runs, keys, args.out, args.smooth, args.log_scale, args.title)
        print(f'{args.out}: {", ".join(keys)}')


if __name__ == '__main__':
    main()
