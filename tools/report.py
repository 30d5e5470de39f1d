"""Makes one self-contained HTML page of a test, or compares two tests in one page.

A RUN is a page that tools/test.py --report has written (or its folder), or predictions on disk, scored against the
test set of --config: a folder of PNG files, <video>/<frame>.png with training labels, or what tools/test.py --out has
written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apis.sinks import load_results, result_files
from mmseg.apps.report import left_out, read_predictions, read_report, report_page, run_of_predictions, write_report
from mmseg.config import OptionsAction, config_inputs, load_config
from mmseg.datasets import VideoDataset, build_dataset
from mmseg.utils.cli import ArgumentParser, run_all, run_tool
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting, write_atomically

EXAMPLES = r"""examples:
  # two models, side by side
  python tools/test.py CONFIG1.py CKPT1.pth --report reports/one_frame
  python tools/test.py CONFIG2.py CKPT2.pth --report reports/clips
  python tools/report.py reports/one_frame reports/clips --out reports/compared

  # predictions of any project, as PNG files
  python tools/report.py predictions/ --config local_configs/themask/video_themask_mit_b1.py --out reports/theirs
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='one, or two to be compared')
    parser.add_argument('--out', type=Path, required=True, help='folder for index.html')
    parser.add_argument('--names', nargs='+', help='names of the runs; default: those they have, or their folders')
    parser.add_argument('--config', help='config file whose data.test holds frames and masks of predictions')
    OptionsAction.add_to(parser)
    parser.add_argument('--videos', type=int, default=2, help='players of the worst, median and best videos, each')
    parser.add_argument('--frames', type=int, default=48, help='of a player at most')
    parser.add_argument('--max-mib', type=float, default=16, help='size of the page at most')
    parser.add_argument('--json', type=Path, help='write the scores of the first run to this file too')
    args = parser.parse_args(argv)
    if len(args.runs) > 2 or (args.names and len(args.names) != len(args.runs)):
        raise ConfigError('expected one or two runs, and as many --names as runs')
    if args.videos < 0 or args.frames < 1:
        raise ConfigError(f'--videos, --frames: expected at least 0 and 1, got {args.videos} and {args.frames}')
    if not 0 < args.max_mib < math.inf:
        raise ConfigError(f'--max-mib: expected a number above 0, got {args.max_mib}')
    return args


def read_run(path: Path, name: str | None, dataset: VideoDataset | None, args: argparse.Namespace) -> dict[str, Any]:
    """A run from a page or from predictions."""
    if path.suffix == '.html' or report_page(path).is_file():
        run = read_report(path)[0]
        return {**run, 'name': name or run['name']}
    if dataset is None:
        raise ConfigError(f"'{path}' is no report; predictions need --config")
    if path.suffix.lower() == '.npz' or result_files(path):
        predictions = load_results(path)
    else:
        predictions = read_predictions(path, dataset)
    return run_of_predictions(dataset, predictions, name or path.stem, per_group=args.videos, max_frames=args.frames)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the page; returns the exit status."""
    return run_tool(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Makes the page as ``args`` says."""
    page = report_page(args.out)
    files = {f"run '{path}'": file for path in args.runs
             for file in (path, report_page(path), *result_files(path).values())}
    refuse_overwriting({'--out': page, '--json': args.json}, {**config_inputs(args.config), **files})
    refuse_overwriting({'--json': args.json}, {'page of --out': page})
    dataset = None
    if args.config:
        dataset = build_dataset(load_config(args.config, args.options).data.test, where='data.test')
        if not dataset.has_masks:
            raise DataError(f"split '{dataset.split}' of {dataset.data_root} has no masks to score against")
    names = args.names or [None] * len(args.runs)
    runs = [read_run(path, name, dataset, args) for path, name in zip(args.runs, names)]
    for shown in runs:
        if left_out(shown):
            print(f"run '{shown['name']}' has left out {left_out(shown)}", file=sys.stderr)
    steps: list[Callable[[], object]] = [partial(write_report, runs, args.out, args.max_mib)]
    if args.json:
        steps.insert(0, partial(write_atomically, args.json, json.dumps(runs[0]['results'], indent=1)))
    run_all(*steps)
    print(f'{page} ({page.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    sys.exit(main())
