"""Speed and memory of the package beside the plain formulation, as ratios measured in one run.

    python -m benchmarks.speed --part eval --backbone mit_b1 --frames 1 2
    python -m benchmarks.speed --part train data post --json speed.json
    python -m benchmarks.speed --part eval --device cuda --compile

Parts:

* eval: frames to label maps, 480x864 in and 480x853 out; float32, then ours in bfloat16 beside plain float32.
* train: a training step (loss, backward, clipping, AdamW) on one 480x480 clip, without and with activation
  checkpointing, and matching and losses alone, forward and backward.
* data: a training clip of two frames from decoded images to tensors.
* masks: a colour mask of 1920x1080 with 30 classes, to labels; the plain arm decodes its PNG and no more.
* sparse: training clips from files; the plain arm has a label for every frame, ours for one of 30.
* post: scores at stride 4 to label maps.
* linear: linear layers of the model alone, BLAS beside what the model uses, in float32 and bfloat16.
* attention: attention alone, torch's own beside what the model uses, in float32 and bfloat16.

Both arms compute the same thing (``benchmarks/plain.py``, ``tests/test_plain.py``).  They run in turns in one process,
so that both meet the same disturbances, and medians are compared.  The peak memory of an arm is measured in a process
of its own, above what the loaded model and its input take.  ``--json`` writes a list of rows
``{name, plain_ms, ours_ms, ratio, plain_peak_mib, ours_peak_mib}``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/speed.py`

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import plain
from mmseg.config import load_config
from mmseg.core import build_optimizer
from mmseg.datasets import VSPWDataset, build_dataset
from mmseg.datasets.labels import describe_labels
from mmseg.datasets.pipelines.compose import Compose
from mmseg.kernels.half import low_copies
from mmseg.kernels.label_map import ScoreView, label_map, resize_matrix
from mmseg.kernels.layers import attention, linear
from mmseg.models import EncoderDecoder, build_segmentor
from mmseg.models.losses import THEMaskCriterion
from mmseg.models.structures import ClipTarget, DecoderOutput, MaskPrediction
from mmseg.utils.visual import write_picture

ARMS = ('plain', 'ours')
CLASSES = 124
CONFIGS = Path(__file__).parents[1] / 'local_configs' / 'themask'
PARTS = ('eval', 'train', 'data', 'masks', 'sparse', 'post', 'linear', 'attention')
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is measured.
        make: arm -> the function to time, with everything it needs already built.
    """

    name: str
    make: Callable[[str], Run]


def labels_of(frames: int, height: int, width: int, classes: int = 6) -> Tensor:
    """A label map ``[1, frames, height, width]`` of a few moving rectangles, with some void."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(CLASSES, classes, replace=False)
    labels = np.full((1, frames, height, width), chosen[0], np.int64)
    for label in chosen[1:]:
        y, x = rng.integers(0, height * 2 // 3), rng.integers(0, width * 2 // 3)
        for t in range(frames):
            labels[0, t, y : y + height // 3, x + 4 * t : x + 4 * t + width // 3] = label
    labels[:, :, : height // 20] = 255
    return torch.from_numpy(labels)


def model_of(
    args: argparse.Namespace, stage: str, num_frames: int, checkpointing: bool = False, compile_mode: str | None = None
) -> EncoderDecoder:
    """A model of the package with random weights."""
    options: dict[str, Any] = {'model.pretrained': None}
    if compile_mode is not None:
        options['model.compile_cfg'] = dict(mode=compile_mode)
    options['model.decode_head.transformer_decoder_cfg.num_frames'] = num_frames
    if checkpointing:
        options['model.backbone.with_cp'] = True
        options['model.decode_head.pixel_decoder_cfg.with_cp'] = True
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / f'{stage}_themask_{args.backbone}.py', options)
    return build_segmentor(cfg.model).to(args.device)


def clip_of(args: argparse.Namespace, frames: int, height: int, width: int) -> Tensor:
    """A normalised random clip ``[1, frames, 3, height, width]``."""
    return torch.randn(1, frames, 3, height, width, generator=torch.Generator().manual_seed(1)).to(args.device)


def eval_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Frames to label maps."""
    height, width = args.size or (480, 864)
    size = height, width - width // 78
    variants = [(precision, compiled) for compiled in (False, True)[: 1 + args.compile] for precision in args.precision]
    for frames in args.frames:
        for precision, compiled in variants:

            def make(arm: str, frames: int = frames, precision: str = precision, compiled: bool = compiled) -> Run:
                model = model_of(args, 'video', frames, compile_mode='default' if compiled else None).eval()
                clip = clip_of(args, frames, height, width)
                if arm == 'plain':
                    yardstick = plain.PlainModel(model.state_dict())
                    del model
                    return lambda: yardstick.predict(clip, size)
                return eval_run(model, clip, size, precision == 'bf16')

            end = ' compiled' if compiled else ''
            yield Case(f'eval {args.backbone} T={frames} {height}x{width} {precision}{end}', make)


def eval_run(model: EncoderDecoder, clip: Tensor, size: tuple[int, int], low: bool = False) -> Run:
    """Frames to label maps of ``size``, in bfloat16 where ``low``; weights are cast once, as in a test."""
    copies = contextlib.ExitStack()
    if low:
        copies.enter_context(low_copies(model, torch.bfloat16))

    def run() -> Tensor:
        assert copies is not None  # kept as long as the model
        with torch.inference_mode(), torch.autocast(clip.device.type, torch.bfloat16, enabled=low):
            return model.predict([clip], [None], size)

    return run


def train_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Training steps, and matching and losses alone."""
    height, width = args.size or (480, 480)
    for frames in args.frames:
        for checkpointing in (False, True):

            def make(arm: str, frames: int = frames, checkpointing: bool = checkpointing) -> Run:
                model = model_of(args, 'video', frames, checkpointing).train()
                clip, labels = clip_of(args, frames, height, width), labels_of(frames, height, width).to(args.device)
                if arm == 'plain':
                    yardstick = plain.PlainModel(model.state_dict())
                    del model
                    plain_optimizer = plain.adamw(yardstick.parameters())
                    return lambda: plain.train_step(yardstick, plain_optimizer, clip, labels)
                return train_run(args, model, clip, labels)

            end = ' checkpointed' if checkpointing else ''
            yield Case(f'train step {args.backbone} T={frames} {height}x{width}{end}', make)

        def make_losses(arm: str, frames: int = frames) -> Run:
            return losses_run(args, arm, labels_of(frames, height, width))

        yield Case(f'matching and losses T={frames} {height}x{width}', make_losses)


def train_run(args: argparse.Namespace, model: EncoderDecoder, clip: Tensor, labels: Tensor, low: bool = False) -> Run:
    """Our training step: losses (in bfloat16 where ``low``), backward, clipping, AdamW."""
    optimizer = build_optimizer(model, load_config(CONFIGS / f'video_themask_{args.backbone}.py').optimizer)

    def run() -> None:
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=low):
            losses = model(clip, labels)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    return run


def losses_run(args: argparse.Namespace, arm: str, labels: Tensor) -> Run:
    """Matching, losses and their gradients for ten stages of random predictions at both levels, one clip of labels."""
    frames, height, width = labels.shape[1:]
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, frames, 256, height // 4, width // 4, generator=generator).flatten(0, 1)
    features = features.to(args.device).contiguous(memory_format=torch.channels_last).requires_grad_()

    def predictions(samples: int) -> list[MaskPrediction]:
        shapes = (samples, 100, CLASSES + 1), (samples, 100, 256)
        own = features.view(samples, -1, *features.shape[1:])
        stages = []
        for _ in range(10):
            logits, embedding = (torch.randn(x, generator=generator).to(args.device) for x in shapes)
            stages.append(MaskPrediction(logits.requires_grad_(), embedding.requires_grad_(), own))
        return stages

    clip, frame = predictions(1), predictions(frames)
    leaves = [features, *(leaf for stage in (*clip, *frame) for leaf in (stage.logits, stage.embedding))]
    labels = labels.to(args.device)
    criterion = THEMaskCriterion(CLASSES).to(args.device)

    def run() -> None:
        if arm == 'plain':
            pairs = [[(stage.logits, stage.masks) for stage in level] for level in (clip, frame)]
            losses = plain.losses_of(pairs[0], pairs[1], labels, criterion.empty_weight)
        else:
            losses = criterion(DecoderOutput(clip, frame), ClipTarget.from_labels(labels, CLASSES))
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), leaves)

    return run


def data_cases(args: argparse.Namespace) -> Iterator[Case]:
    """A training clip from decoded images to tensors; the same random draws in both arms and every round."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (2, 24, 43, 3), dtype=np.uint8)
    images = [np.kron(image, np.ones((20, 20, 1), np.uint8))[:, :853].copy() for image in coarse]
    masks = list(labels_of(2, 480, 853)[0].numpy().astype(np.uint8))
    cfg = load_config(CONFIGS / 'video_themask_mit_b1.py').data.train.dataset.pipeline
    pipeline = Compose([step for step in cfg if not step['type'].startswith('Load')])
    shape = images[0].shape
    clip = {
        'img': images, 'gt_semantic_seg': masks, 'img_shape': shape, 'pad_shape': shape, 'ori_shape': shape,
        'scale_factor': 1.0, 'filename': '', 'ori_filename': '',
    }  # fmt: skip

    def make(arm: str) -> Run:
        def run() -> None:
            for seed in range(8):
                np.random.seed(seed)
                if arm == 'plain':
                    plain.train_pipeline(images, masks)
                else:
                    pipeline({**clip, 'img': list(images), 'gt_semantic_seg': list(masks)})

        return run

    yield Case('train pipeline, 8 clips of 2 frames 480x853', make)


def mask_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Reading a colour mask, beside decoding its PNG alone."""
    rng = np.random.default_rng(4)
    cells = cv2.resize(rng.integers(0, 30, (40, 60)).astype(np.uint8), (1920, 1080), interpolation=cv2.INTER_NEAREST)
    component = SimpleNamespace(
        CLASSES=tuple(map(str, range(30))), PALETTE=VSPWDataset.PALETTE[:30], label_map=None, colours=True,
        decoder=None)
    rule = describe_labels(component, 'benchmark')[2]
    pixels = np.array(component.PALETTE, np.uint8)[cv2.medianBlur(cells, 21)][..., ::-1]

    def make(arm: str) -> Run:
        folder = tempfile.TemporaryDirectory()
        path = str(Path(folder.name) / 'mask.png')
        write_picture(path, pixels)
        data = np.fromfile(path, np.uint8)

        def run() -> None:
            for _ in range(8):
                if arm == 'plain':
                    cv2.imdecode(data, cv2.IMREAD_COLOR)
                else:
                    rule.read(path)

        weakref.finalize(run, folder.cleanup)
        return run

    yield Case('8 colour masks 1920x1080, 30 classes', make)


def sparse_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Reading and drawing clips of two frames, around labelled frames alone."""
    rng = np.random.default_rng(5)
    height, width = args.size or (480, 864)
    frames = [np.kron(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8), np.ones((height // 8, width // 9, 1), np.uint8))
              for _ in range(4)]
    masks = list(labels_of(4, height, width)[0].numpy().astype(np.uint8))
    cfg = load_config(CONFIGS / 'video_themask_mit_b1.py').data.train.dataset

    def make(arm: str) -> Run:
        folder = tempfile.TemporaryDirectory()
        for i in range(60):
            write_picture(Path(folder.name) / f'data/video/origin/{i:03d}.jpg', frames[i % 4])
            if arm == 'plain' or i % 30 == 19:
                write_picture(Path(folder.name) / f'data/video/mask/{i:03d}.png', masks[i % 4] + 1)
        (Path(folder.name) / 'train.txt').write_text('video')
        dataset = build_dataset({
            **cfg, 'data_root': folder.name, 'unlabelled': 'error' if arm == 'plain' else 'ignore'})

        def run() -> None:
            for seed in range(8):
                random.seed(seed)
                np.random.seed(seed)
                dataset[0]

        weakref.finalize(run, folder.cleanup)
        return run

    yield Case('8 training clips of 2 frames from files', make)


def post_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Scores at stride 4 to label maps."""
    height, width = args.size or (480, 864)
    size = height, width - width // 78

    def make(arm: str) -> Run:
        generator = torch.Generator().manual_seed(4)
        scores = torch.rand(1, CLASSES, height // 4, width // 4, generator=generator).to(args.device)
        if arm == 'plain':
            return lambda: plain.resize_and_argmax(scores, (height, width), size)
        rows, columns = resize_matrix(height // 4, height, size[0]), resize_matrix(width // 4, width, size[1])
        return lambda: label_map([ScoreView(scores, rows, columns)])

    yield Case(f'resize and argmax {height}x{width}', make)


def linear_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The encoder's feed-forward layers and projections, and the first stage's Mix-FFN, for a 480x864 frame."""
    sizes = ((8505, 256, 1024), (8505, 1024, 256), (8505, 256, 256), (25920, 256, 64))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width, out in sizes:

            def make(
                arm: str, tokens: int = tokens, width: int = width, out: int = out, dtype: torch.dtype = dtype
            ) -> Run:
                shapes = (1, tokens, width), (out, width), (out,)
                x, weight, bias = (torch.randn(shape, device=args.device, dtype=dtype) for shape in shapes)
                function = nn.functional.linear if arm == 'plain' else linear

                def run() -> Tensor:
                    with torch.inference_mode():
                        return function(x, weight, bias)

                return run

            yield Case(f'linear {tokens} x {width} -> {out}, {str(dtype).removeprefix("torch.")}', make)


def attention_cases(args: argparse.Namespace) -> Iterator[Case]:
    """MiT-b1's first three stages and the mask decoder's finest level, on a 480x864 frame."""
    for dtype in (torch.float32, torch.bfloat16):
        for heads, queries, keys, channels in ((1, 25920, 405, 64), (2, 6480, 405, 64), (5, 1620, 405, 64),
                                               (8, 100, 6480, 32)):  # fmt: skip

            def make(
                arm: str, heads: int = heads, queries: int = queries, keys: int = keys, channels: int = channels,
                dtype: torch.dtype = dtype,
            ) -> Run:
                shapes = [(1, n, heads, channels) for n in (queries, keys, keys)]
                query, key, value = (torch.randn(x, device=args.device, dtype=dtype).transpose(1, 2) for x in shapes)
                mask = torch.rand(1, 1, queries, keys, device=args.device) < 0.3 if queries < keys else None

                def run() -> Tensor:
                    with torch.inference_mode():
                        if arm == 'plain':
                            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
                        return attention(query, key, value, mask)

                return run

            name = str(dtype).removeprefix('torch.')
            yield Case(f'attention {heads} x {queries} to {keys}, {name}', make)


def cases_of(args: argparse.Namespace, part: str) -> list[Case]:
    """The rows of one part."""
    cases = {
        'eval': eval_cases, 'train': train_cases, 'data': data_cases, 'masks': mask_cases, 'sparse': sparse_cases,
        'post': post_cases, 'linear': linear_cases, 'attention': attention_cases,
    }  # fmt: skip
    return list(cases[part](args))


def time_arms(case: Case, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each arm, the arms taking turns."""
    runs = {arm: case.make(arm) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_number in range(rounds + 1):
        for arm, run in runs.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if round_number > 0:  # the first round warms caches
                seconds[arm].append(time.perf_counter() - start)
    return {arm: 1000 * statistics.median(values) for arm, values in seconds.items()}


def synchronise(device: str) -> None:
    """Waits for the GPU, where there is one."""
    if device == 'cuda':
        torch.cuda.synchronize()


def own_peak(run: Run, device: str) -> float:
    """MiB that two calls need at most, above what was in use before them."""
    gc.collect()
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(), run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path('/proc/self/clear_refs').write_text('5')  # the high-water mark starts anew
    before = memory_status('VmRSS')
    run(), run()
    return (memory_status('VmHWM') - before) / 1024


def memory_status(field: str) -> int:
    """A figure of this process in KiB (Linux)."""
    match = re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert match is not None
    return int(match[1])


def peak_in_fresh_process(part: str, index: int, arm: str, arguments: list[str]) -> float | None:
    """Runs this module once more for one arm of one case; ``None`` where the system does not tell memory."""
    if not tells_memory():
        return None
    return float(in_fresh_process('benchmarks.speed', [*arguments, '--peak-of', part, str(index), arm]).split()[-1])


def tells_memory() -> bool:
    """Whether :func:`own_peak` works here."""
    return Path('/proc/self/clear_refs').exists()


def in_fresh_process(module: str, arguments: list[str]) -> str:
    """What a benchmark prints when it is run in a process of its own."""
    command = [sys.executable, '-m', module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if result.returncode != 0:
        raise RuntimeError(f'{" ".join(command)} failed:\n{result.stderr[-2000:]}')
    return result.stdout


def describe(args: argparse.Namespace) -> str:
    """Machine, versions, threads and allocator."""
    device = torch.cuda.get_device_name() if args.device == 'cuda' else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
        if args.device == 'cpu' and names:
            device = names[0]
    return (
        f'{device}; torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), '
        f'{torch.get_num_threads()} threads of {os.cpu_count()} cores; allocator {allocator()}'
    )


def allocator() -> str:
    """What the environment says about the allocation of memory, ``default`` if nothing."""
    names = ('MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'THP_MEM_ALLOC', 'PYTORCH_CUDA_ALLOC', 'PYTORCH_ALLOC')
    settings = sorted(f'{name}={value}' for name, value in os.environ.items() if name.startswith(names))
    return ' '.join(settings) or 'default'


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    parser.add_argument('--backbone', default='mit_b1', help='mit_b0 .. mit_b5')
    parser.add_argument('--frames', nargs='+', type=int, help='clip lengths (default: eval 1 2, train 2)')
    parser.add_argument('--size', nargs=2, type=int, metavar=('HEIGHT', 'WIDTH'), help='multiples of 32')
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds; medians count')
    parser.add_argument('--threads', type=int, help="default: torch's own choice")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--precision', nargs='+', choices=('fp32', 'bf16'), default=['fp32', 'bf16'], help='eval: of ours')
    parser.add_argument('--compile', action='store_true', help='eval: also with torch.compile')
    parser.add_argument('--no-peaks', action='store_true', help='skip the memory measurement')
    parser.add_argument('--json', help='write the rows to this file')
    parser.add_argument('--peak-of', nargs=3, metavar=('PART', 'INDEX', 'ARM'), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def for_part(args: argparse.Namespace, part: str) -> argparse.Namespace:
    """The arguments with the part's own default clip lengths."""
    return argparse.Namespace(**{**vars(args), 'frames': args.frames or ([1, 2] if part == 'eval' else [2])})


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        part, index, arm = args.peak_of
        print(own_peak(cases_of(for_part(args, part), part)[int(index)].make(arm), args.device))
        return
    print(describe(args))
    print(f'{"":56s}{"plain":>10s}{"ours":>10s}{"ratio":>8s}{"plain":>10s}{"ours":>10s}{"share":>8s}')
    rows = []
    for part in args.part:
        for index, case in enumerate(cases_of(for_part(args, part), part)):
            times = time_arms(case, args.rounds, args.device)
            peaks = {arm: None if args.no_peaks else peak_in_fresh_process(part, index, arm, arguments) for arm in ARMS}
            gc.collect()
            row = {'name': case.name, 'plain_ms': times['plain'], 'ours_ms': times['ours']}
            row |= {'ratio': times['plain'] / times['ours']}
            row |= {f'{arm}_peak_mib': peaks[arm] for arm in ARMS}
            rows.append(row)
            line = f'{case.name:56s}{times["plain"]:8.1f}ms{times["ours"]:8.1f}ms{row["ratio"]:7.2f}x'
            if peaks['plain'] is not None and peaks['ours'] is not None:
                line += f'{peaks["plain"]:7.0f}MiB{peaks["ours"]:7.0f}MiB{peaks["ours"] / peaks["plain"]:8.0%}'
            print(line, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
