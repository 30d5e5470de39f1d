"""Tests a checkpoint: metrics, result files, palette PNGs, pictures."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config

from mmseg.apis.sinks import (
    OUT_FORMS,
    PalettePNG,
    Pictures,
    Sink,
    VideoFiles,
    join_parts,
    parts_folder,
    remove_parts,
)
from mmseg.apis.test import (
    Gather,
    TestOutcome,
    check_classes,
    check_model,
    gather_by,
    log_skipped,
    metrics_for,
    stream_test,
)
from mmseg.apps.report import ReportSink, report_page, write_report
from mmseg.config import OptionsAction, config_inputs, load_config
from mmseg.core.evaluation import StreamingMetrics
from mmseg.core.evaluation.results import CSV_FILES
from mmseg.core.precision import Precision, set_backends
from mmseg.datasets import VideoDataset, build_dataset, build_test_loader
from mmseg.datasets.loader import STALL_SECONDS
from mmseg.models import build_segmentor
from mmseg.utils.allocator import use_huge_pages
from mmseg.utils.checkpoint import load_weights, open_checkpoint
from mmseg.utils.cli import ArgumentParser, run_all, run_tool
from mmseg.utils.dist import (
    LAUNCHERS,
    close_dist,
    fail_together,
    get_dist_info,
    init_dist,
    is_main_process,
)
from mmseg.utils.errors import ConfigError, DataError, OtherRankError, nearest
from mmseg.utils.files import refuse_overwriting, write_atomically
from mmseg.utils.logger import get_logger, setup_logger
from mmseg.utils.signals import Interruption

AUG_RATIOS = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]  # --aug-test of mmsegmentation 0.x
EVAL_OPTIONS = {
    'vc_last_window': 'count all L-n+1 windows of a video instead of L-n',
    'vc_min_frames': 'leave out videos with fewer frames; 17 skips videos of <= 16 frames for VC8 too',
    'vc_remap_void': 'raw labels 0 and 255 are one label for VC',
    'imgfile_prefix': 'folder of --format-only, where --out names none',
}
EPILOG = f"""forms of --out:
{OUT_FORMS}

--eval takes mIoU, mIoU_vspw, fwIoU, aAcc, mAcc, mDice (they come together) and VC<n>; the default is all of them and
VC8, VC16 if the split has masks.  Optional, not part of the benchmark: VEC<n> (class-wise IoU of the regions that
persist over n frames) and TC (IoU with the prediction before, moved along the optical flow).

--eval-options:
""" + '\n'.join(f'  {key:15s} {text}' for key, text in EVAL_OPTIONS.items()) + """

examples:
  python tools/test.py local_configs/themask/video_themask_mit_b1.py CKPT --options data.test.test_size=4
  python tools/test.py CONFIG CKPT --eval mIoU VC8 --show-dir pictures
  python tools/test.py CONFIG CKPT --options data.test.split=test --format-only --out submission
  python tools/test.py CONFIG CKPT --report reports/b1
  ./tools/dist_test.sh CONFIG CKPT 2 --out results.npz
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, or a work dir (then its newest whole checkpoint)')
    parser.add_argument('--work-dir', type=Path, help='folder for metrics.json and CSV files (default: metrics as '
                        'JSON beside the checkpoint)')
    parser.add_argument('--out', help='write the label maps to this folder, .npz or .pkl file')
    parser.add_argument('--format-only', action='store_true',
                        help='write a palette PNG per frame, <out>/<video>/<frame>.png, and do not evaluate')
    parser.add_argument('--eval', nargs='+', metavar='M', help='metrics')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', type=Path, help='write pictures of frame, prediction and ground truth')
    parser.add_argument('--report', type=Path, metavar='DIR', help='write DIR/index.html: results as one page, with '
                        'players of the worst, median and best videos')
    parser.add_argument('--opacity', type=float, default=0.6, help='of the colours in pictures, 0..1')
    parser.add_argument('--aug-test', action='store_true', help='average over scales 0.5 .. 1.75 and flips')
    OptionsAction.add_to(parser)
    parser.add_argument('--eval-options', nargs='+', action=OptionsAction, default={}, metavar='K=V', help='see below')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='how several processes were started')
    parser.add_argument('--tmpdir', help='collect the results of several processes in this (shared) folder')
    parser.add_argument('--gpu-collect', action='store_true', help='collect them through the GPUs')
    parser.add_argument('--local_rank', '--local-rank', type=int, help='set by old launchers')
    args = parser.parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; what the user can mend ends in one line instead of a traceback."""
    use_huge_pages()
    args = parse_args(argv)
    try:
        return run_tool(lambda: run(args), parallel=True)
    finally:
        close_dist()


def run(args: argparse.Namespace) -> int:
    """Tests as ``args`` says; returns the exit status."""
    check_args(args)
    cfg = load_config(args.config, args.options)
    params = cfg.get('dist_params') or {}
    device = init_dist(args.launcher, params.get('backend'), port=params.get('port'))
    with Interruption('stopping after this clip', owner=is_main_process()) as interruption:
        try:
            test(args, cfg, device, interruption)
        except (KeyboardInterrupt, OtherRankError):
            if not interruption:
                raise
            left = f'; the videos that were finished stay in {parts_folder(args.out)}' if args.out else ''
            get_logger().warning('interrupted: no results are written%s', left)
            return interruption.status
    return 0


def test(args: argparse.Namespace, cfg: Config, device: torch.device, interruption: Interruption) -> None:
    """Tests, and writes the results before it shows them."""
    with interruption.raising():
        gather = gather_by(args.tmpdir, args.gpu_collect, device)
        logger = setup_logger(level=cfg.get('log_level', 'INFO'))
        rank, world_size = get_dist_info()
        if args.show and world_size > 1:
            raise ConfigError('--show: needs a single process')
        set_backends(cfg)
        if args.aug_test:
            augment(cfg.data.test)
        check_model(cfg)
        dataset = build_dataset(cfg.data.test, where='data.test')
        loader = build_test_loader(
            dataset, cfg.data.get('workers_per_gpu', 0), rank, world_size,
            cfg.data.get('stall_seconds', STALL_SECONDS))
        metrics = chosen_metrics(args, dataset)
        checkpoint, model = load_model(cfg, args.checkpoint, dataset, device)
        refuse_inputs(args, checkpoint, dataset)
        sinks = make_sinks(args, checkpoint, dataset)
    page = ReportSink(dataset, metrics) if args.report and metrics else None
    outcome = stream_test(
        model, dataset, loader, device=device, metrics=metrics, evaluate=metrics is not None,
        sinks=[*sinks, page] if page else sinks,
        autocast=lambda: Precision.from_config(cfg, device).evaluation(model), gather=gather, interruption=interruption)
    main_process, results = is_main_process(), outcome.results
    steps: list[Callable[[], object]] = []
    if main_process:
        logger.info('%d frames, %.1f frames/s on rank 0 of %d', outcome.frames,
                    outcome.frames / world_size / outcome.seconds, world_size)
        log_skipped(outcome)
        if results is not None:
            steps += [partial(write_metrics, args, outcome, checkpoint), results.check_scored]
    if page is not None and results is not None:
        steps.append(partial(write_page, args, page, gather, outcome, checkpoint))
    if main_process and args.out and any(isinstance(sink, VideoFiles) for sink in sinks):
        steps.append(partial(join_parts, args.out, [video.name for video in dataset.videos]))
    if main_process and results is not None:
        steps.append(partial(results.print, per_class=True))
    run_all(*steps)


def chosen_metrics(args: argparse.Namespace, dataset: VideoDataset) -> StreamingMetrics | None:
    """What ``--eval`` and ``--eval-options`` ask for; None where nothing is to be evaluated."""
    if not dataset.has_masks or args.format_only:
        for option, given in (('--eval', args.eval), ('--report', args.report)):
            if given:
                raise DataError(f"{option}: split '{dataset.split}' of {dataset.data_root} has no masks to evaluate "
                                f'against')
        if not (args.out or args.format_only or args.show or args.show_dir):
            raise ConfigError(f"split '{dataset.split}' has no masks, so there is nothing to measure: "
                              f'give --out, --format-only or --show-dir')
        return None
    options = {key.removeprefix('vc_'): value for key, value in args.eval_options.items() if key.startswith('vc_')}
    return metrics_for(dataset, args.eval or (), per_frame=bool(args.report), **options)


def refuse_inputs(args: argparse.Namespace, checkpoint: Path, dataset: VideoDataset) -> None:
    """Refuses outputs that would overwrite what the test reads."""
    inputs: dict[str, str | Path] = {
        **config_inputs(args.config), 'checkpoint': checkpoint, **dataset.files.inputs()}
    outputs: dict[str, str | Path | None] = {'metrics': metrics_file(args, checkpoint)}
    if args.work_dir:
        outputs |= {f'--work-dir ({name})': args.work_dir / name for name in CSV_FILES}
    if args.report:
        outputs['--report'] = report_page(args.report)
    if _out_is_file(args):
        outputs |= {'--out': args.out, '--out (names of the maps)': Path(args.out).with_suffix('.json')}
    folders = {'--show-dir': args.show_dir, '--format-only': png_folder(args, checkpoint)}
    for video in dataset.videos:
        outputs |= {f"{option}, '{video.name}'": folder / video.name for option, folder in folders.items() if folder}
    refuse_overwriting(outputs, inputs)


def check_args(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, options that are unknown or exclude each other."""
    for key in args.eval_options:
        if key not in EVAL_OPTIONS:
            raise ConfigError(f"--eval-options: unknown option '{key}'{nearest(key, EVAL_OPTIONS)}")
    if args.format_only and (args.eval or args.report):
        raise ConfigError('--format-only writes files without evaluating; it does not go with --eval or --report')
    if args.out:
        parts_folder(args.out)


def augment(test: Mapping[str, Any]) -> None:
    """Gives the pipeline of ``data.test`` the scales and flips of ``--aug-test``."""
    steps = [step for step in test['pipeline'] if step['type'] == 'MultiScaleFlipAug']
    if not steps:
        raise ConfigError('--aug-test: data.test.pipeline has no MultiScaleFlipAug, whose scales and flips it sets')
    steps[0]['img_ratios'] = AUG_RATIOS
    steps[0]['flip'] = True


def load_model(
        cfg: Config, checkpoint: str, dataset: VideoDataset, device: torch.device) -> tuple[Path, torch.nn.Module]:
    """The config's model with the weights of ``checkpoint``, and the file they came from."""
    model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.get('test_cfg'))
    check_classes(model, dataset, 'data.test')
    path, content = open_checkpoint(checkpoint)
    load_weights(model, content['state_dict'], path)
    trained_on = content['meta'].get('CLASSES')
    if trained_on is not None and tuple(trained_on) != tuple(dataset.CLASSES):
        get_logger().warning('%s was trained on other class names than the data set of data.test has', path)
    return path, model.to(device).eval()


def png_folder(args: argparse.Namespace, checkpoint: Path) -> Path | None:
    """Where ``--format-only`` writes; None without it."""
    if not args.format_only:
        return None
    out = None if _out_is_file(args) else args.out
    return Path(
        out or args.eval_options.get('imgfile_prefix') or (args.work_dir or checkpoint.parent) / 'format_results')


def _out_is_file(args: argparse.Namespace) -> bool:
    return bool(args.out) and parts_folder(args.out) != Path(args.out)


def metrics_file(args: argparse.Namespace, checkpoint: Path) -> Path:
    """Where the scores go."""
    return args.work_dir / 'metrics.json' if args.work_dir else checkpoint.with_suffix('.metrics.json')


def make_sinks(args: argparse.Namespace, checkpoint: Path, dataset: VideoDataset) -> list[Sink]:
    """What ``--out``, ``--format-only``, ``--show-dir`` and ``--show`` ask for."""
    sinks: list[Sink] = []
    folder = png_folder(args, checkpoint)
    if folder is not None:
        get_logger().info('palette PNGs go to %s', folder)
        sinks.append(PalettePNG(folder, dataset))
    if args.out and (_out_is_file(args) or not args.format_only):
        with fail_together():
            if is_main_process():
                remove_parts(args.out)  # left by a test that was broken off
        sinks.append(VideoFiles(parts_folder(args.out)))
    if args.show or args.show_dir:
        sinks.append(Pictures(dataset, args.show_dir, window=args.show, opacity=args.opacity))
    return sinks


def write_metrics(args: argparse.Namespace, outcome: TestOutcome, checkpoint: Path) -> None:
    """Writes what was measured and left out: to the work dir, or beside the checkpoint unless that is read-only."""
    assert outcome.results is not None
    path = metrics_file(args, checkpoint)
    run_of = {'config': args.config, 'checkpoint': str(checkpoint), 'options': args.options,
              'frames': outcome.frames, 'skipped': outcome.skipped}
    content = json.dumps({**outcome.results.as_dict(), 'test': run_of}, indent=1, default=str)
    if args.work_dir:
        run_all(partial(write_atomically, path, content), partial(outcome.results.to_csv, args.work_dir))
    else:
        try:
            write_atomically(path, content)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # a full disk
                raise
            get_logger().warning('metrics not written beside the checkpoint: %s; name a folder by --work-dir', error)
            return
    get_logger().info('metrics written to %s', path)


def write_page(
        args: argparse.Namespace, page: ReportSink, gather: Gather, outcome: TestOutcome, checkpoint: Path) -> None:
    """Writes the page of ``--report``; every rank must call it."""
    assert outcome.results is not None
    about = {'config': args.config, 'checkpoint': checkpoint, **args.options}
    if outcome.skipped:
        about['left out'] = f'{len(outcome.skipped)} clips'
    run_of = page.run(outcome.results, Path(args.config).stem, about, gather)
    if is_main_process():
        get_logger().info('report written to %s', write_report([run_of], args.report))


if __name__ == '__main__':
    sys.exit(main())
