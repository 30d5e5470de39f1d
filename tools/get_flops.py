"""Counts parameters and floating-point operations of a config, part by part, without computing anything."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg.config import OptionsAction, clip_length, config_inputs, load_config, required
from mmseg.kernels.torch_ops import ops
from mmseg.models import build_segmentor
from mmseg.models.decode_heads import pixel_decoder as msdeformattn
from mmseg.utils.arguments import Count, Range, check_value
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.console import table, table_console
from mmseg.utils.files import refuse_overwriting, write_json

EPILOG = """Counted are matrix products, convolutions, attention and multi-scale deformable attention, of one clip in
evaluation, up to the scores at stride 4.  A multiplication with its addition is 2 FLOPs (papers that give "FLOPs" of
about half as much count it as 1: the column GMACs).  Norms, activations, softmax and resizing are left out, as
everywhere.  A sample of deformable attention is 8 FLOPs a channel: 4 corners.

examples:
  python tools/get_flops.py local_configs/themask/video_themask_mit_b1.py
  python tools/get_flops.py local_configs/themask/1f_themask_mit_b5.py --frames 1 --size 480 853 --json flops.json
"""
_Side = Annotated[int, Range(32, 2**16)]


class PartCounter:
    """Attributes the operations of a forward pass to the parts of a model that run while they are counted."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.counter = FlopCounterMode(display=False)
        self.flops = dict.fromkeys(parts, 0)
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name: self._add(name, -1))
            part.register_forward_hook(lambda *_, name=name: self._add(name, 1))

    @property
    def total(self) -> int:
        """All operations so far."""
        return self.counter.get_total_flops()

    @property
    def deformable_attention(self) -> int:
        """The operations of the native op so far."""
        counts = self.counter.get_flop_counts().get('Global', {})
        return sum(flops for op, flops in counts.items() if 'ms_deform_attn' in str(op))

    def _add(self, name: str, sign: int) -> None:
        self.flops[name] += sign * self.total

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what runs inside."""
        with mock.patch.object(msdeformattn, 'ms_deform_attn_fused', _registered_op), self.counter:
            yield


def _registered_op(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], *others: Tensor) -> Tensor:
    """The op as it is registered with torch, with a shape and a FLOP formula, whichever backend this machine has."""
    return ops.ms_deform_attn(value, [side for shape in spatial_shapes for side in shape], *others)


def count(cfg: Any, frames: int, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Parameters and FLOPs of each part of a model.

    Args:
        cfg: the loaded config.
        frames: T of the clip.
        size: (height, width) of the input.

    Returns:
        Part -> ``parameters`` and ``flops``; ``deformable attention`` is a share of the pixel decoder's.
    """
    with torch.device('meta'):
        model = build_segmentor(required(cfg, 'model'), cfg.get('train_cfg'), cfg.get('test_cfg'))
        model.eval().requires_grad_(False)
        clip = torch.empty(1, frames, 3, *size)
    head: Any = model.decode_head
    parts = {'backbone': model.backbone, 'pixel decoder': head.pixel_decoder, 'mask decoder': head.predictor}
    counter = PartCounter(parts)
    with torch.no_grad(), counter.counting():
        model.scores(clip)
    table = {name: {'parameters': _parameters(part), 'flops': counter.flops[name]} for name, part in parts.items()}
    total = {'parameters': _parameters(model), 'flops': counter.total}
    rest = {key: total[key] - sum(part[key] for part in table.values()) for key in total}
    op = {'parameters': 0, 'flops': counter.deformable_attention}
    return {'backbone': table['backbone'], 'pixel decoder': table['pixel decoder'], 'deformable attention': op,
            'mask decoder': table['mask decoder'], 'scores': rest, 'total': total}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument('config')
    parser.add_argument('--size', '--shape', type=int, nargs=2, default=(480, 864), metavar=('H', 'W'),
                        help='of the input, after the test pipeline (default 480 864)')
    parser.add_argument('--frames', type=int, help='of the clip (default: test_size of the config)')
    OptionsAction.add_to(parser)
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Counts, writes and prints."""
    refuse_overwriting({'--json': args.json}, config_inputs(args.config))
    check_value(args.frames, Count | None, '--frames')
    check_value(args.size, tuple[_Side, _Side], '--size')
    cfg = load_config(args.config, args.options)
    frames = args.frames or clip_length(cfg)
    parts = count(cfg, frames, tuple(args.size))
    write_json(args.json, {'frames': frames, 'size': list(args.size), 'parts': parts})
    rows = [('  of these in deformable attention' if name == 'deformable attention' else name,
             f'{part["parameters"] / 1e6:.2f}', f'{part["flops"] / 1e9:.2f}', f'{part["flops"] / 2e9:.2f}',
             f'{part["flops"] / 1e9 / frames:.2f}') for name, part in parts.items()]
    table_console().print(table(
        ('part', 'parameters, M', 'GFLOPs', 'GMACs', 'GFLOPs a frame'), rows,
        f'{frames} frames of {args.size[1]}x{args.size[0]}'))


def main() -> int:
    """Runs the command line."""
    args = parse_args()
    return run_tool(lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())
