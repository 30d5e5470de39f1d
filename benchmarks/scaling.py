"""Time and peak memory against clip length, image size and number of targets.

    python -m benchmarks.scaling --plot docs/scaling.png
    python -m benchmarks.scaling --axis size --work train --json train.json
    python -m benchmarks.scaling --as-tools --json tools.json
    python -m benchmarks.scaling --from train.json tools.json --plot docs/scaling.png

One of the three grows, the others stay: clip length and number of targets (classes that are present in the clip) grow
at the first of ``--sizes``, image size at one frame; there are 6 targets where their number stays.  Three things are
measured: evaluation (frames to label maps), matching and losses alone (forward and backward, for random predictions of
ten stages), and a training step (losses, backward, clipping, AdamW; no checkpointing), all in float32.

Each point runs in a process of its own: first two runs for the peak of memory above the loaded model and its input,
then timed runs, of which the fastest counts (what else a machine does can only add to a time).  Each growth is over the
row above, and stands beside that of the input.  A growth that stays at or below the input's is what a reader looks for;
"each more" is the price of what was added to the row above, which a constant part does not blur.

Two things may grow faster than the input.  On a CPU, time for new pages: the C library gives large tensors back to the
system when they die, and the kernel clears new pages for the next ones, so large tensors cost more than their share.
CPU time in the kernel stands beside the time; with ``--as-tools``, which sets the allocator as ``tools/test.py`` and
``tools/train.py`` do (:mod:`mmseg.utils.allocator`), most of it goes.  And, by design, MiT's attention: its keys and
values are a map reduced by R = 8, 4, 2, 1 in its four stages, so N pixels of a stage cost N * N / R^2 products
(SegFormer, arXiv 2105.15203), though not as much memory, as no scores are kept.  A table of counted operations shows
how much that is.

``--json`` writes a list of rows ``{axis, work, allocator, frames, height, width, targets, amount, ms, kernel_ms,
peak_mib, amount_growth, ms_growth, peak_growth, ms_per_unit, mib_per_unit, gflop, attention_gflop}``; amount is frames,
megapixels or targets, the growths of a first row and the operations outside evaluation are null.  The default takes
about ten minutes on two cores and 10 GB of memory; a smaller backbone, fewer ``--sizes`` and single ``--work`` take
less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/scaling.py`

import numpy as np
import torch
from torch import Tensor

from benchmarks import speed
from mmseg.config import load_config
from mmseg.models.backbones import MixTransformer
from mmseg.utils import allocator
from tools.get_flops import count

WORKS = {'eval': 'evaluation', 'losses': 'matching and losses', 'train': 'training step'}
AXES = {'frames': 'clip length', 'size': 'image size', 'targets': 'number of targets'}
UNITS = {'frames': 'frame', 'size': 'Mpixel', 'targets': 'target'}
TARGETS = 6
FASTER = 1.1  # a growth counts as faster than the input's beyond this; a few rounds are no better
Row = dict[str, Any]
Series = tuple[str, str, str]  # axis, work, allocator


@dataclass(frozen=True)
class Point:
    """What is measured once.

    Attributes:
        axis: which of the three grows, a key of :data:`AXES`.
        work: what is done, a key of :data:`WORKS`.
        frames: of the clip.
        height: of a frame.
        width: of a frame.
        targets: classes in the clip.
    """

    axis: str
    work: str
    frames: int
    height: int
    width: int
    targets: int

    @property
    def amount(self) -> float:
        """What grows: frames, megapixels of a frame, or targets."""
        return {'frames': self.frames, 'size': self.height * self.width / 1e6, 'targets': self.targets}[self.axis]

    def __str__(self) -> str:
        return f'{self.frames} x {self.height}x{self.width}, {self.targets} targets, {WORKS[self.work]}'


def points_of(args: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for; evaluation knows no targets."""
    base = args.sizes[0]
    sizes = {
        'frames': [(frames, base, TARGETS) for frames in args.frames],
        'size': [(1, size, TARGETS) for size in args.sizes],
        'targets': [(2, base, targets) for targets in args.targets],
    }
    return [
        Point(axis, work, frames, height, width, targets)
        for axis in args.axis
        for work in args.work
        if (axis, work) != ('targets', 'eval')
        for frames, (height, width), targets in sizes[axis]
    ]


def grid_labels(targets: int, frames: int, height: int, width: int) -> Tensor:
    """Labels ``[1, frames, height, width]`` with exactly so many classes: cells of a grid that moves sideways."""
    side = math.ceil(math.sqrt(targets))
    rows = np.arange(height) * side // height
    columns = [(np.arange(width) + 4 * t) % width * side // width for t in range(frames)]
    cells = rows[:, None] * side + np.stack(columns)[:, None]
    return torch.from_numpy(cells % targets)[None]


def run_of(args: argparse.Namespace, point: Point) -> speed.Run:
    """The function to measure, with everything it needs already built."""
    frames, height, width = point.frames, point.height, point.width
    labels = grid_labels(point.targets, frames, height, width).to(args.device)
    if point.work == 'losses':
        return speed.losses_run(args, 'ours', labels)
    model = speed.model_of(args, 'video', frames)
    clip = speed.clip_of(args, frames, height, width)
    if point.work == 'train':
        return speed.train_run(args, model.train(), clip, labels)
    return speed.eval_run(model.eval(), clip, (height, width))


def measure(args: argparse.Namespace, point: Point) -> Row:
    """``ms``, ``kernel_ms`` and ``peak_mib`` (``None`` where the system does not tell) of a point, in this process."""
    run = run_of(args, point)
    if speed.tells_memory():
        peak = speed.own_peak(run, args.device)
    else:
        run(), run()
        peak = None
    rounds: list[tuple[float, float]] = []  # seconds, and of all threads those in the kernel
    while len(rounds) < args.rounds and sum(wall for wall, _ in rounds) < args.seconds:
        speed.synchronise(args.device)
        start, kernel = time.perf_counter(), os.times().system
        run()
        speed.synchronise(args.device)
        rounds.append((time.perf_counter() - start, os.times().system - kernel))
    wall, kernel = min(rounds)
    return {'ms': 1000 * wall, 'kernel_ms': 1000 * kernel, 'peak_mib': peak}


def measure_apart(args: argparse.Namespace, point: Point) -> Row:
    """:func:`measure` in a process of its own."""
    options = ['--backbone', args.backbone, '--device', args.device]
    options += ['--rounds', str(args.rounds), '--seconds', str(args.seconds)]
    if args.threads:
        options += ['--threads', str(args.threads)]
    if args.as_tools:
        options.append('--as-tools')
    return json.loads(speed.in_fresh_process('benchmarks.scaling', [*options, '--point', json.dumps(asdict(point))]))


def operations(backbone: str, point: Point) -> Row:
    """GFLOP of an evaluation up to the scores, and of them in MiT's attention (two products of N x N / R^2)."""
    cfg = load_config(speed.CONFIGS / f'video_themask_{backbone}.py', {'model.pretrained': None})
    total = count(cfg, point.frames, (point.height, point.width))['total']['flops']
    with torch.device('meta'):
        mit = speed.model_of(argparse.Namespace(backbone=backbone, device='meta'), 'video', point.frames).backbone
    return {'gflop': total / 1e9, 'attention_gflop': point.frames * attention_flops(mit, point) / 1e9}


def attention_flops(mit: MixTransformer, point: Point) -> int:
    """FLOPs of query times key and weights times value in all blocks, for one frame."""
    flops = 0
    for stage, (channels, stride) in enumerate(zip(mit.out_channels, mit.out_strides), 1):
        height, width = math.ceil(point.height / stride), math.ceil(point.width / stride)
        for block in getattr(mit, f'block{stage}'):
            keys = (height // block.attn.sr_ratio) * (width // block.attn.sr_ratio)
            flops += 2 * 2 * channels * height * width * keys
    return flops


def with_growth(rows: Sequence[Row]) -> list[Row]:
    """The rows with growths over the row above in the same series, and figures of one unit."""
    complete: list[Row] = []
    above: dict[Series, Row] = {}
    for row in rows:
        last = above.get(series_key(row))
        growths = {
            f'{name}_growth': ratio(row[field], None if last is None else last[field])
            for name, field in (('amount', 'amount'), ('ms', 'ms'), ('peak', 'peak_mib'))
        }
        units = {'ms_per_unit': row['ms'] / row['amount'], 'mib_per_unit': ratio(row['peak_mib'], row['amount'])}
        complete.append({**row, **growths, **units})
        above[series_key(row)] = row
    return complete


def ratio(value: float | None, other: float | None) -> float | None:
    """``value / other`` where both are known and the other is not zero."""
    return None if value is None or not other else value / other


def series_key(row: Row) -> Series:
    """What the rows of a series share."""
    return row['axis'], row['work'], row['allocator']


def series_of(rows: Sequence[Row]) -> dict[Series, list[Row]]:
    """Rows by series, axes and works in the order of the tables at the top, the default allocator first."""
    keys = {series_key(row) for row in rows}
    order = {name: place for place, name in enumerate((*AXES, *WORKS, 'default'))}
    ordered = sorted(keys, key=lambda key: [(order.get(name, len(order)), name) for name in key])
    return {key: [row for row in rows if series_key(row) == key] for key in ordered}


def table(axis: str, work: str, setting: str, rows: Sequence[Row]) -> list[str]:
    """One series as Markdown."""
    unit, first = UNITS[axis], rows[0]
    fixed = {
        'frames': f'{first["height"]}x{first["width"]}',
        'size': f'{first["frames"]} frame',
        'targets': f'{first["frames"]} frames of {first["height"]}x{first["width"]}',
    }[axis]
    lines = [
        f'{WORKS[work].capitalize()} against {AXES[axis]} ({fixed}{told(setting)}):',
        '',
        f'| {unit}s | growth | time | growth | a {unit} | each more | in kernel | peak memory | growth | a {unit} |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for row, above in zip(rows, [None, *rows]):
        amount = f'{row["amount"]:.3g}' + (f' ({row["height"]}x{row["width"]})' if axis == 'size' else '')
        more = above and (row['ms'] - above['ms']) / (row['amount'] - above['amount'])
        cells = [
            amount, times(row['amount_growth']), f'{row["ms"]:.0f} ms', times(row['ms_growth']),
            f'{row["ms_per_unit"]:.0f} ms', '' if more is None else f'{more:.0f} ms', f'{row["kernel_ms"]:.0f} ms',
            mebibytes(row['peak_mib']), times(row['peak_growth']), mebibytes(row['mib_per_unit']),
        ]  # fmt: skip
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def told(setting: str) -> str:
    """The allocator for a title, where it is not the default."""
    return '' if setting == 'default' else f'; allocator {setting}'


def times(growth: float | None) -> str:
    """A factor for a table."""
    return '' if growth is None else f'{growth:.2f}x'


def mebibytes(amount: float | None) -> str:
    """An amount of memory for a table."""
    return '' if amount is None else f'{amount:.0f} MiB'


def operations_table(rows: Sequence[Row]) -> list[str]:
    """Counted operations of the evaluation against image size: what grows with the pixels, and what faster."""
    lines = [
        'Counted operations of the evaluation of a frame:',
        '',
        '| image | GFLOP | a Mpixel | in the attention of MiT | share | a Mpixel without it |',
        '|---|---|---|---|---|---|',
    ]
    for row in rows:
        total, attention, amount = row['gflop'], row['attention_gflop'], row['amount']
        cells = [
            f'{row["height"]}x{row["width"]}', f'{total:.0f}', f'{total / amount:.0f}', f'{attention:.1f}',
            f'{attention / total:.0%}', f'{(total - attention) / amount:.0f}',
        ]  # fmt: skip
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def summary(axis: str, work: str, setting: str, rows: Sequence[Row]) -> str:
    """Growth of one series from its first row to its last."""
    first, last = rows[0], rows[-1]
    grown = ratio(last['amount'], first['amount']) or 1.0
    text = f'* {WORKS[work]}, {AXES[axis]}{told(setting)}: {grown:.3g}x the input'
    for name, field in (('time', 'ms'), ('memory', 'peak_mib')):
        growth = ratio(last[field], first[field])
        if growth is not None:
            text += f', {growth:.3g}x the {name}' + (' (**faster than the input**)' if growth > FASTER * grown else '')
    return text


def report(rows: Sequence[Row]) -> str:
    """All tables and the summary as Markdown."""
    series = series_of(rows)
    parts = [table(*key, own) for key, own in series.items()]
    counted = next((own for key, own in series.items() if key[:2] == ('size', 'eval')), None)
    if counted:
        parts.append(operations_table(counted))
    parts.append([summary(*key, own) for key, own in series.items()])
    return '\n\n'.join('\n'.join(part) for part in parts)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time and memory against each of the three; dashed: growing as the input does, dotted: other allocators."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    series = series_of(rows)
    axes = [axis for axis in AXES if any(axis == key[0] for key in series)]
    names = {'frames': 'frames of a clip', 'size': 'megapixels of a frame', 'targets': 'targets of a clip'}
    colours = dict(zip(WORKS, ('C0', 'C2', 'C3')))
    figure, grid = pyplot.subplots(
        2, len(axes), figsize=(3.6 * len(axes) + 0.6, 6.4), sharex='col', squeeze=False, layout='constrained'
    )
    for column, axis in enumerate(axes):
        for row, (field, scale, label) in enumerate((('ms', 1e3, 'time, s'), ('peak_mib', 1024, 'peak memory, GiB'))):
            plot = grid[row][column]
            plot.set(xscale='log', yscale='log')
            for (own_axis, work, setting), points in series.items():
                if own_axis != axis or any(not point[field] for point in points):
                    continue
                x = np.array([point['amount'] for point in points])
                y = np.array([point[field] / scale for point in points])
                if setting == 'default':
                    plot.plot(x, y, 'o-', color=colours[work], label=WORKS[work])
                    plot.plot(x, y[0] * x / x[0], '--', color=colours[work], alpha=0.4, linewidth=1)
                else:
                    plot.plot(x, y, 'o:', color=colours[work], markerfacecolor='white')
            ticks = sorted({point['amount'] for key, points in series.items() if key[0] == axis for point in points})
            plot.set_xticks(ticks, [f'{tick:.2g}' for tick in ticks])
            plot.minorticks_off()
            plot.yaxis.set_major_formatter('{x:g}')
            plot.grid(alpha=0.3)
            if row == 0:
                plot.set_title(AXES[axis])
            else:
                plot.set_xlabel(names[axis])
            if column == 0:
                plot.set_ylabel(label)
    grid[0][0].legend(fontsize='small')
    others = sorted({key[2] for key in series} - {'default'})
    notes = ['dashed: in proportion to the input, from the first point on']
    notes += [f'dotted: allocator {name}' for name in others]
    figure.supxlabel('; '.join(notes), fontsize='small', color='0.4')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def image_size(text: str) -> tuple[int, int]:
    """Reads ``HEIGHTxWIDTH``."""
    try:
        height, width = (int(part) for part in text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected HEIGHTxWIDTH, got {text!r}') from None
    if height < 32 or width < 32 or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(f'expected multiples of 32, got {text!r}')
    return height, width


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--axis', nargs='+', choices=AXES, default=list(AXES), help='what grows')
    parser.add_argument('--work', nargs='+', choices=WORKS, default=list(WORKS), help='what is measured')
    parser.add_argument('--backbone', default='mit_b1', help='mit_b0 .. mit_b5')
    parser.add_argument('--frames', nargs='+', type=int, default=[1, 2, 4, 8, 16], help='clip lengths')
    parser.add_argument(
        '--sizes', nargs='+', type=image_size, metavar='HxW', help='ascending (default: 256x448 .. 1088x1920)',
        default=[(256, 448), (384, 640), (480, 864), (736, 1280), (1088, 1920)],
    )  # fmt: skip
    parser.add_argument('--targets', nargs='+', type=int, default=[1, 4, 15, 60], help='numbers of targets')
    parser.add_argument('--rounds', type=int, default=5, help='timed runs of a point; the fastest counts')
    parser.add_argument('--seconds', type=float, default=10, help='no further round of a point after so many seconds')
    parser.add_argument('--threads', type=int, help="default: torch's own choice")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--same-process', action='store_true', help='quicker; what a point leaves behind lowers the memory of the next'
    )
    parser.add_argument('--as-tools', action='store_true', help='the allocator as the tools set it')
    parser.add_argument(
        '--from', dest='files', nargs='+', metavar='JSON', help='rows of earlier runs; measures nothing'
    )
    parser.add_argument('--json', help='write the rows to this file')
    parser.add_argument('--plot', type=Path, help='draw them into this PNG file')
    parser.add_argument('--point', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not 1 <= min(args.targets) <= max(args.targets) <= speed.CLASSES:
        parser.error(f'--targets: expected 1 to {speed.CLASSES}')
    if args.as_tools and args.same_process:
        parser.error('--as-tools: evaluation and training set it differently, so each point needs its own process')
    if args.as_tools and speed.allocator() != 'default':
        parser.error(f'--as-tools: the environment sets the allocator too: {speed.allocator()}')
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.point:
        point = Point(**json.loads(args.point))
        if args.as_tools:
            (allocator.use_huge_pages if point.work == 'eval' else allocator.keep_pages)()
        print(json.dumps(measure(args, point)))
        return
    rows: list[Row] = []
    if args.files:
        rows = [row for file in args.files for row in json.loads(Path(file).read_text())]
    else:
        print(speed.describe(args))
        points = points_of(args)
        for number, point in enumerate(points, 1):
            figures = (measure if args.same_process else measure_apart)(args, point)
            counted = {'gflop': None, 'attention_gflop': None}
            if point.work == 'eval':
                counted = operations(args.backbone, point)
            setting = 'as the tools set it' if args.as_tools else speed.allocator()
            rows.append({**asdict(point), 'allocator': setting, 'amount': point.amount, **figures, **counted})
            print(
                f'{number}/{len(points)}  {point}: {figures["ms"]:.0f} ms, {mebibytes(figures["peak_mib"])}', flush=True
            )
            if args.json:  # after every point: a run that is stopped keeps what it has measured
                Path(args.json).write_text(json.dumps(with_growth(rows), indent=1))
    rows = with_growth(rows)
    print('\n' + report(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if args.plot:
        draw(rows, args.plot)


if __name__ == '__main__':
    main()
