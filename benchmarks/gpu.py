"""Frames per second, training steps per second and memory on a GPU, beside the plain formulation in the same run.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --work eval --backbone mit_b1 --frames 1 2 4
    python -m benchmarks.gpu --work train --backbone mit_b5 --memory-limit 24

* eval: one clip of 480x864 frames, from the normalised tensor on the GPU to label maps of 480x853 there; in float32
  and in bfloat16, for the plain formulation, for the model as it is, and compiled (``compile_cfg``).
* train: a step (losses, backward, clipping, AdamW) on two clips of 480x480; the plain formulation, the model as it is,
  and with activation checkpointing.

Every backbone, clip length and precision has a process of its own, and its forms take turns in it.  All processes
build, compile and warm up side by side; then they measure one after the other, so that none disturbs another.  A time
is the median wall time of a call that the host waits for.  Memory is what PyTorch holds at most in a call; for training
with weights, gradients and optimizer, for evaluation above weights and input.  ``--memory-limit`` (GiB) stops a process
that wants more, as a smaller card would.  Convolutions use TF32 where PyTorch's default has it, in both arms.

``--json`` writes a list of rows ``{work, backbone, frames, precision, form, ms, per_second, ratio, peak_mib}``;
``per_second`` counts frames or steps, ``ratio`` is to the plain form of the same precision.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/gpu.py`

import torch
from torch import Tensor

from benchmarks import plain, speed

BACKBONES = tuple(f'mit_b{i}' for i in range(6))
FORMS = {'eval': ('plain', 'ours', 'compiled'), 'train': ('plain', 'ours', 'checkpointed')}
CLIPS = 2  # of a training step
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        work: ``eval`` or ``train``.
        backbone: ``mit_b0`` .. ``mit_b5``.
        frames: of a clip.
        precision: ``fp32`` or ``bf16``.
    """

    work: str
    backbone: str
    frames: int
    precision: str


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line, the largest first: they take longest to get ready."""
    eval_frames, train_frames = args.frames or (1, 2, 4), args.frames or (2,)
    return [
        Case(work, backbone, frames, precision)
        for backbone in sorted(args.backbone, reverse=True)
        for work, lengths in (('train', train_frames), ('eval', eval_frames))
        if work in args.work
        for frames in sorted(lengths, reverse=True)
        for precision in args.precision
    ]


def make(args: argparse.Namespace, case: Case, form: str) -> speed.Run:
    """The function to time."""
    own = argparse.Namespace(backbone=case.backbone, device=args.device)
    low = case.precision == 'bf16'
    precision = torch.autocast(args.device, torch.bfloat16, enabled=low)
    if case.work == 'eval':
        height, width = args.size or (480, 864)
        size = height, width - width // 78
        mode = args.mode if form == 'compiled' else None
        model = speed.model_of(own, 'video', case.frames, compile_mode=mode).eval()
        clip = speed.clip_of(own, case.frames, height, width)
        if form == 'plain':
            yardstick = plain.PlainModel(model.state_dict())

            def predict() -> Tensor:
                with torch.inference_mode(), precision:
                    return yardstick.predict(clip, size)

            return predict
        return speed.eval_run(model, clip, size, low)

    height, width = args.size or (480, 480)
    clips = torch.cat([speed.clip_of(own, case.frames, height, width)] * CLIPS)
    labels = torch.cat([speed.labels_of(case.frames, height, width)] * CLIPS).to(args.device)
    model = speed.model_of(own, 'video', case.frames, form == 'checkpointed').train()
    if form == 'plain':
        yardstick = plain.PlainModel(model.state_dict())
        del model
        optimizer = plain.adamw(yardstick.parameters())

        def step() -> None:
            with precision:
                plain.train_step(yardstick, optimizer, clips, labels)

        return step
    return speed.train_run(own, model, clips, labels, low)


def measure(args: argparse.Namespace, case: Case) -> list[Row]:
    """The rows of one case; says ``ready`` on stdout and goes on at a line on stdin."""
    if args.device == 'cuda':
        torch.backends.cudnn.benchmark = True
        if args.memory_limit:
            whole = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_limit * 2**30 / whole))
    forms = [form for form in FORMS[case.work] if form not in args.without]
    peaks: dict[str, float] = {}
    runs: dict[str, speed.Run] = {}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    # Forms of a training step would hold each other's weights: one after the other. Those of an evaluation take turns.
    groups = [[form] for form in forms] if case.work == 'train' else [forms]
    for number, group in enumerate(groups):
        runs.clear()
        gc.collect()
        for form in group:
            try:
                runs[form], peaks[form] = prepared(args, case, form)
            except torch.OutOfMemoryError:
                peaks[form] = float('nan')
                torch.cuda.empty_cache()
        if number == 0:
            print('ready', flush=True)
            sys.stdin.readline()
        for _ in range(args.rounds):
            for form, run in runs.items():
                start = time.perf_counter()
                run()
                speed.synchronise(args.device)
                seconds[form].append(time.perf_counter() - start)
    rows: list[Row] = []
    for form in forms:
        ms = 1000 * statistics.median(seconds[form]) if seconds[form] else None
        count = case.frames if case.work == 'eval' else 1
        row = {**asdict(case), 'form': form, 'ms': ms, 'per_second': ms and 1000 * count / ms}
        row['ratio'] = rows[0]['ms'] / ms if ms and rows and rows[0]['form'] == 'plain' and rows[0]['ms'] else None
        rows.append(row | {'peak_mib': None if peaks[form] != peaks[form] else peaks[form]})
    return rows


def prepared(args: argparse.Namespace, case: Case, form: str) -> tuple[speed.Run, float]:
    """A warm function and the MiB that it needs."""
    if args.device != 'cuda':
        run = make(args, case, form)
        run()
        return run, float('nan')
    empty = torch.cuda.memory_allocated()
    run = make(args, case, form)
    before = torch.cuda.memory_allocated() if case.work == 'eval' else empty
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # processes held 34 GiB when others beside them got ready
    held = torch.cuda.memory_allocated() - before  # CUDA graphs keep their memory
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return run, (held + torch.cuda.max_memory_allocated() - start) / 2**20


def all_rows(args: argparse.Namespace, argv: list[str]) -> Iterator[list[Row]]:
    """Rows case by case, each in a process; ``--jobs`` of them get ready side by side."""
    cases = cases_of(args)
    for first in range(0, len(cases), args.jobs):
        batch = cases[first : first + args.jobs]
        children = []
        for case in batch:
            command = [sys.executable, '-m', 'benchmarks.gpu', *argv, '--case', json.dumps(asdict(case))]
            children.append(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]))
        try:
            for child in children:
                assert child.stdout is not None
                while (line := child.stdout.readline()) and line.strip() != 'ready':
                    pass
            for case, child in zip(batch, children):
                out = child.communicate('go\n')[0] if child.poll() is None else ''
                if child.returncode:
                    print(f'{case}: failed with status {child.returncode}', file=sys.stderr, flush=True)
                    continue
                yield json.loads(out.splitlines()[-1])
        finally:
            for child in children:
                child.kill()


def show(row: Row) -> str:
    """One line of the table."""
    ms, ratio, peak = row['ms'], row['ratio'], row['peak_mib']
    return (
        f'{row["work"]:<6}{row["backbone"]:<8}{row["frames"]:>2}  {row["precision"]:<5}{row["form"]:<13}'
        + ('out of memory' if ms is None else f'{ms:8.2f} ms{row["per_second"]:9.2f}/s')
        + (f'{ratio:7.2f}x' if ratio else f'{"":8}')
        + (f'{peak:9.0f} MiB' if peak is not None else '')
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', nargs='+', choices=FORMS, default=list(FORMS))
    parser.add_argument('--backbone', nargs='+', choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument('--frames', nargs='+', type=int, help='clip lengths (default: eval 1 2 4, train 2)')
    parser.add_argument('--precision', nargs='+', choices=('fp32', 'bf16'), default=['fp32', 'bf16'])
    parser.add_argument('--without', nargs='+', default=[], choices=sorted({f for v in FORMS.values() for f in v}))
    parser.add_argument('--mode', default='reduce-overhead', help="torch.compile's mode; this one uses CUDA graphs")
    parser.add_argument('--size', nargs=2, type=int, metavar=('HEIGHT', 'WIDTH'), help='multiples of 32')
    parser.add_argument('--rounds', type=int, default=15, help='timed calls of each form')
    parser.add_argument('--jobs', type=int, default=max(1, (os.cpu_count() or 1) - 2), help='processes that get ready')
    parser.add_argument('--memory-limit', type=float, metavar='GIB', help='of a process')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--json', type=Path, help='write the rows to this file, after every case')
    parser.add_argument('--case', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    if args.case:
        case = Case(**json.loads(args.case))
        print(json.dumps(measure(args, case)))
        return
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('error: this machine has no GPU that torch can use')
    print(f'{speed.describe(args)}; CUDA {torch.version.cuda}', flush=True)
    table: list[Row] = []
    for rows in all_rows(args, arguments):
        table += rows
        print('\n'.join(show(row) for row in rows), flush=True)
        if args.json:
            args.json.write_text(json.dumps(table, indent=1))


if __name__ == '__main__':
    main()
