"""COCO JSON (polygons, run lengths of both kinds, crowds), and Roboflow's exports in folders of splits.

The format is that of cocodataset.org/#format-data; of Roboflow it is "COCO segmentation", or "Semantic segmentation
masks".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg.apps.annotations.read_masks import read_roboflow_masks
from mmseg.apps.annotations.records import Annotation, Faults, ImageFolder, Picture, Read, load_json, polygon_points
from mmseg.apps.annotations.shapes import decode_runs, decode_text, fill_polygon
from mmseg.utils.errors import DataError

_SPLITS = {'train': 'train', 'valid': 'val', 'val': 'val', 'test': 'test'}
_ROBOFLOW = '_annotations.coco.json'


def read_coco(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads one file; images lie beside it, in a folder ``images``, or where ``images`` says."""
    folder = images or (source.parent / 'images' if (source.parent / 'images').is_dir() else source.parent)
    return _read([(source, folder, None)], faults)


def read_roboflow(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads the folders ``train``, ``valid`` and ``test`` of an export, as COCO or as masks."""
    folders = [(source / name, split) for name, split in _SPLITS.items() if (source / name).is_dir()]
    if not folders:
        raise DataError(f"{source}: expected the folders train, valid or test of Roboflow's export")
    if all((folder / _ROBOFLOW).is_file() for folder, _ in folders):
        return _read([(folder / _ROBOFLOW, folder, split) for folder, split in folders], faults, drop_unused=True)
    return read_roboflow_masks(folders, faults)


def _read(files: list[tuple[Path, Path, str | None]], faults: Faults, drop_unused: bool = False) -> Read:
    contents = [(load_json(file, dict), file, folder, split) for file, folder, split in files]
    names: dict[str, None] = {}
    used: Counter[str] = Counter()
    for content, file, _, _ in contents:
        categories = _categories(content, file)
        names.update(dict.fromkeys(categories.values()))
        used.update(categories.get(each.get('category_id'), '') for each in content.get('annotations', ())
                    if isinstance(each, dict))
    classes = [name for name in names if used[name] or not drop_unused]
    number = sum(len(content.get('images', ())) for content, *_ in contents)
    return Read(classes, _pictures(contents, faults), number, [file for file, *_ in files])


def _categories(content: dict[str, Any], file: Path) -> dict[Any, str]:
    try:
        return {category['id']: str(category['name']) for category in content['categories']}
    except (KeyError, TypeError):
        raise DataError(f"{file}: expected 'categories' with id and name; is it COCO JSON?") from None


def _pictures(contents: list[Any], faults: Faults) -> Iterator[Picture]:
    for content, file, folder, split in contents:
        categories, found = _categories(content, file), ImageFolder(folder)
        of_image: dict[Any, list[tuple[float, Annotation]]] = {}
        for i, entry in enumerate(content.get('annotations', ())):
            where = f'{file}, annotation {entry.get("id", i) if isinstance(entry, dict) else i}'
            if not isinstance(entry, dict) or 'image_id' not in entry:
                faults.add(f'{where}: has no image_id')
            elif entry.get('category_id') not in categories:
                faults.add(f'{where}: category {entry.get("category_id")!r} is not in the list of categories')
            else:
                pair = _annotation(entry, categories[entry['category_id']], where)
                of_image.setdefault(entry['image_id'], []).append(pair)
        seen: dict[str, Any] = {}
        for entry in content.get('images', ()):
            where = f'{file}, image {entry.get("id") if isinstance(entry, dict) else entry!r}'
            if not isinstance(entry, dict) or not isinstance(entry.get('file_name'), str) or 'id' not in entry:
                faults.add(f'{where}: has no id or no file_name')
                continue
            if seen.setdefault(entry['file_name'], entry['id']) != entry['id']:
                faults.add(f"{where}: has the name '{entry['file_name']}' of image {seen[entry['file_name']]}")
                of_image.pop(entry['id'], None)
                continue
            own = of_image.pop(entry['id'], [])
            path = found.find(entry['file_name'], faults, where)
            if path is not None:
                largest_first = sorted(own, key=lambda pair: -pair[0])
                yield Picture(entry['file_name'], path, [each for _, each in largest_first], split)
        for image, left in of_image.items():
            faults.add(f'{left[0][1].where}: image {image!r} is not in the list of images ({len(left)} annotations)')


def _annotation(entry: dict[str, Any], label: str, where: str) -> tuple[float, Annotation]:
    """Its area and itself."""
    segmentation = entry.get('segmentation')
    draw, kind = None, 'box alone'
    if isinstance(segmentation, dict):
        draw, kind = partial(_draw_runs, segmentation), 'run lengths'
    elif isinstance(segmentation, list) and segmentation:
        draw, kind = partial(_draw_polygons, segmentation, where), 'polygon'
    area = entry.get('area')
    if not isinstance(area, (int, float)):
        box = entry.get('bbox')
        area = box[2] * box[3] if isinstance(box, list) and len(box) == 4 else 0
    return float(area), Annotation(label, where, draw, kind)


def _draw_polygons(parts: list[Any], where: str, height: int, width: int) -> np.ndarray:
    """The union of the parts of an object."""
    mask = np.zeros((height, width), bool)
    for part in parts if isinstance(parts[0], list) else [parts]:
        mask |= fill_polygon(polygon_points(part, where), height, width)
    return mask


def _draw_runs(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    size = segmentation.get('size')
    if size is not None and list(size) != [height, width]:
        raise ValueError(f'run lengths of an image of {size} (height, width), which is {[height, width]}')
    counts = segmentation.get('counts')
    if isinstance(counts, str):
        counts = decode_text(counts)
    if not isinstance(counts, list):
        raise ValueError(f'run lengths should be a list or a text, got {type(counts).__name__}')
    return decode_runs(counts, height, width)
