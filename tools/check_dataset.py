"""Reads every file of a data set, lists what is wrong with it, and counts the pixels of each class.

The target is a config file, whose data sets are checked for their clip length, or a data set's folder.  The exit status
is 0 for a clean data set (there may be warnings), 1 where something is wrong, 2 where the check could not run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apps.check_dataset import Report, SplitToCheck, check_split, same_pictures
from mmseg.config import config_inputs, load_config
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.console import table, table_console
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting, write_json
from mmseg.utils.images import VOID
from mmseg.utils.signals import Interrupted, Interruption, end_now

SPLITS = ('train', 'val', 'test', 'training', 'validation', 'train2017', 'val2017')
"""Names that data sets give their splits."""

EXAMPLES = """examples:
  python tools/check_dataset.py local_configs/themask/video_themask_mit_b5.py
  python tools/check_dataset.py data/mini_vspw --splits val --min-frames 4 --json report.json
  python tools/check_dataset.py data/cityscapes --type CityscapesVideo
"""


def splits_of(args: argparse.Namespace) -> list[SplitToCheck]:
    """The splits that the arguments ask for."""
    if args.target.suffix == '.py':
        data = load_config(str(args.target)).get('data') or {}
        found: dict[tuple[str, str], SplitToCheck] = {}
        for part in ('train', 'val', 'test'):
            for split in SplitToCheck.from_config(data[part], f'data.{part}') if part in data else ():
                found.setdefault((split.files.data_root, split.files.name), split)
        chosen = [split for split in found.values() if not args.splits or split.files.name in args.splits]
        missing = set(args.splits or ()) - {split.files.name for split in chosen}
        if missing or not chosen:
            there = ', '.join(sorted({split.files.name for split in found.values()})) or 'none'
            raise ConfigError(f'{args.target}: no split {", ".join(sorted(missing)) or "to check"}; it has {there}')
        return chosen
    described = dict(type=args.type, data_root=str(args.target))
    splits = [
        replace(split, frames_needed=args.min_frames) for name in args.splits or SPLITS
        for split in SplitToCheck.from_config({**described, 'split': name}, '--type')
        if args.splits or split.files.is_there()
    ]
    if not splits:
        raise DataError(f'{args.target}: neither a config file nor a folder with a split {", ".join(SPLITS[:-1])} or '
                        f'{SPLITS[-1]} of {args.type}; name others with --splits')
    return splits


def show(report: Report, console: Console) -> None:
    """Prints the problems of a split, its classes, and a summary."""
    for problem in report.problems:
        console.print(f'{problem.kind}: {problem.message}', style='red', highlight=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(f'warning: {warning.kind}: {warning.message}', style='yellow', highlight=False, soft_wrap=True)
    total = int(report.pixels.sum())
    names = {**dict(enumerate(report.classes)), VOID: 'void'}
    if report.raw:
        before = [(str(raw), names[label], f'{pixels:,}') for (raw, label), pixels in sorted(report.raw.items())]
        console.print(table(('in the files', 'class', 'pixels'), before, f'{report.split}: what masks hold'))
    if total:
        rows = [(name, str(label), f'{pixels:,}', f'{pixels / total:.2%}', str(report.class_videos[label]))
                for label, name in names.items() if (pixels := report.pixels[label])]
        console.print(table(('class', 'label', 'pixels', 'share', 'videos'), rows,
                            f'{report.split}: pixels and videos of each class'))
        absent = sum(not report.pixels[label] for label in range(len(report.classes)))
        if absent:
            console.print(f'{report.split}: {absent} of {len(report.classes)} classes do not occur', highlight=False)
    counts = Counter(problem.kind for problem in report.problems)
    kinds = ', '.join(f'{count} {kind}' for kind, count in counts.most_common())
    labelled = f', {report.labelled} of them labelled' if 0 < report.labelled < report.frames else ''
    console.print(
        f'{report.split}: {report.videos} videos, {report.frames} frames{labelled}, '
        f'{len(report.problems)} problems{f" ({kinds})" if kinds else ""}', highlight=False, soft_wrap=True)


def named(splits: Sequence[SplitToCheck], reports: Sequence[Report]) -> dict[str, Any]:
    """The reports by the names of their splits; two splits of one name have their folder beside it."""
    names = [report.split for report in reports]
    return {name if names.count(name) == 1 else f'{name} of {split.files.data_root}': report.to_json()
            for name, split, report in zip(names, splits, reports)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('target', type=Path, help='config file, or folder of a data set')
    parser.add_argument('--splits', nargs='+', help='splits to check; default all')
    parser.add_argument('--type', default='VSPWDataset', help='for a folder: type of the data set')
    parser.add_argument('--min-frames', type=int, default=1, help='for a folder: frames that a video must have')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='threads')
    parser.add_argument('--json', type=Path, help='write the report to this file too')
    args = parser.parse_args(arguments)
    return run_tool(lambda: check(args), failed=2)


def check(args: argparse.Namespace) -> int:
    """Checks, writes and shows what the arguments ask for; returns the exit status."""
    splits = splits_of(args)
    for split in splits if args.json is not None and args.json.exists() else ():
        inputs = {'config': args.target, **config_inputs(args.target), **split.files.inputs(args.json.resolve().name)}
        refuse_overwriting({'--json': args.json}, inputs)
    reports = []
    description = TextColumn('{task.description}', markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Interruption('stopping') as interruption:
        try:
            with interruption.raising(), Progress(
                    *columns, console=table_console(stderr=True), transient=True) as bar:
                for split in splits:
                    track = partial(bar.track, description=split.files.name)
                    reports.append(check_split(split, args.workers, track))
        except Interrupted:
            end_now(interruption.status)  # a thread may be waiting for a file that never comes
    same_pictures(reports)
    try:
        write_json(args.json, named(splits, reports))
    finally:  # what was found is shown on a full disk, too
        console = table_console()
        for report in reports:
            show(report, console)
    return int(any(report.problems for report in reports))


if __name__ == '__main__':
    sys.exit(main())
