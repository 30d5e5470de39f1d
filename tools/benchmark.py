"""Measures latency, frames per second and peak memory of a config on clips, and prints the protocol beside them."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from mmseg.apis.inference import init_segmentor
from mmseg.config import OptionsAction, clip_length, config_inputs, load_config, required
from mmseg.core.precision import Precision, set_backends
from mmseg.datasets import build_dataset
from mmseg.utils.allocator import peak_memory, use_huge_pages
from mmseg.utils.arguments import Count, Index, check_value
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.dist import pick_device
from mmseg.utils.errors import ConfigError
from mmseg.utils.files import refuse_overwriting, write_json

EPILOG = """One clip at a time (or --batch of them) is timed from the normalised tensor on the device to label maps of
the output size on the host; with --data also loading and the test pipeline, in this process.  Every round is timed on
its own, the GPU is waited for; the median counts, and its spread is shown.  Weights do not change the time: without a
checkpoint they are random.

examples:
  python tools/benchmark.py local_configs/themask/video_themask_mit_b1.py --frames 4 --device cuda
  python tools/benchmark.py CONFIG CKPT --data --rounds 50
  python tools/benchmark.py local_configs/themask/mini_video.py --size 128 160 --out-size 120 160 --threads 1
  python tools/benchmark.py CONFIG --dtype bfloat16 --options model.test_cfg.mode=whole
"""
_LIMITS = dict(
    rounds=Count, warmup=Index, batch=Count, frames=Count | None, threads=Count | None, size=tuple[Count, Count],
    out_size=tuple[Count, Count])


def measure(step: Callable[[], int], rounds: int, warmup: int, device: torch.device) -> tuple[np.ndarray, int]:
    """Times ``rounds`` calls, after ``warmup`` calls that do not count.

    Returns:
        Seconds of each call, float64 [rounds], and the sum of what they return.
    """
    seconds, frames = [], []
    for _ in range(warmup + rounds):
        _wait_for(device)
        start = time.perf_counter()
        frames.append(step())
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[warmup:]), sum(frames[warmup:])


def _wait_for(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """Name of what computes."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    names = [line.split(':', 1)[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')]
    return f'{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def random_step(model: Any, args: argparse.Namespace, frames: int, device: torch.device) -> Callable[[], int]:
    """A call that predicts a random clip; returns the number of frames."""
    clip = torch.randn(args.batch, frames, 3, *args.size, device=device)
    flips: list[str | None] = [None]

    def step() -> int:
        model.predict([clip], flips, tuple(args.out_size)).cpu()
        return args.batch * frames

    return step


def data_step(model: Any, dataset: Any, device: torch.device) -> Callable[[], int]:
    """A call that loads and predicts the data set's next clip; returns the number of frames."""
    from mmseg.apis.test import predict_item

    position = -1

    def step() -> int:
        nonlocal position
        position = (position + 1) % len(dataset)
        return len(predict_item(model, dataset[position], device))

    return step


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--frames', type=int, help='of a clip (default: test_size of the config)')
    parser.add_argument('--batch', type=int, default=1, help='clips at a time (default 1)')
    parser.add_argument('--size', type=int, nargs=2, default=(480, 864), metavar=('H', 'W'), help='of the input')
    parser.add_argument('--out-size', type=int, nargs=2, default=(480, 853), metavar=('H', 'W'), help='of label maps')
    parser.add_argument('--data', action='store_true', help='clips of data.test, loading included')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--threads', type=int, help='of the CPU')
    OptionsAction.add_to(parser)
    parser.add_argument('--json', type=Path, help='write figures and protocol to this file')
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Measures, writes and prints."""
    refuse_overwriting({'--json': args.json}, {**config_inputs(args.config), 'checkpoint': args.checkpoint})
    report = benchmark(args)
    write_json(args.json, report)
    show(report)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Figures and protocol."""
    for name, annotation in _LIMITS.items():
        check_value(getattr(args, name), annotation, f'--{name.replace("_", "-")}')
    if args.data and args.batch != 1:
        raise ConfigError('--data runs one clip at a time, as testing does; it does not go with --batch')
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = load_config(args.config, args.options)
    set_backends(cfg)
    model = init_segmentor(cfg, args.checkpoint, device)
    frames = args.frames or clip_length(cfg)
    if args.data:
        required(cfg, 'data.test').test_size = frames
        step = data_step(model, build_dataset(cfg.data.test, where='data.test'), device)
    else:
        step = random_step(model, args, frames, device)
    idle = peak_memory(device)
    precision = Precision(device, args.dtype)
    with torch.no_grad(), precision.evaluation(model):
        seconds, predicted = measure(step, args.rounds, args.warmup, device)
    low, median, high = np.percentile(seconds, (10, 50, 90))
    return {
        'config': args.config, 'checkpoint': args.checkpoint, 'machine': machine(device), 'torch': torch.__version__,
        'dtype': str(precision.dtype).removeprefix('torch.'),
        'clips': 'data.test, loading included' if args.data else 'random tensors',
        'frames': frames, 'batch': args.batch,
        'input': None if args.data else list(args.size), 'output': None if args.data else list(args.out_size),
        'warmup': args.warmup, 'rounds': args.rounds,
        'latency_ms': 1000 * float(median), 'latency_p10_ms': 1000 * float(low), 'latency_p90_ms': 1000 * float(high),
        'frames_per_second': predicted / args.rounds / float(median),
        'memory_mib': peak_memory(device), 'memory_before_mib': idle,
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report."""
    clips = report['clips']
    if report['input']:
        (h, w), (h0, w0) = report['input'], report['output']
        clips += f', {report["batch"]} x {report["frames"]} frames of {w}x{h} to label maps of {w0}x{h0}'
    else:
        clips += f', clips of {report["frames"]}'
    memory = f'{report["memory_mib"]:.0f} MiB ({report["memory_before_mib"]:.0f} before the first clip)'
    for name, text in (
            ('config', report['config']), ('machine', f'{report["machine"]}, torch {report["torch"]}'),
            ('clips', clips), ('precision', report['dtype']),
            ('protocol', f'median of {report["rounds"]} rounds after {report["warmup"]} warm-up rounds'),
            ('latency', f'{report["latency_ms"]:.1f} ms a clip (10 to 90 %: {report["latency_p10_ms"]:.1f} to '
                        f'{report["latency_p90_ms"]:.1f})'),
            ('speed', f'{report["frames_per_second"]:.2f} frames/s'), ('peak memory', memory)):
        print(f'{name:13}{text}')


def main() -> int:
    """Runs the command line."""
    use_huge_pages()
    args = parse_args()
    return run_tool(lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())
