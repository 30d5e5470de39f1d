"""Converts checkpoints between this project, the 2023 reference, SegFormer, Hugging Face and Mask2Former.

The format of SOURCE is recognised from its names.  Every tensor is accounted for in the printed report; nothing is
written while a name stays unexplained (leave names out with --drop).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mmseg.apps.convert import SOURCES, TARGETS, convert_state_dict, files_of, read_weights, write_weights
from mmseg.config import config_inputs, load_config
from mmseg.models import build_segmentor
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.errors import CheckpointError
from mmseg.utils.files import refuse_overwriting, write_json

EXAMPLES = r"""examples:
  # a checkpoint of the reference into ours, checked against a config; and back again
  python tools/convert_checkpoint.py reference.pth ours.pth --config local_configs/themask/video_themask_mit_b1.py
  python tools/convert_checkpoint.py ours.pth reference.pth --to reference

  # ImageNet weights of MiT, from SegFormer or from Hugging Face, for model.pretrained=pretrained/mit_b1.pth
  python tools/convert_checkpoint.py model.safetensors pretrained/mit_b1.pth --to mit

  # Mask2Former's pixel decoder and mask decoder over SegFormer's backbone, as a start for stage 1
  python tools/convert_checkpoint.py model_final_54b88a.pkl start.pth --add pretrained/mit_b1.pth \
      --config local_configs/themask/1f_themask_mit_b1.py
  ./tools/dist_train.sh local_configs/themask/1f_themask_mit_b1.py 1 --work-dir DIR --load-from start.pth

  # another container
  python tools/convert_checkpoint.py ours.pth ours.safetensors
"""


def expected_shapes(config: str) -> dict[str, list[int]]:
    """Name -> shape of the model of a config file; no memory is taken for it."""
    cfg = load_config(config, {'model.pretrained': None})
    with torch.device('meta'):
        model = build_segmentor(cfg.model)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def convert(args: argparse.Namespace) -> None:
    """Converts one file, or joins several."""
    inputs: dict[str, Path] = {**config_inputs(args.config)}
    sources = [args.source, *args.add]
    for path in sources:
        inputs |= files_of(path)
    refuse_overwriting({'out': args.out, '--json': args.json}, inputs)
    refuse_overwriting({'--json': args.json}, {'converted checkpoint': args.out})
    expected = expected_shapes(args.config) if args.config else None
    converted: dict[str, torch.Tensor] = {}
    reports, metas = [], []
    for path, source_format in zip(sources, (args.source_format, *('auto' for _ in args.add))):
        state, meta = read_weights(path)
        more, report = convert_state_dict(state, source_format, args.target_format, expected, args.drop)
        twice = sorted(converted.keys() & more.keys())
        if twice:
            raise CheckpointError(f"--add: '{path}' gives {len(twice)} tensors a second time, such as {twice[0]}")
        converted |= more
        reports.append(report)
        metas.append(meta)
    for report in reports:  # what one file does not give, another may
        report.missing = [name for name in report.missing if name not in converted]
        print(report)
    write_json(args.json, [asdict(report) for report in reports] if args.add else asdict(reports[0]))
    unknown = [name for report in reports for name in report.unknown]
    if unknown:
        raise CheckpointError(f'{len(unknown)} names are unexplained; nothing is written (see --drop)')
    if args.strict and any(report.missing or report.mismatched for report in reports):
        raise CheckpointError('--strict: not every tensor of the model is given; nothing is written')
    if not converted:
        raise CheckpointError('no tensor is left; nothing is written')
    write_weights(args.out, converted, metas[0])
    print(f'wrote {args.out}: {len(converted)} tensors, {sum(t.numel() for t in converted.values()):,} numbers')


def main() -> int:
    """Converts one file; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('source', type=Path, help='.pth, .safetensors, a .pkl of detectron2, or a work dir')
    parser.add_argument('out', type=Path, help='.pth or .safetensors')
    parser.add_argument('--from', dest='source_format', choices=('auto', *SOURCES), default='auto')
    parser.add_argument('--to', dest='target_format', choices=TARGETS, default='themask')
    parser.add_argument('--config', help='check names and shapes against the model of this config')
    parser.add_argument('--add', nargs='+', default=[], type=Path, metavar='FILE',
                        help='more files with other parts of the model, of any known format')
    parser.add_argument('--drop', nargs='+', default=[], metavar='PATTERN', help='names to leave out (* and ?)')
    parser.add_argument('--strict', action='store_true', help='fail where a tensor is missing or has another shape')
    parser.add_argument('--json', type=Path, help='write the whole report, name by name')
    args = parser.parse_args()
    return run_tool(lambda: convert(args))


if __name__ == '__main__':
    sys.exit(main())
