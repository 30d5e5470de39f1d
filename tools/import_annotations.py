"""Turns annotations of a labelling tool into a data set in VSPW's layout, with classes, splits and a report.

Frames are linked, masks are palette PNGs with labels 0..K-1 and 255 for what nobody labelled.  Nothing half-written is
left: OUT appears when it is whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apps.annotations import READERS, import_annotations, import_video
from mmseg.apps.annotations.write import ImportReport
from mmseg.utils.cli import INTERRUPTED, ArgumentParser, run_tool
from mmseg.utils.console import table, table_console
from mmseg.utils.errors import ConfigError
from mmseg.utils.images import VOID
from mmseg.utils.names import some
from mmseg.utils.progress import Progress
from mmseg.utils.signals import Interruption

_Item = TypeVar('_Item')

EXAMPLES = """formats:
  coco         COCO JSON: polygons, run lengths, crowds; small objects cover large ones
  labelme      a folder of LabelMe's JSON files, in the order of the shapes
  cvat         CVAT XML 1.1 for images or videos (tracks), by z-order
  labelstudio  Label Studio's JSON: polygons, brushes, rectangles, ellipses
  voc          Pascal VOC's folders, also with CVAT's labelmap.txt
  roboflow     Roboflow's folders of splits, as COCO segmentation or as masks
  video        frames of a video file, for those who will label them

examples:
  python tools/import_annotations.py coco instances.json data/mine --images photos --split train=0.8,val=0.2
  python tools/import_annotations.py cvat task.zip_unpacked data/mine --background background
  python tools/import_annotations.py labelme labels data/mine --video-of '(?P<video>cam\\d+)_' --keep-going
  python tools/import_annotations.py video drive.mp4 data/to_label --every 10
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('format', choices=[*READERS, 'video'], help='see below')
    parser.add_argument('source', type=Path, metavar='SRC', help='file or folder with the annotations, or a video')
    parser.add_argument('out', type=Path, metavar='OUT', help='folder of the new data set')
    parser.add_argument('--images', type=Path, metavar='DIR', help='the images, if not where the format has them')
    parser.add_argument('--video-of', metavar='REGEX', help="groups 'video' and maybe 'frame' in an image's name; by "
                        'default a folder is a video, and so are names that differ in the number at their end')
    parser.add_argument('--split', metavar='SHARES', help='train=0.8,val=0.2, drawn by video, or a JSON file of lists; '
                        'by default what the format says, or all for train')
    parser.add_argument('--seed', type=int, default=0, help='of the draw (default %(default)s)')
    parser.add_argument('--background', metavar='NAME', help='class of pixels without annotation; otherwise void')
    parser.add_argument('--copy', action='store_true', help='copy frames instead of linking them')
    parser.add_argument('--keep-going', action='store_true', help='leave out what is wrong, and list it at the end')
    parser.add_argument('--every', type=int, metavar='N', help='video: every N-th frame (default 1)')
    args = parser.parse_args(arguments)
    with Interruption('stopping') as interruption:
        status = run_tool(lambda: _run(args, interruption))
    return interruption.status if status == INTERRUPTED else status


def _run(args: argparse.Namespace, interruption: Interruption) -> None:
    with interruption.raising():
        if args.format == 'video':
            report = import_video(args.source, args.out, 1 if args.every is None else args.every,
                                  lambda numbers: _track(numbers, 'frame', None))
        else:
            if args.every is not None:
                raise ConfigError('--every: goes with the format video')
            report = import_annotations(
                READERS[args.format], args.source, args.out, args.images, video_of=args.video_of, split=args.split,
                seed=args.seed, background=args.background, copy=args.copy, keep_going=args.keep_going,
                track=lambda pictures: _track(pictures, 'image', len(pictures)))
    show(report, args.out)


def _track(items: Iterable[_Item], what: str, total: int | None) -> Iterator[_Item]:
    with Progress(what, total, lambda line: print(line, file=sys.stderr)) as progress:
        for item in items:
            yield item
            progress.advance()


def show(report: ImportReport, out: Path) -> None:
    """Prints what was written, what was not and why, and how to train on it."""
    console = table_console()
    total = int(report.pixels.sum())
    if total:
        names = {**dict(enumerate(report.classes)), VOID: 'void'}
        rows = [(name, str(label), f'{report.pixels[label]:,}', f'{report.pixels[label] / total:.2%}')
                for label, name in names.items()]
        console.print(table(('class', 'label', 'pixels', 'share'), rows))
    for name, videos in report.splits.items():
        print(f'{name}: {len(videos)} videos, {sum(report.frames[video] for video in videos)} frames')
    if report.annotations:
        print('annotations: ' + ', '.join(f'{n:,} {what}' for what, n in report.annotations.most_common() if n))
    for note in report.notes:
        print(f'note: {note}')
    if report.faults:
        print(f'{len(report.faults)} entries were left out:')
        for fault in report.faults:
            print(f'  {fault}')
    if report.classes:
        print(f"written to {out}; in a config: num_classes={len(report.classes)}, and dict(type='VideoDataset', "
              f"data_root='{out}', classes='{out}/classes.json')")
    else:
        print(f'written to {out}: {some([f"{n} frames of {video}" for video, n in report.frames.items()])}')


if __name__ == '__main__':
    sys.exit(main())
