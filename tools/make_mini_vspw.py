"""Writes the mini data set of the demo: VSPW's format, 12 classes, 160 x 120, made from a seed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apps.mini_vspw import SPLITS, write_mini_vspw
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.errors import ConfigError

EXAMPLES = """examples:
  python tools/make_mini_vspw.py
  python tools/make_mini_vspw.py data/other_mini --seed 1
"""


def refuse_what_is_there(root: Path, overwrite: bool) -> None:
    """Refuses a folder that holds another data set, and without ``overwrite`` one of this tool's, too."""
    for split in SPLITS:
        path = root / f'{split}.txt'
        if path.exists() and not re.fullmatch(rf'({split}_\d{{3}}\n)*', path.read_text(errors='replace')):
            raise ConfigError(f'{path} names videos that this tool did not make; give another folder')
    if not overwrite and (root / f'{next(iter(SPLITS))}.txt').exists():  # is written last
        raise ConfigError(f'{root} holds a data set already; give another folder or --overwrite')


def make(root: Path, seed: int, overwrite: bool) -> None:
    """Writes the data set and says so."""
    if seed < 0:
        raise ConfigError(f'--seed: expected a whole number >= 0, got {seed}')
    refuse_what_is_there(root, overwrite)
    with Progress(transient=True) as bar:
        task = bar.add_task('videos', total=sum(videos for videos, _ in SPLITS.values()))
        write_mini_vspw(root, seed, progress=lambda _: bar.advance(task))
    for split, (videos, frames) in SPLITS.items():
        print(f'{split}: {videos} videos of {frames} frames')
    print(f'written to {root}')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('root', nargs='?', type=Path, default=Path('data/mini_vspw'), help='folder to write to')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same files')
    parser.add_argument('--overwrite', action='store_true', help='write although the folder holds this data set')
    args = parser.parse_args(arguments)
    return run_tool(lambda: make(args.root, args.seed, args.overwrite))


if __name__ == '__main__':
    sys.exit(main())
