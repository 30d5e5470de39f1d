"""Parameters, operations and strides of backbones, as the table of docs/backbones.md; nothing is computed.

python -m benchmarks.backbones
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/backbones.py`

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg.models import backbones as own
from mmseg.models.backbones.external import ExternalBackbone

HEIGHT, WIDTH = 480, 864  # of a frame of 480x853, in multiples of 32


def entries() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and maker of each; those of packages that are not installed are left out."""
    for name in own.VARIANTS:
        yield f'`{name}`', getattr(own, name)
    for i in range(5):
        yield f"`EfficientNetLite('lite{i}')`", partial(own.EfficientNetLite, f'lite{i}')  # type: ignore[arg-type]
    try:
        import transformers
    except ImportError:
        return
    for name, kind in (('Swin-T', 'Swin'), ('ConvNeXt-T', 'ConvNext'), ('DINOv2-S, patch 14', 'Dinov2')):
        options: dict[str, Any] = dict(hidden_size=384, num_attention_heads=6) if kind == 'Dinov2' else {}
        config = getattr(transformers, f'{kind}Config')(**options)
        yield f'`HFBackbone`: {name}', partial(_of_transformers, config)


def _of_transformers(config: Any) -> ExternalBackbone:
    """An :class:`~mmseg.models.backbones.HFBackbone` of a config that is in no folder."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return own.HFBackbone(folder)


def row(name: str, make: Callable[[], nn.Module]) -> str:
    """A line of the table."""
    with torch.device('meta'):
        model: Any = make().eval()
        image = torch.empty(1, 3, HEIGHT, WIDTH)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    channels = ', '.join(map(str, model.out_channels))
    return f'| {name} | {millions:.1f} | {counter.get_total_flops() / 2e9:.1f} | {channels} |'


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f'| backbone | parameters, millions | multiply-adds at {HEIGHT}x{WIDTH}, billions | channels |')
    print('|---|---|---|---|')
    for name, make in entries():
        print(row(name, make))


if __name__ == '__main__':
    main()
