"""Says what was found, built and chosen; checks each native op against the PyTorch form, and times both.

Run as ``python -m mmseg.models.decode_heads.mask2former.pixel_decoder.ops``. The exit status is 1 if a check fails or
if the backend asked for cannot be had. ``benchmarks/ms_deform_attn.py`` measures with more care.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mmseg.kernels import library
from mmseg.kernels.library import BackendError
from mmseg.kernels.ms_deform_attn import ms_deform_attn_fused, ms_deform_attn_fused_pytorch
from mmseg.kernels.torch_ops import uses_native

SHAPES = ((15, 27), (30, 54), (60, 108))  # a 480x864 image at strides 32, 16, 8
TOLERANCE = 1e-4

Arguments = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]


def example(device: str, shapes: Sequence[tuple[int, int]]) -> Arguments:
    """Random arguments, one query a pixel; some samples lie outside."""
    pixels, levels = sum(h * w for h, w in shapes), len(shapes)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, pixels, 8, 32, generator=generator).to(device)
    reference = torch.rand(1, pixels, levels, 2, generator=generator).to(device)
    offsets = 3 * torch.randn(1, pixels, 8, levels, 4, 2, generator=generator).to(device)
    logits = torch.randn(1, pixels, 8, 4 * levels, generator=generator).to(device)
    return value, list(shapes), reference, offsets, logits


def evaluate(function, arguments: Arguments) -> list[Tensor]:
    """The output and the gradients of value, offsets and logits."""
    value, shapes, reference, *others = arguments
    leaves = [tensor.clone().requires_grad_() for tensor in (value, *others)]
    out = function(leaves[0], shapes, reference, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out.square().sum() / 2, leaves)]


def milliseconds(function: Callable[[], object]) -> float:
    """The mean of some calls."""
    return Timer('run()', globals={'run': function}, num_threads=torch.get_num_threads()).timeit(5).mean * 1e3


def check(device: str, shapes: Sequence[tuple[int, int]] = SHAPES) -> bool:
    """Compare the op of a device with the PyTorch form and time both; False if they differ."""
    arguments = example(device, shapes)
    good = True
    names = ('output', 'gradient of value', 'gradient of offsets', 'gradient of logits')
    results = zip(names, evaluate(ms_deform_attn_fused, arguments), evaluate(ms_deform_attn_fused_pytorch, arguments))
    for name, ours, expected in results:
        # At a pixel border rounding decides between two one-sided derivatives: one sample in a hundred is left out.
        differences = ((ours - expected).abs() / (1 + expected.abs().max())).flatten()
        difference = float(differences.kthvalue(int(0.99 * differences.numel())).values)
        good &= difference < TOLERANCE
        print(f'  {name} differs by {difference:.1e} ({"ok" if difference < TOLERANCE else "WRONG"})')
    for label, function in (('op', ms_deform_attn_fused), ('PyTorch form', ms_deform_attn_fused_pytorch)):
        with torch.no_grad():
            forward = milliseconds(functools.partial(function, *arguments))
        both = milliseconds(functools.partial(evaluate, function, arguments))
        print(f'  {label}: forward {forward:.1f} ms, with backward {both:.1f} ms')
    return good


def main() -> int:
    """Print the report; the exit status."""
    print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads')
    print(f'THEMASK_OPS_BACKEND: {library.requested()}\nTHEMASK_OPS_CACHE: {library.cache_dir()}')
    kinds: tuple[library.Kind, ...] = ('cpu', 'cuda')
    for kind in kinds:
        compiler = library.find_compiler(kind)
        print(f'compiler for {kind}: {shlex.join(compiler) if compiler else "none"}')
    good = True
    for kind in kinds:
        if kind == 'cuda' and not torch.cuda.is_available():
            print('cuda: no GPU that this torch can use')
            continue
        try:
            native = uses_native(kind)
        except BackendError as error:
            print(f'{kind}: {error}')
            good = False
            continue
        if native:
            detail = library.instruction_set() if kind == 'cpu' else torch.cuda.get_device_name()
            print(f'{kind}: native op, {detail}, {library.library(kind)}')
        else:
            print(f'{kind}: PyTorch form')
        good &= check(kind)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
