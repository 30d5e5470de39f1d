"""Time to import COCO annotations: 1,000 images of 640x480 with 7 polygons each.

python -m benchmarks.import_coco
python -m benchmarks.import_coco --images 200 --polygons 20
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/import_coco.py`

import cv2
import numpy as np

from mmseg.apps.annotations import READERS, import_annotations

WIDTH, HEIGHT = 640, 480


def write_coco(folder: Path, images: int, polygons: int) -> Path:
    """Smooth outlines of 20 to 60 points about random centres, on a few different pictures."""
    rng = np.random.default_rng(0)
    content: dict[str, list[dict]] = {
        'images': [], 'annotations': [], 'categories': [{'id': i, 'name': f'class {i}'} for i in range(80)]}
    pictures = [cv2.imencode('.jpg', cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (WIDTH, HEIGHT)))[1]
                for _ in range(8)]  # fmt: skip
    for i in range(images):
        (folder / f'{i:06d}.jpg').write_bytes(pictures[i % 8].tobytes())
        content['images'].append({'id': i, 'file_name': f'{i:06d}.jpg', 'width': WIDTH, 'height': HEIGHT})
        for _ in range(polygons):
            angle = np.linspace(0, 2 * np.pi, rng.integers(20, 60), endpoint=False)
            radius = rng.uniform(20, 150) * (1 + 0.2 * np.sin(rng.integers(2, 6) * angle))
            x = rng.uniform(50, WIDTH - 50) + radius * np.cos(angle)
            y = rng.uniform(50, HEIGHT - 50) + radius * np.sin(angle)
            content['annotations'].append({
                'id': len(content['annotations']), 'image_id': i, 'category_id': int(rng.integers(80)), 'iscrowd': 0,
                'area': float(np.pi * radius.mean() ** 2), 'segmentation': [np.stack([x, y], 1).ravel().tolist()]})
    (folder / 'instances.json').write_text(json.dumps(content))
    return folder / 'instances.json'


def main() -> None:
    """Makes the data, imports them, and prints the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=1000)
    parser.add_argument('--polygons', type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'in').mkdir()
        source = write_coco(Path(folder) / 'in', args.images, args.polygons)
        start = time.perf_counter()
        report = import_annotations(READERS['coco'], source, Path(folder) / 'out')
        seconds = time.perf_counter() - start
    print(f'{sum(report.frames.values())} images, {sum(report.annotations.values())} annotations: {seconds:.1f} s')


if __name__ == '__main__':
    main()
