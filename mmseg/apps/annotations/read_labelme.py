"""LabelMe's JSON: one file an image (github.com/wkentaro/labelme)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmseg.apps.annotations.records import Annotation, Faults, Picture, Read, load_json, polygon_points, unique
from mmseg.apps.annotations.shapes import fill_ellipse, fill_polygon, rectangle
from mmseg.utils.errors import DataError
from mmseg.utils.names import natural_key

_WITHOUT_AREA = ('point', 'points', 'line', 'linestrip')


def read_labelme(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads all JSON files of a folder and those below; images are where they say, or embedded."""
    if not source.is_dir():
        raise DataError(f"{source}: expected a folder with LabelMe's JSON files")
    files = sorted(source.rglob('*.json'), key=lambda file: natural_key(str(file)))
    if not files:
        raise DataError(f'{source}: no JSON file in it')
    contents = []
    for file in files:
        try:
            content = load_json(file, dict)
            if not isinstance(content.get('shapes'), list):
                raise DataError(f"{file}: expected 'shapes'; is it LabelMe's?")
        except DataError as error:
            faults.add(str(error))
        else:
            contents.append((file, content))
    names = unique(str(shape.get('label')) for _, content in contents for shape in content['shapes']
                   if isinstance(shape, dict) and shape.get('label') is not None)
    classes = sorted(names, key=natural_key)
    return Read(classes, _pictures(contents, source, images, faults), len(contents), [source])


def _pictures(contents: list[Any], source: Path, images: Path | None, faults: Faults) -> Iterator[Picture]:
    for file, content in contents:
        image = _image(file, content, images)
        if image is None:
            faults.add(f"{file}: its image '{content.get('imagePath')}' is not there, and none is embedded")
            continue
        annotations = []
        for i, shape in enumerate(content['shapes']):
            where = f'{file}, shape {i}'
            if not isinstance(shape, dict) or shape.get('label') is None:
                faults.add(f'{where}: has no label')
            else:
                annotations.append(_annotation(shape, where))
        suffix = image.suffix if isinstance(image, Path) else _suffix(image)
        name = file.relative_to(source).with_suffix(suffix).as_posix()
        yield Picture(name, image, annotations)


def _image(file: Path, content: dict[str, Any], images: Path | None) -> Path | bytes | None:
    path = str(content.get('imagePath') or '').replace('\\', '/')
    for candidate in (file.parent / path, (images or file.parent) / Path(path).name):
        if path and candidate.is_file():
            return candidate
    try:
        return base64.b64decode(content.get('imageData') or '', validate=True) or None
    except (binascii.Error, TypeError, ValueError):
        return None


def _suffix(data: bytes) -> str:
    return '.png' if data.startswith(b'\x89PNG') else '.jpg'


def _annotation(shape: dict[str, Any], where: str) -> Annotation:
    kind = shape.get('shape_type') or 'polygon'
    draw = None if kind in _WITHOUT_AREA else partial(_draw, kind, shape, where)
    return Annotation(str(shape['label']), where, draw, kind)


def _draw(kind: str, shape: dict[str, Any], where: str, height: int, width: int) -> np.ndarray:
    points = shape.get('points')
    if kind == 'polygon':
        return fill_polygon(polygon_points(points, where), height, width)
    corners = np.asarray(points, float)
    if kind not in ('rectangle', 'circle', 'mask', 'oriented_rectangle') or corners.shape[:1] != (
            4 if kind == 'oriented_rectangle' else 2,):
        raise ValueError(f"a shape '{kind}' of {len(corners)} points is not known")
    if kind == 'oriented_rectangle':
        return fill_polygon(corners, height, width)
    if kind == 'circle':
        radius = float(np.hypot(*(corners[1] - corners[0])))
        return fill_ellipse(tuple(corners[0]), (radius, radius), height, width)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    if kind == 'rectangle':
        return fill_polygon(rectangle(left, top, right, bottom), height, width)
    return _pasted(shape, int(left), int(top), height, width)


def _pasted(shape: dict[str, Any], left: int, top: int, height: int, width: int) -> np.ndarray:
    """A mask that is stored as a picture of its box."""
    try:
        data = base64.b64decode(shape.get('mask') or '', validate=True)
        part = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (binascii.Error, TypeError, ValueError, cv2.error):
        part = None
    if part is None:
        raise ValueError('its mask is no picture')
    if left < 0 or top < 0 or top + part.shape[0] > height or left + part.shape[1] > width:
        raise ValueError(f'its mask of {part.shape[1]}x{part.shape[0]} at ({left}, {top}) does not fit into the image')
    mask = np.zeros((height, width), bool)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part > 0
    return mask
