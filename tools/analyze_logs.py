"""Draws curves of losses, learning rate, speed and metrics from the JSON logs of one or several trainings."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.console import table, table_console
from mmseg.utils.errors import ConfigError, DataError, nearest
from mmseg.utils.files import refuse_overwriting, write_atomically

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
_MOST_ITERATIONS = 2**53
_PICTURES = ('.png', '.svg', '.pdf')
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
    files = log_files(path)
    if not files:
        raise DataError(f'{path}: no file *.log.json')
    points: dict[str, dict[int, float]] = defaultdict(dict)
    run = Run(name)
    for file in files:
        records = _read_records(file)
        if not records:  # of a training that had nothing left to do
            continue
        first = min(iteration for iteration, _ in records)
        for values in points.values():
            for iteration in [i for i in values if i >= first]:
                del values[iteration]
        for iteration, record in records:
            for key, value in record.items():
                number = _number(value)
                if key not in _NOT_CURVES and number is not None:
                    points[key][iteration] = number
                    if record.get('mode') == 'val':
                        run.evaluated.add(key)
    for key, values in points.items():
        if values:
            run.curves[key] = (sorted(values), [values[i] for i in sorted(values)])
    return run


def log_files(path: Path) -> list[Path]:
    """A log file, or the logs of a work dir in order of their time."""
    return sorted(path.glob('*.log.json')) if path.is_dir() else [path]


def _read_records(path: Path) -> list[tuple[int, dict]]:
    """Iteration and record of the lines that belong to one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # the training was killed while it wrote this line, or is writing it now
                break
            raise DataError(f'{path}, line {number}: no JSON record; expected a .log.json file') from None
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: expected one JSON object a line, got {type(record).__name__}')
        if 'iter' not in record:
            continue
        iteration = record['iter']
        if not isinstance(iteration, int) or isinstance(iteration, bool) or not 0 <= iteration < _MOST_ITERATIONS:
            raise DataError(f"{path}, line {number}: 'iter' should be a whole number >= 0, and is {iteration!r:.40}")
        records.append((iteration, record))
    return records


def _number(value: object) -> float | None:
    """What can be drawn of a value: null, texts and lists are no numbers."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values."""
    return [fmean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


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
            iterations, numbers = run.curves[key]
            values = [value if math.isfinite(value) else math.nan for value in numbers]  # a gap in the curve
            colour = f'C{i % 10}'
            style = dict(marker='o', markersize=4) if key in run.evaluated else dict(linewidth=1.4)
            if window > 1 and key not in run.evaluated and key != 'lr':
                axis.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
                values = smooth(values, window)
            axis.plot(iterations, values, color=colour, label=run.name, **style)
        axis.set_title(key, parse_math=False)  # a '$' in a name is a dollar sign
        if key.startswith(_SHARES):
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
        if log_scale and key.rpartition('.')[2].startswith(('loss', 'r0_', 'r1_')):
            axis.set_yscale('log')
    for axis in axes.flat[len(keys):]:
        axis.remove()
    for text in axes.flat[0].legend().get_texts():
        text.set_parse_math(False)
    if title:
        figure.suptitle(title, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=out.suffix[1:].lower())
    pyplot.close(figure)
    write_atomically(out, picture.getvalue())


def print_table(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Last, smallest and largest value of every key, and the mean time of an iteration."""
    rows = []
    for run in runs:
        for key in (*keys, 'time'):
            if key not in run.curves:
                continue
            iterations, values = run.curves[key]
            order = sorted((i for i, value in enumerate(values) if value == value), key=values.__getitem__) or [0]
            cells = [[f'{values[i]:.4g}', str(iterations[i])] for i in (-1, order[0], order[-1])]
            rows.append([run.name, key, str(len(values)), *chain(*cells)])
    columns = ('run', 'key', 'points', 'last', 'at', 'smallest', 'at', 'largest', 'at')
    table_console().print(table(columns, rows, texts=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--keys', nargs='+', metavar='KEY', help=f'what to draw (default {" ".join(_DEFAULT_KEYS)})')
    parser.add_argument('--legend', nargs='+', metavar='NAME', help='names of the runs (default: their paths)')
    parser.add_argument('--out', type=Path, default=Path('curves.png'),
                        help='picture, .png, .svg or .pdf (default %(default)s)')
    parser.add_argument('--smooth', type=int, default=1, metavar='N', help='mean over the last N records')
    parser.add_argument('--log-scale', action='store_true', help='losses on a logarithmic axis')
    parser.add_argument('--title')
    parser.add_argument('--table', action='store_true', help='print a table instead of drawing')
    args = parser.parse_args(argv)
    return run_tool(lambda: analyze(args))


def analyze(args: argparse.Namespace) -> None:
    """Draws or prints what ``args`` asks for."""
    if args.legend and len(args.legend) != len(args.runs):
        raise ConfigError(f'--legend: {len(args.legend)} names for {len(args.runs)} runs')
    if args.smooth < 1:
        raise ConfigError(f'--smooth: expected at least 1, got {args.smooth}')
    if args.out.suffix.lower() not in _PICTURES and not args.table:
        raise ConfigError(f"--out: expected a file that ends in {', '.join(_PICTURES)}, got '{args.out}'")
    runs = [read_run(path, name) for path, name in zip(args.runs, args.legend or map(str, args.runs))]
    keys = choose_keys(runs, args.keys)
    if args.table:
        print_table(runs, keys)
        return
    refuse_overwriting({'--out': args.out}, {f"log '{file}'": file for path in args.runs for file in log_files(path)})
    draw(runs, keys, args.out, args.smooth, args.log_scale, args.title)
    print(f'{args.out}: {", ".join(keys)}')


if __name__ == '__main__':
    sys.exit(main())
