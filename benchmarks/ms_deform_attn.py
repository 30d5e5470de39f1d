"""Times MSDeformAttn's fused op: PyTorch form, plain C++ loop, every kernel of this machine, torch-ms-deform-attn.

One table a run: milliseconds (the fastest of all repeats, taken in turns so that a busy machine slows all alike),
ratio to the PyTorch form, the bytes that must move at least once, and the share of the copy bandwidth measured in the
same run that this means. Sizes: a 480x864 test image (N = 1, 2 frames) and a 480x480 training clip (N = 4).

On a GPU the time is that of the device: calls are recorded as CUDA graphs and replayed, so that launches do not count.
There "gather" is what the corners of all samples read (the backward pass: read, and add to the gradient), which the
cache answers, and its share is that of the bandwidth of a copy that stays in the cache; the larger of the two shares
tells how near to its floor a kernel is.

Rows in bfloat16 hold ours alone, with float32 locations and weights.

    python -m benchmarks.ms_deform_attn [--json FILE] [--device cuda] [--repeats 15] [--threads N]
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/ms_deform_attn.py`

import torch
from torch import Tensor

from mmseg.kernels import library
from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused_pytorch
from mmseg.kernels.torch_ops import ops

HEADS, WIDTH, POINTS, STRIDES = 8, 32, 4, (32, 16, 8)
SIZES = {'480x864 N=1': (1, 480, 864), '480x864 N=2': (2, 480, 864), '480x480 N=4': (4, 480, 480)}

Arguments = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]
Runner = Callable[[bool], None]  # True: forward and backward


def inputs(n: int, height: int, width: int, device: str = 'cpu') -> Arguments:
    """Arguments as the pixel decoder makes them: pixel centres, offsets of the initial pattern plus noise."""
    shapes = [(height // s, width // s) for s in STRIDES]
    pixels = sum(h * w for h, w in shapes)
    centres = [
        torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing='ij')[::-1], -1)
        for h, w in shapes
    ]
    reference = torch.cat([c.flatten(0, 1) for c in centres])[None, :, None].repeat(1, 1, len(shapes), 1)
    angles = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    pattern = torch.stack((angles.cos(), angles.sin()), -1)
    pattern = pattern / pattern.abs().amax(-1, keepdim=True)
    offsets = pattern[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
    offsets = offsets + torch.randn(n, pixels, HEADS, len(shapes), POINTS, 2)
    value = torch.randn(n, pixels, HEADS, WIDTH)
    logits = torch.randn(n, pixels, HEADS, len(shapes) * POINTS)
    return value.to(device), shapes, reference.to(device), offsets.to(device), logits.to(device)


def bytes_to_move(arguments: Arguments, backward: bool) -> int:
    """Every input read once and every output written once; the backward pass reads the inputs again."""
    value, _, reference, offsets, logits = arguments
    read = sum(t.numel() * t.element_size() for t in (value, reference, offsets, logits))
    out = value.numel() * value.element_size()  # one query a pixel
    gradients = read - reference.numel() * reference.element_size()
    return read + out + ((read + out + gradients) if backward else 0)


def bytes_to_gather(arguments: Arguments, backward: bool) -> int:
    """Four corners of every sample; the backward pass reads them again and adds to the gradient of each in float32."""
    value, _, _, offsets, _ = arguments
    corners = offsets.numel() // 2 * 4 * value.shape[3]
    return corners * value.element_size() + (corners * (value.element_size() + 4) if backward else 0)


def autograd_runner(function: Callable[..., Tensor], arguments: Arguments, grad_out: Tensor) -> Runner:
    """Runs a differentiable form; gradients of value, offsets and logits, as in training."""
    value, shapes, reference, offsets, logits = arguments
    leaves = [t.clone().requires_grad_() for t in (value, offsets, logits)]

    def run(backward: bool) -> None:
        if not backward:
            with torch.no_grad():
                function(value, shapes, reference, offsets, logits)
            return
        torch.autograd.grad(function(leaves[0], shapes, reference, *leaves[1:]), leaves, grad_out)

    return run


def native_runner(arguments: Arguments, grad_out: Tensor, instruction_set: str | None) -> Runner:
    """Runs the native op, on the CPU with one instruction set."""
    flat = [size for shape in arguments[1] for size in shape]
    run = autograd_runner(lambda value, _, *others: ops.ms_deform_attn(value, flat, *others), arguments, grad_out)

    def chosen(backward: bool) -> None:
        library.choose_instruction_set(instruction_set or '')
        run(backward)

    return chosen if instruction_set else run


def loop_runner(arguments: Arguments, grad_out: Tensor, folder: str) -> Runner | None:
    """Compiles and runs the plain C++ loop; None without a compiler or OpenMP."""
    compiler = library.find_compiler('cpu')
    path = Path(folder) / 'loop.so'
    if compiler is None:
        return None
    if not path.exists():
        source = Path(__file__).with_name('ms_deform_attn_loop.cpp')
        flags = ['-std=c++17', '-O3', '-march=native', '-fopenmp', '-shared', '-fPIC']
        if subprocess.run([*compiler, *flags, str(source), '-o', str(path)], capture_output=True).returncode:
            return None
    loop = ctypes.CDLL(str(path)).plain_loop
    value, shapes, reference, offsets, logits = arguments
    flat = [size for shape in shapes for size in shape]
    n, pixels, heads, width = value.shape
    sizes = [n, pixels, heads, width, pixels, len(shapes), POINTS, *flat]

    def run(backward: bool) -> None:
        def call(*tensors: Tensor | None) -> None:
            pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
            loop((ctypes.c_int64 * len(sizes))(*sizes), *pointers)

        call(value, reference, offsets, logits, torch.empty(n, pixels, heads * width), None, None, None, None)
        if backward:
            gradients = torch.zeros_like(value), torch.empty_like(offsets), torch.empty_like(logits)
            call(value, reference, offsets, logits, None, grad_out, *gradients)

    return run


def package_runner(arguments: Arguments, grad_out: Tensor) -> Runner | None:
    """Runs the package torch-ms-deform-attn where it is installed; PyTorch makes softmax and locations, as usual.

    A package that cannot run here (built for another torch or for GPUs alone) is one line on stderr, and None.
    """
    if importlib.util.find_spec('torch_ms_deform_attn') is None:
        return None
    shapes = arguments[1]
    sizes = torch.tensor(shapes, device=grad_out.device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    try:
        from torch_ms_deform_attn import ms_deform_attn as theirs

        def function(value: Tensor, _: list, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            locations = reference[:, :, None, :, None] + offsets / sizes.flip(-1)[:, None]
            weights = logits.softmax(-1).view(offsets.shape[:-1])
            return theirs(value, sizes, starts, locations, weights)

        run = autograd_runner(function, arguments, grad_out)
        run(True)
    except Exception as error:  # of another project: anything may come out of it
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        print(f'torch-ms-deform-attn is installed but does not run here and is left out: {reason}', file=sys.stderr)
        return None
    return run


def runners(arguments: Arguments, device: str, folder: str) -> dict[str, Runner]:
    """All forms that this machine has, by name; the PyTorch form first."""
    value = arguments[0]
    grad_out = torch.randn(value.shape[0], value.shape[1], HEADS * WIDTH, device=device)
    found: dict[str, Runner | None] = {
        'PyTorch form': autograd_runner(ms_deform_attn_fused_pytorch, arguments, grad_out)
    }
    low = (value.bfloat16(), *arguments[1:])
    if device == 'cpu':
        found['plain C++ loop'] = loop_runner(arguments, grad_out, folder)
        for name in library.instruction_sets():
            found[f'native {name}'] = native_runner(arguments, grad_out, name)
            found[f'native {name}, bf16'] = native_runner(low, grad_out.bfloat16(), name)
    elif not isinstance(library.native('cuda'), library.BuildError):
        found['native cuda'] = native_runner(arguments, grad_out, None)
        found['native cuda, bf16'] = native_runner(low, grad_out.bfloat16(), None)
    found['torch-ms-deform-attn'] = package_runner(arguments, grad_out)
    return {name: runner for name, runner in found.items() if runner}


def milliseconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def on_device(function: Callable[[], object], calls: int = 10) -> Callable[[], float]:
    """A measurement of the GPU's own milliseconds for one call, from replays of a CUDA graph of ``calls`` of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return measure


def timer(device: str, function: Callable[[], object]) -> Callable[[], float]:
    """Measures one call each time it is called."""
    return on_device(function) if device == 'cuda' else functools.partial(milliseconds, function)


def bandwidth(device: str, mebibytes: int = 256) -> float:
    """Bytes a second of a copy (read and written) of so many MiB, the best of ten."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    measure = timer(device, functools.partial(target.copy_, source))
    return 2 * source.numel() * source.element_size() / min(measure() for _ in range(10)) * 1e3


def measure(size: str, device: str, repeats: int, folder: str) -> list[dict]:
    """The rows of one size: name, size, pass, ms, ratio, bytes."""
    arguments = inputs(*SIZES[size], device=device)
    candidates = runners(arguments, device, folder)
    rows = []
    for backward, label in ((False, 'forward'), (True, 'forward+backward')):
        best = dict.fromkeys(candidates, float('inf'))
        timers = {name: timer(device, functools.partial(run, backward)) for name, run in candidates.items()}
        for repeat in range(repeats + 1):  # the first warms up
            for name, elapsed in timers.items():
                ms = elapsed()
                if repeat:
                    best[name] = min(best[name], ms)
        low = (arguments[0].bfloat16(), *arguments[1:])
        for name, ms in best.items():
            own = low if name.endswith('bf16') else arguments
            moved, gathered = (count(own, backward) for count in (bytes_to_move, bytes_to_gather))
            row = {'name': name, 'size': size, 'pass': label, 'ms': ms, 'ratio': best['PyTorch form'] / ms}
            rows.append(row | {'bytes': moved, 'gathered': gathered})
    return rows


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows {name, size, pass, ms, ratio, ...}')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--size', nargs='+', choices=tuple(SIZES), default=tuple(SIZES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ['OMP_NUM_THREADS'] = str(arguments.threads)  # of the plain loop
    torch.manual_seed(0)

    where = processor() if arguments.device == 'cpu' else torch.cuda.get_device_name()
    allocator = {k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD'))}
    print(f'{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32 unless named otherwise')
    print(f'allocator settings: {allocator or "none"}')
    gpu = arguments.device == 'cuda'
    speed = bandwidth(arguments.device)
    cache = bandwidth(arguments.device, 8) if gpu else 0
    print(
        f'copy bandwidth {speed / 1e9:.1f} GB/s{f", in the cache {cache / 1e9:.1f} GB/s" if gpu else ""}; '
        f'best of {arguments.repeats}, forms in turns'
    )
    columns = f'{"size":<12} {"pass":<17} {"form":<21} {"ms":>9} {"ratio":>7} {"MB":>7} {"of bandwidth":>13}'
    print(columns + (f'{"gather MB":>10} {"of cache":>9}' if gpu else ''))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.size:
            for row in measure(size, arguments.device, arguments.repeats, folder):
                row['bandwidth_share'] = row['bytes'] / (row['ms'] / 1e3) / speed
                line = (
                    f'{row["size"]:<12} {row["pass"]:<17} {row["name"]:<21} {row["ms"]:>9.3f} {row["ratio"]:>6.1f}x '
                    f'{row["bytes"] / 1e6:>7.1f} {row["bandwidth_share"]:>12.1%}'
                )
                if gpu:
                    row['cache_share'] = row['gathered'] / (row['ms'] / 1e3) / cache
                    line += f'{row["gathered"] / 1e6:>11.1f} {row["cache_share"]:>9.1%}'
                rows.append(row)
                print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
