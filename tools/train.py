"""Train a model: ``python tools/train.py CONFIG``, or ``tools/dist_train.sh CONFIG GPUS`` for several processes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.config import OptionsAction, load_config
from mmseg.utils.allocator import keep_pages
from mmseg.utils.cli import USER_ERRORS, ArgumentParser, run_tool
from mmseg.utils.dist import close_dist, describe, init_dist
from mmseg.utils.errors import ConfigError, RunError
from mmseg.utils.logger import log_traceback

EPILOG = """examples:
  python tools/train.py local_configs/themask/mini_1f.py --work-dir work_dirs/mini
  tools/dist_train.sh local_configs/themask/video_themask_mit_b5.py 4 --work-dir DIR2 --finetune-from DIR \\
      --options model.decode_head.transformer_decoder_cfg.num_frames=2 data.train.dataset.dilation="[-3]"
  python tools/train.py CONFIG --work-dir DIR --resume-from auto
SIGINT (Ctrl-C), SIGTERM or SIGHUP ends the training after the current iteration, with a checkpoint (exit status 130,
143 or 129; under nohup SIGHUP is ignored).  A second signal ends it at once."""


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Gives a command line the options that start several processes."""
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument('--gpus', type=int, help='number of GPUs (without one: of processes) to use on this machine')
    devices.add_argument('--gpu-ids', type=int, nargs='+', help='GPUs to use on this machine')


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description='Train a model', epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--load-from', help='checkpoint or work dir whose weights the training starts from')
    parser.add_argument(
        '--finetune-from',
        help='checkpoint or work dir to start from by name; trains only parameters with "predictor" in their name '
        '(config section "finetune" says otherwise)',
    )
    parser.add_argument('--resume-from', help='checkpoint or work dir to go on from; "auto": the work dir')
    parser.add_argument('--no-validate', action='store_true', help='no evaluation during training')
    add_devices(parser)
    parser.add_argument('--seed', type=int, help='seed of Python, numpy, torch and the data order')
    parser.add_argument('--deterministic', action='store_true', help='reproducible algorithms on a GPU, slower')
    OptionsAction.add_to(parser, 'change the config, as in runner.max_iters=100')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, help='set by old launchers; LOCAL_RANK wins')
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    from mmseg.apis.train import train_segmentor

    cfg = load_config(args.config, args.options)
    for key in ('work_dir', 'load_from', 'finetune_from', 'resume_from', 'seed', 'gpu_ids'):
        if getattr(args, key) is not None:
            cfg[key] = getattr(args, key)
    cfg.deterministic = args.deterministic or cfg.get('deterministic', False)
    cfg.work_dir = cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if cfg.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    device = init_dist(args.launcher, **cfg.get('dist_params', {}))
    if device.type == 'cpu':
        keep_pages()
    try:
        runner = train_segmentor(cfg, device, validate=not args.no_validate)
    except USER_ERRORS:
        raise
    except Exception as error:  # of a hook, a library, a device: the log has where, the terminal what
        log = log_traceback(error, Path(cfg.work_dir))
        if log is None:
            raise
        reason, *_ = describe(error).splitlines()
        raise RunError(f'{type(error).__name__}: {reason} (traceback in {log})') from None
    close_dist()
    return 0 if runner.stopped_by is None else 128 + runner.stopped_by


def start_processes(args: argparse.Namespace) -> None:
    """Replaces this process by a launcher of several, where ``--gpus`` or ``--gpu-ids`` ask for them."""
    count = len(args.gpu_ids) if args.gpu_ids else 1 if args.gpus is None else args.gpus
    if count < 1:
        raise ConfigError(f'--gpus: expected at least 1, got {count}')
    if args.launcher != 'none':
        if args.gpus or args.gpu_ids:
            raise ConfigError(f'--gpus and --gpu-ids: --launcher {args.launcher} already says how many processes run')
        return
    if args.gpu_ids:
        os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, args.gpu_ids))
    if count > 1:
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // count)))
        launcher = [str(Path(__file__).with_name('_launch.py')), '--standalone', f'--nproc_per_node={count}']
        devices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_devices(devices)
        _, arguments = devices.parse_known_args()  # the command line without them
        os.execv(sys.executable, [sys.executable, *launcher, __file__, *arguments, '--launcher', 'pytorch'])


def main() -> int:
    """Runs the command; a user's error is one line, not a traceback."""
    args = parse_args()

    def start() -> int:
        start_processes(args)
        return run(args)

    return run_tool(start, parallel=True)


if __name__ == '__main__':
    sys.exit(main())
