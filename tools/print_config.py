"""Prints the final config: after ``_base_``, overrides and checks; or what differs between two."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.config import OptionsAction, as_text, config_inputs, load_config
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.files import refuse_overwriting, write_atomically

EPILOG = """examples:
  python tools/print_config.py local_configs/themask/video_themask_mit_b1.py
  python tools/print_config.py CONFIG --options runner.max_iters=12000 model.pretrained=None --out final.py
  python tools/print_config.py local_configs/themask/1f_themask_mit_b1.py \\
      --diff local_configs/themask/video_themask_mit_b1.py
"""
_ABSENT = object()


def flatten(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; lists of dicts are walked by position."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f'{path}.{key}' if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from flatten(item, f'{path}[{i}]')
    else:
        yield path, value


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path, value in the first, value in the second) of every leaf that differs, in the order of the first."""
    a, b = dict(flatten(first)), dict(flatten(second))
    rows = ((path, a.get(path, _ABSENT), b.get(path, _ABSENT)) for path in {**a, **b})
    return [row for row in rows if row[1] is _ABSENT or row[2] is _ABSENT or row[1] != row[2]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--diff', metavar='OTHER', help='print only what differs from this config (exit status 1 then)')
    OptionsAction.add_to(parser, 'overrides of CONFIG, as in training')
    parser.add_argument('--out', type=Path, help='write the final config to this .py file, which can be trained')
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Prints or writes what is asked for; returns the exit status."""
    refuse_overwriting({'--out': args.out}, {**config_inputs(args.config), 'other config': args.diff})
    config = load_config(args.config, args.options)
    other = load_config(args.diff) if args.diff else None
    text = as_text(config) if args.out or other is None else ''
    if args.out:
        write_atomically(args.out, text)
    if other is None:
        if not args.out:
            print(text)
        return 0
    rows = differences(config.to_dict(), other.to_dict())
    for path, first, second in rows:
        if first is not _ABSENT:
            print(f'- {path} = {first!r}')
        if second is not _ABSENT:
            print(f'+ {path} = {second!r}')
    print(f'{len(rows)} differences' if rows else 'no difference')
    return 1 if rows else 0


def main() -> int:
    """Runs the command line."""
    args = parse_args()
    return run_tool(lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())
