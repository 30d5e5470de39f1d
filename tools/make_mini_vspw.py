"""Writes the mini data set of the demo: VSPW's format, 12 classes, 160 x 120, made from a seed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.datasets.mini_vspw import SPLITS, write_mini_vspw

EXAMPLES = """examples:
  python tools/make_mini_vspw.py
  python tools/make_mini_vspw.py data/other_mini --seed 1
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', nargs='?', type=Path, default=Path('data/mini_vspw'), help='folder to write to')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same files')
    parser.add_argument('--overwrite', action='store_true', help='write although the folder holds a data set')
    args = parser.parse_args(arguments)
    if (args.root / 'train.txt').exists() and not args.overwrite:
        sys.exit(f'{args.root} holds a data set already; give another folder or --overwrite')
    with Progress(transient=True) as bar:
        task = bar.add_task('videos', total=sum(videos for videos, _ in SPLITS.values()))
        write_mini_vspw(args.root, args.seed, progress=lambda _: bar.advance(task))
    for split, (videos, frames) in SPLITS.items():
        print(f'{split}: {videos} videos of {frames} frames')
    print(f'written to {args.root}')


if __name__ == '__main__':
    main()
