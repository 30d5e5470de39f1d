"""Runs a model on a video file, a folder of frames or a camera, and writes a video, pictures or label maps.

Memory stays the same for a video of any length.  A broken frame is reported and skipped.  Ctrl-C finishes the files; a
second one ends at once.  A video grows as NAME.part.SUFFIX, which plays at any time, and takes its name at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mmseg.apis import init_segmentor
from mmseg.apps.video import VIEWS, FrameView, VideoSegmenter, classes_of
from mmseg.apps.video_io import (
    VIDEO_SUFFIXES,
    Background,
    FolderSource,
    Frame,
    Source,
    VideoWriter,
    is_video,
    open_source,
    part_of,
)
from mmseg.config import OptionsAction, config_inputs
from mmseg.utils.allocator import peak_memory, use_huge_pages
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting, user_path, write_atomically
from mmseg.utils.logger import setup_logger
from mmseg.utils.progress import Progress
from mmseg.utils.signals import Interrupted, Interruption
from mmseg.utils.visual import write_label_png, write_picture

EXAMPLES = r"""examples:
  # an overlay beside the frames, as H.264
  python tools/video_demo.py CONFIG.py CKPT.pth street.mp4 --out out.mp4 --view side-by-side --legend

  # clips of 4 frames of which neighbours share 2, scores averaged; label maps as PNG
  python tools/video_demo.py CONFIG.py CKPT.pth data/vspw/VSPW_480p/data/VIDEO/origin --labels labels/ \
      --clip-len 4 --overlap 2

  # a camera, online: every frame is labelled when it comes; Ctrl-C ends
  python tools/video_demo.py CONFIG.py CKPT.pth 0 --online --out camera.mp4 --device cuda

  # pictures from files that match a pattern, at 25 frames per second
  python tools/video_demo.py CONFIG.py CKPT.pth 'frames/*.png' --fps 25 --out pictures/
"""


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('input', help="video file, folder of images, pattern ('frames/*.jpg') or number of a camera")
    out = parser.add_argument_group('output (default: --out <name>_themask.mp4)')
    out.add_argument('--out', help=f'video ({", ".join(VIDEO_SUFFIXES)}), or a folder for pictures (NAME, NAME/)')
    out.add_argument('--labels', type=user_path, help='folder for palette PNGs of training labels')
    out.add_argument('--view', choices=VIEWS, default='overlay', help='what a picture shows')
    out.add_argument('--opacity', type=float, default=0.5, help='of the colours over the frame, 0..1')
    out.add_argument('--legend', action='store_true', help='name the classes in sight below the picture')
    out.add_argument('--image-format', choices=('jpg', 'png'), default='jpg', help='of pictures in a folder')
    out.add_argument('--crf', type=int, default=18, help='quality of the video, 0 (lossless) to 51')
    out.add_argument('--json', type=user_path, help='write a summary: frames, broken ones, seconds, peak memory')
    clips = parser.add_argument_group('clips')
    clips.add_argument('--clip-len', type=int, help='frames in a clip; default: data.test.test_size of the config')
    clips.add_argument('--stride', type=int, help='frames from one frame of a clip to the next; default 3')
    clips.add_argument('--overlap', type=int, default=0, help='frames that neighbouring clips share')
    clips.add_argument('--online', action='store_true', help='use past frames only and label each frame at once')
    clips.add_argument('--fps', type=float, help='frame rate of images (default 15), or in place of that of a video')
    clips.add_argument('--max-frames', type=int, help='stop after so many frames')
    model = parser.add_argument_group('model')
    model.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    model.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    OptionsAction.add_to(model)
    return parser.parse_args()


class Outputs:
    """Everything that is written for a frame, in a thread of its own; a context that finishes all files.

    Args:
        args: command line.
        source: where frame rate and times come from.
        model: where class names and colours come from.
    """

    def __init__(self, args: argparse.Namespace, source: Source, model: Any) -> None:
        self._writes: list[Callable[[Frame, np.ndarray], None]] = []
        self._video: VideoWriter | None = None
        if args.out is not None:
            view = FrameView(*classes_of(model), args.view, args.opacity, args.legend, float(source.fps))
        if args.video is not None:
            video = self._video = VideoWriter(
                args.video, source.fps, source.time_base, args.crf, source.display, source.live)
            self._writes.append(lambda frame, labels: video.write(view(frame.image, labels), frame.time))
        if args.pictures is not None:
            self._writes.append(lambda frame, labels: write_picture(
                args.pictures / f'{frame.name}.{args.image_format}', view(frame.image, labels)))
        if args.labels is not None:
            _, palette = classes_of(model)
            self._writes.append(
                lambda frame, labels: write_label_png(args.labels / f'{frame.name}.png', labels, palette))
        self._thread: Background[tuple[Frame, np.ndarray]] = Background(self._write)

    def put(self, frame: Frame, labels: np.ndarray) -> None:
        """Hands one frame over."""
        self._thread.put((frame, labels))

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            self._thread.close()
            whole = kind is None
        finally:
            if self._video is not None:
                self._video.close(whole)

    def _write(self, item: tuple[Frame, np.ndarray]) -> None:
        for write in self._writes:
            write(*item)


def choose_outputs(args: argparse.Namespace, source: Source) -> None:
    """Splits ``--out`` into ``args.video`` and ``args.pictures``.

    Raises:
        ConfigError: an output would overwrite an input or another output.
    """
    if args.out is None and args.labels is None:
        args.out = f'{source.name}_themask.mp4'
    args.video = args.pictures = None
    if args.out is not None and is_video(args.out):
        args.video = user_path(args.out)
    elif args.out is not None:
        args.pictures = user_path(args.out)
    videos = {} if args.video is None else {'--out': args.video, '--out, while it grows': part_of(args.video)}
    frames = {f"input '{path}'": path for path in source.files}
    refuse_overwriting({'--json': args.json, **videos}, {
        **config_inputs(user_path(args.config)), 'checkpoint': user_path(args.checkpoint), **frames})
    refuse_overwriting({'--json': args.json}, videos)
    folders = {'--out': args.pictures, '--labels': args.labels}
    if isinstance(source, FolderSource):
        parents = {path.parent for path in source.files} | {path.resolve().parent for path in source.files}
        refuse_overwriting(folders, {f"folder of the input '{parent}'": parent for parent in parents})
    if args.image_format == 'png':
        refuse_overwriting({'--labels': args.labels}, {'folder of --out': args.pictures})


def run(args: argparse.Namespace) -> int:
    """Labels the input; returns the exit status."""
    if args.max_frames is not None and args.max_frames < 1:
        raise ConfigError(f'--max-frames: expected at least 1, got {args.max_frames}')
    source = open_source(args.input, args.fps)
    choose_outputs(args, source)
    model = init_segmentor(args.config, args.checkpoint, args.device, args.options)
    segmenter = VideoSegmenter(model, args.clip_len, args.stride, args.overlap, args.online, args.dtype)
    total = min(filter(None, (source.num_frames, args.max_frames)), default=None)
    with (
        Progress('frame', total, partial(print, file=sys.stderr), interval=5) as progress,
        Interruption('finishing the files') as interruption,
        Outputs(args, source, model) as outputs,
        contextlib.suppress(Interrupted),
        contextlib.closing(segmenter(source, interruption.__bool__)) as labelled,
    ):
        for frame, labels in labelled:
            outputs.put(frame, labels)
            progress.advance()
            if progress.frames == args.max_frames:
                break
    if not progress.frames and not interruption:
        raise DataError(f"'{args.input}': no frame could be read")
    report(args, source, progress, bool(interruption))
    return interruption.status


def report(args: argparse.Namespace, source: Source, progress: Progress, interrupted: bool) -> None:
    """Says what was done, and writes it where ``--json`` asks for it."""
    summary = {
        'input': args.input, 'frames': progress.frames, 'broken': source.broken, 'broken_names': source.broken_names,
        'seconds': round(progress.seconds, 3), 'frames_per_second': round(progress.frames / progress.seconds, 2),
        'source_fps': float(Fraction(source.fps)), 'peak_memory_mib': round(peak_memory(), 1),
        'interrupted': interrupted,
    }  # fmt: skip
    if args.json:
        write_atomically(args.json, json.dumps(summary, indent=1))
    outputs = [str(path) for path in (args.video, args.pictures, args.labels) if path is not None and progress.frames]
    written = ' and '.join(outputs) or 'nothing'
    print(f'{"interrupted; " if interrupted else ""}{progress.frames} frames -> {written}; {source.broken} broken; '
          f'{summary["frames_per_second"]} frames/s; peak memory {summary["peak_memory_mib"]:.0f} MiB')


def main() -> int:
    """Runs the tool; returns the exit status."""
    use_huge_pages()
    args = parse_args()
    setup_logger()
    return run_tool(lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())
