"""Publishes a trained model: the weights alone, eight digits of their SHA-256 in the file name, and a model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apps.publish import publish_model
from mmseg.utils.cli import ArgumentParser, run_tool

EXAMPLES = r"""examples:
  # work_dirs/video_b1/latest.pth -> models/video_themask_mit_b1-1a2b3c4d.pth and .md
  python tools/publish_model.py work_dirs/video_b1/latest.pth models/video_themask_mit_b1.pth \
      --config local_configs/themask/video_themask_mit_b1.py

  # with the scores that tools/test.py wrote, as safetensors
  python tools/publish_model.py work_dirs/video_b1/latest.pth models/video_b1.safetensors \
      --metrics work_dirs/video_b1/test/metrics.json --data 'VSPW val'
"""


def main() -> int:
    """Publishes one model; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('checkpoint', type=Path, help='checkpoint of training, or its work dir')
    parser.add_argument('out', type=Path, help='folder/name.pth or .safetensors; the hash is added to the name')
    parser.add_argument('--config', help='config file of the model, for the card')
    parser.add_argument('--metrics', type=Path, help='JSON file of tools/test.py, for the card')
    parser.add_argument('--data', help='data set and split of the metrics, for the card')
    return run_tool(lambda: publish(**vars(parser.parse_args())))


def publish(**options: Any) -> None:
    """Publishes one model, and says where it is."""
    published = publish_model(**options)
    print(f'weights: {published.weights}\ncard:    {published.card}\nsha256:  {published.sha256}')


if __name__ == '__main__':
    sys.exit(main())
