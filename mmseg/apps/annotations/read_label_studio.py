"""Label Studio's JSON export: polygons, brushes, rectangles and ellipses in per cent of the image.

Facts from labelstud.io/guide/task_format and the converter's description of the brush.  Of several annotations of a
task the last one that was not cancelled counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np

from mmseg.apps.annotations.records import (
    Annotation,
    Faults,
    ImageFolder,
    Picture,
    Read,
    load_json,
    polygon_points,
    unique,
)
from mmseg.apps.annotations.shapes import decode_brush, fill_ellipse, fill_polygon, rectangle
from mmseg.utils.errors import DataError
from mmseg.utils.names import natural_key

_KINDS = {
    'polygonlabels': 'polygon', 'brushlabels': 'brush', 'rectanglelabels': 'rectangle', 'ellipselabels': 'ellipse'}
_UPLOAD = re.compile(r'^[0-9a-f]{8}-')  # put before the name of a file that was uploaded


def read_label_studio(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads one JSON file; images lie beside it, or where ``images`` says."""
    tasks = load_json(source, list)
    folder = ImageFolder(images or source.parent)
    results = [(task, list(_results(task))) for task in tasks if isinstance(task, dict)]
    if len(results) < len(tasks):
        raise DataError(f'{source}: expected a list of tasks')
    names = unique(label for _, own in results for entry in own for label in _labels(entry)[1])
    ignored = Counter(str(entry.get('type', 'without type')) for _, own in results for entry in own
                      if not _labels(entry)[1])
    pictures = _pictures(results, folder, source, faults)
    return Read(sorted(names, key=natural_key), pictures, len(results), [source], ignored)


def _results(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    done = [each for each in task.get('annotations') or task.get('completions') or ()
            if isinstance(each, dict) and not each.get('was_cancelled')]
    for entry in (done[-1].get('result') or ()) if done else ():
        if isinstance(entry, dict):
            yield entry


def _labels(entry: dict[str, Any]) -> tuple[str, list[str]]:
    value = entry.get('value')
    for key, kind in _KINDS.items():
        if isinstance(value, dict) and isinstance(value.get(key), list):
            return kind, [str(label) for label in value[key]]
    return '', []


def _pictures(results: list[Any], folder: ImageFolder, source: Path, faults: Faults) -> Iterator[Picture]:
    for i, (task, entries) in enumerate(results):
        where = f'{source}, task {task.get("id", i)}'
        data = task.get('data')
        links = [v for v in data.values() if isinstance(v, str)] if isinstance(data, dict) else []
        link = (data.get('image') if isinstance(data, dict) else None) or next(iter(links), None)
        if not isinstance(link, str):
            faults.add(f'{where}: has no image')
            continue
        name = _file_name(link)
        known = any(name == path.name for path in folder.folder.rglob(name)) if '/' not in name else False
        path = folder.find(name if known else _UPLOAD.sub('', name), faults, where)
        if path is None:
            continue
        annotations = []
        for entry in entries:
            kind, labels = _labels(entry)
            inside = f'{where}, region {entry.get("id")}'
            if len(labels) == 1:
                annotations.append(Annotation(labels[0], inside, partial(_draw, kind, entry), kind))
            elif labels:
                faults.add(f'{inside}: has {len(labels)} labels')
        yield Picture(path.relative_to(folder.folder).as_posix(), path, annotations)


def _file_name(link: str) -> str:
    """The name of the file behind a link: of an upload, of local storage (``?d=``), or of any other address."""
    parts = urlparse(link)
    local = parse_qs(parts.query).get('d')
    return PurePosixPath(unquote(local[0] if local else parts.path)).name


def _draw(kind: str, entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    value = entry['value']
    stated = [entry.get('original_height'), entry.get('original_width')]
    if None not in stated and stated != [height, width]:
        raise ValueError(f'annotated at {stated} (height, width), but the image is {[height, width]}')
    if kind == 'brush':
        if value.get('format', 'rle') != 'rle' or not isinstance(value.get('rle'), list):
            raise ValueError('a brush should have run lengths (format rle)')
        return decode_brush(value['rle'], height, width)
    scale = np.array([width, height]) / 100
    if kind == 'polygon':
        return fill_polygon(polygon_points(value.get('points'), '') * scale, height, width)
    try:
        x, y = value['x'] * scale[0], value['y'] * scale[1]
        if kind == 'ellipse':
            radii = value['radiusX'] * scale[0], value['radiusY'] * scale[1]
            return fill_ellipse((x, y), radii, height, width, value.get('rotation', 0))
        right, bottom = x + value['width'] * scale[0], y + value['height'] * scale[1]
    except (KeyError, TypeError) as error:
        raise ValueError(f'{kind}: a number is missing ({error})') from None
    return fill_polygon(rectangle(x, y, right, bottom, value.get('rotation', 0), (x, y)), height, width)
