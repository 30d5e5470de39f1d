"""Scores predictions in PNG files: ``python -m mmseg.core.evaluation PRED_DIR GT_DIR --num-classes K``.

With ``--data CONFIG`` in place of both, ground truth is that of a data set, whatever its masks hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg.core.evaluation import ConsistencyOptions, Results, StreamingMetrics
from mmseg.core.evaluation.results import CSV_FILES
from mmseg.utils.cli import INTERRUPTED, ArgumentParser, run_all, run_tool
from mmseg.utils.console import table_console
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import read_lines, refuse_overwriting
from mmseg.utils.images import read_frame, read_mask
from mmseg.utils.names import natural_key, some
from mmseg.utils.signals import Interruption, leave_signals_to_the_parent

EPILOG = """layouts (both folders, one may differ from the other):
  DIR/<video>/<frame>.png        label maps, 8-bit, grey or palette
  DIR/<video>/mask/<frame>.png   VSPW's data folder

A video may lie deeper; its name is then <folder>/<video>.  Frames count in natural order (frame_2 before frame_10).

The videos of PRED_DIR are scored (or those of --videos), and of these every frame of GT_DIR must have a prediction.
Ground truth of --data CONFIG is the set of data.test, with its layout, label map, colours, and unlabelled frames.
Predictions hold 0..K-1.  Ground truth holds 0..K-1 and 255 = void, or with --reduce-zero-label, as VSPW's files do,
1..K, with 0 and 255 = void.

examples:
  python -m mmseg.core.evaluation work_dirs/b1/png data/vspw/VSPW_480p/data --num-classes 124 --reduce-zero-label
  python -m mmseg.core.evaluation work_dirs/b1/png --data local_configs/themask/cityscapes_video_mit_b1.py
  python -m mmseg.core.evaluation preds gt --num-classes 11 --json scores.json --csv scores --per-class
"""


Videos = dict[str, list[tuple[str, Path, Path | None]]]
"""For each video its frames in order: (name, prediction, ground truth); None for a frame without labels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = _parser().parse_args(argv)
    with Interruption('stopping') as interruption:
        status = run_tool(lambda: _run(args, interruption))
    return interruption.status if status == INTERRUPTED else status


def _run(args: argparse.Namespace, interruption: Interruption) -> None:
    with interruption.raising():
        try:
            results = _results(args)
        except ValueError as error:  # of the metrics, which know no options and no files
            raise DataError(str(error)) from None
        results.check_scored()
        files = [(results.to_json, args.json), (results.to_csv, args.csv)]
        run_all(*(partial(write, path) for write, path in files if path),
                partial(results.print, per_class=args.per_class, per_video=args.per_video))


def _results(args: argparse.Namespace) -> Results:
    from rich.progress import track

    if args.jobs < 1:
        raise ConfigError(f'--jobs: expected at least 1, got {args.jobs}')
    truth = _of_data_set(args) if args.data else _of_folder(args)
    make = partial(
        StreamingMetrics, truth.num_classes, reduce_zero_label=truth.reduce_zero_label, extras=args.extras,
        consistency=ConsistencyOptions(
            tuple(args.vc), last_window=args.vc_last_window, min_frames=args.vc_min_frames,
            remap_void=args.vc_remap_void),
        class_names=read_lines(args.class_names) if args.class_names else truth.class_names)
    metrics = make()
    if metrics.needs_images and not args.images:
        raise ConfigError('TC follows the optical flow: give the frames by --images DIR')
    videos = _videos(args.pred_dir, truth, read_lines(args.videos) if args.videos else None)
    _refuse_overwriting(args, videos)
    states = _score_all(partial(_score, make, truth.read, args.images), videos, args.jobs)
    for state in track(states, 'videos', len(videos), console=table_console(stderr=True), transient=True):
        metrics.merge(state)
    return metrics.results()


def _refuse_overwriting(args: argparse.Namespace, videos: Videos) -> None:
    inputs = {'list of --videos': args.videos, 'list of --class-names': args.class_names}
    if args.json:
        inputs |= {f'label map {path}': path for frames in videos.values() for _, *both in frames for path in both
                   if path is not None}
    outputs = {f'--csv ({name})': args.csv / name for name in CSV_FILES} if args.csv else {}
    refuse_overwriting({'--json': args.json, **outputs}, inputs)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog='python -m mmseg.core.evaluation', description=__doc__, epilog=EPILOG)
    parser.add_argument('pred_dir', type=Path, metavar='PRED_DIR')
    parser.add_argument('gt_dir', type=Path, metavar='GT_DIR', nargs='?')
    parser.add_argument('--num-classes', type=int, metavar='K')
    parser.add_argument('--data', type=Path, metavar='CONFIG',
                        help='ground truth is data.test of this config; replaces GT_DIR, --num-classes and '
                        '--reduce-zero-label')
    parser.add_argument('--reduce-zero-label', action='store_true', help='ground truth as in the files of VSPW')
    parser.add_argument('--videos', type=Path, metavar='FILE', help='score these videos (one a line, such as val.txt)')
    parser.add_argument('--class-names', type=Path, metavar='FILE', help='one name a line, for the per-class results')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all results, as fractions')
    parser.add_argument('--csv', type=Path, metavar='DIR', help='write summary.csv, classes.csv and videos.csv')
    parser.add_argument('--per-class', action='store_true', help='print the classes that occur')
    parser.add_argument('--per-video', action='store_true', help='print the videos')
    parser.add_argument('--jobs', type=int, default=min(8, os.cpu_count() or 1), help='processes (default %(default)s)')
    group = parser.add_argument_group('video consistency', 'the defaults count as the official VSPW script does')
    group.add_argument('--vc', type=int, nargs='*', default=[8, 16], metavar='N', help='window lengths (default 8 16)')
    group.add_argument('--vc-last-window', action='store_true', help='count all L-n+1 windows instead of L-n')
    group.add_argument('--vc-min-frames', type=int, default=0, metavar='N',
                       help='leave out videos with fewer frames; 17 skips videos of <= 16 frames for VC8 too')
    group.add_argument('--extras', nargs='+', default=[], metavar='M',
                       help='optional, not part of the benchmark: VEC<n> (class-wise IoU of the regions that persist '
                       'over n frames), TC (IoU with the prediction before, moved along the optical flow)')
    group.add_argument('--images', type=Path, metavar='DIR', help='frames: DIR/<video>[/origin]/<frame>.jpg or .png')
    group.add_argument('--vc-remap-void', action='store_true', help='0 and 255 of the ground truth are one label')
    return parser


@dataclass(frozen=True)
class Truth:
    """Where ground truth lies, and what it means.

    Attributes:
        place: what it is called in messages.
        files: for each video the folder of its label maps, in the order of the videos.
        frames: the label map of each frame of a video.
        read: label map from a file, as the video consistency compares it.
        num_classes: K.
        reduce_zero_label: label maps are as in the files of VSPW.
        class_names: names, where they are known.
        sparse: frames may lack a label map.
    """

    place: str
    files: Mapping[str, Path]
    frames: Callable[[str], dict[str, Path]]
    read: Callable[[str], np.ndarray]
    num_classes: int
    reduce_zero_label: bool
    class_names: Sequence[str] | None = None
    sparse: bool = False


def _of_folder(args: argparse.Namespace) -> Truth:
    if args.gt_dir is None or args.num_classes is None:
        raise ConfigError('expected PRED_DIR GT_DIR --num-classes K, or PRED_DIR --data CONFIG')
    folders = _folders(args.gt_dir)
    return Truth(str(args.gt_dir), folders, lambda video: _frames(folders[video]), read_mask, args.num_classes,
                 args.reduce_zero_label)


def _of_data_set(args: argparse.Namespace) -> Truth:
    if args.gt_dir is not None or args.num_classes is not None or args.reduce_zero_label:
        raise ConfigError('--data says where ground truth lies, how many classes there are, and what masks hold: leave '
                          'out GT_DIR, --num-classes and --reduce-zero-label')
    from mmseg.apps.check_dataset import SplitToCheck  # these import torch, which scoring starts without
    from mmseg.config import load_config, required

    splits = SplitToCheck.from_config(required(load_config(args.data), 'data.test'), 'data.test')
    if len(splits) != 1:
        raise ConfigError(f'data.test of {args.data}: expected one test set, got {len(splits)}')
    files = splits[0].files
    return Truth(
        f"split '{files.name}' of {files.data_root}",
        {video: Path(files.folder('masks', video)) for video in files.videos()},
        lambda video: {frame: Path(files.path('masks', video, frame)) for frame in files.files('masks', video) or ()},
        partial(_compared, files.labels), len(files.classes), files.labels.reduce_zero_label, files.classes,
        files.unlabelled != 'error')


def _compared(rule: Any, path: str) -> np.ndarray:
    return rule.read(path)[1]


def _videos(pred_dir: Path, truth: Truth, names: list[str] | None) -> Videos:
    preds, videos = _folders(pred_dir), {}
    for name in preds if names is None else names:
        for place, found in ((pred_dir, preds), (truth.place, truth.files)):
            if name not in found:
                raise DataError(f"video '{name}' is not in {place}, whose videos are {some(list(found))}")
        pred, gt = _frames(preds[name]), truth.frames(name)
        missing_in = {preds[name]: gt.keys() - pred.keys()}
        if not truth.sparse:
            missing_in[truth.files[name]] = pred.keys() - gt.keys()
        for where, missing in missing_in.items():
            if missing:
                raise DataError(f'{where}: {len(missing)} of {len(pred.keys() | gt.keys())} frames are missing, '
                                f'the first is {min(missing, key=natural_key)}.png')
        videos[name] = [(frame, pred[frame], gt.get(frame)) for frame in sorted(pred, key=natural_key)]
    left = [name for name in truth.files if name not in videos]
    if left and names is None:
        print(f'{len(left)} videos of {truth.place} have no prediction and are not scored: {some(left)}',
              file=sys.stderr)
    return videos


def _folders(root: Path) -> dict[str, Path]:
    """Video name (``v``, ``city/v``) -> folder of its PNG files; at least one."""
    videos = {}
    for folder, inside, files in os.walk(root, onerror=_raise, followlinks=True):
        name = Path(folder).relative_to(root).as_posix()
        inside[:] = [n for n in inside if not n.startswith('.') and not _leads_back(os.path.join(folder, n))]
        if 'mask' in inside and name != '.':
            videos[name] = Path(folder) / 'mask'
            inside.clear()
        elif name != '.' and any(_is_label_map(file) for file in files):
            videos[name] = Path(folder)
    if not videos:
        raise DataError(f'{root} holds no videos: expected folders <video>/<frame>.png')
    return {name: videos[name] for name in sorted(videos, key=natural_key)}


def _raise(error: OSError) -> None:
    raise error


def _leads_back(folder: str) -> bool:
    """Whether a link leads to a folder that it lies in: a walk would not end."""
    target = os.path.realpath(folder)
    return os.path.islink(folder) and os.path.commonpath([target, os.path.realpath(os.path.dirname(folder))]) == target


def _is_label_map(name: str) -> bool:
    return name.endswith('.png') and not name.startswith('.')


def _frames(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.iterdir() if _is_label_map(path.name)}


def _score_all(score: partial[dict[str, Any]], videos: Videos, jobs: int) -> Iterator[dict[str, Any]]:
    """The counts of every video, made in ``jobs`` processes."""
    jobs = min(jobs, len(videos))
    if jobs == 1:
        yield from map(score, videos.items())
        return
    with ProcessPoolExecutor(jobs, initializer=leave_signals_to_the_parent) as pool:
        try:
            yield from pool.map(score, videos.items())
        except BrokenExecutor:
            raise DataError('a process that scores was killed; where memory ran out, take fewer --jobs') from None
        except BaseException:  # the videos that are being scored are not waited for
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _score(make: partial[StreamingMetrics], read: Callable[[str], np.ndarray], images: Path | None,
           video: tuple[str, list[tuple[str, Path, Path | None]]]) -> dict[str, Any]:
    name, frames = video
    metrics = make(videos={name: [frame for frame, _, _ in frames]})
    for frame, pred, gt in frames:
        image = _read_image(images, name, frame) if images and metrics.needs_images else None
        metrics.update(name, frame, read_mask(str(pred)), None if gt is None else read(str(gt)), image)
    return metrics.state()


def _read_image(root: Path, video: str, frame: str) -> np.ndarray:
    for folder in (root / video / 'origin', root / video):
        for path in (folder / f'{frame}.jpg', folder / f'{frame}.png'):
            if path.exists():
                return read_frame(str(path))
    raise DataError(f'{root / video}: no frame {frame}.jpg or .png, nor in origin/')
