"""CVAT's XML 1.1, for images and for videos (docs.cvat.ai, "XML annotation format").

CVAT exports a track with a shape for every frame.  Where frames between two key frames are missing, boxes and polygons
of equally many points are interpolated linearly, as CVAT does; between polygons of different numbers of points CVAT
matches points along the outline, which is not done here: such an export should hold all frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from mmseg.apps.annotations.records import (
    Annotation,
    Faults,
    ImageFolder,
    Picture,
    Read,
    ordered,
    polygon_points,
    unique,
)
from mmseg.apps.annotations.shapes import decode_runs, fill_ellipse, fill_polygon, rectangle
from mmseg.utils.errors import DataError
from mmseg.utils.images import read_file
from mmseg.utils.names import natural_key

_SHAPES = ('polygon', 'box', 'mask', 'ellipse', 'polyline', 'points', 'cuboid', 'skeleton')
_WITHOUT_AREA = ('polyline', 'points', 'cuboid', 'skeleton')
_HOSTILE = (b'<!DOCTYPE', b'<!ENTITY')


def read_cvat(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads ``annotations.xml``; images are in ``images`` beside it, or where ``images`` says."""
    file = source / 'annotations.xml' if source.is_dir() else source
    data = read_file(file)
    if any(word in data for word in _HOSTILE):
        raise DataError(f'{file}: declares entities, which no export of CVAT does; it is not read')
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f'{file}: is no XML: {error}') from None
    if root.tag != 'annotations':
        raise DataError(f"{file}: expected the element 'annotations' of CVAT's XML, got '{root.tag}'")
    named = [element.text or '' for element in root.iterfind('meta//labels/label/name')]
    used = [element.get('label', '') for element in root.iter() if element.tag in (*_SHAPES, 'track')]
    classes = unique(name for name in [*named, *used] if name)
    beside = file.parent / 'images'
    folder = ImageFolder(images or (beside if beside.is_dir() else file.parent))
    ignored = Counter('tag of a whole image' for _ in root.iter('tag'))
    tracks = root.findall('track')
    if tracks or root.find('image') is None:
        frames = _frames_of(tracks, file, faults)
        return Read(classes, _video(frames, folder, file, faults), len(frames), [file], ignored)
    entries = root.findall('image')
    return Read(classes, _images(entries, folder, file, faults), len(entries), [file], ignored)


def _images(entries: list[Element], folder: ImageFolder, file: Path, faults: Faults) -> Iterator[Picture]:
    for entry in entries:
        name = entry.get('name', '')
        where = f"{file}, image {entry.get('id')} '{name}'"
        path = folder.find(name, faults, where)
        if path is not None:
            shapes = [(_order(shape), _annotation(shape, shape.get('label', ''), f'{where}, {shape.tag} {i}'))
                      for i, shape in enumerate(shape for shape in entry if shape.tag in _SHAPES)]
            yield Picture(name, path, ordered(shapes))


def _frames_of(tracks: list[Element], file: Path, faults: Faults) -> dict[int, list[tuple[float, Annotation]]]:
    """The shapes of every frame, those between key frames included."""
    frames: dict[int, list[tuple[float, Annotation]]] = {}
    for track in tracks:
        where = f'{file}, track {track.get("id")}'
        shapes = [shape for shape in track if shape.tag in _SHAPES]
        try:
            shapes.sort(key=lambda shape: int(shape.get('frame', '')))
        except ValueError:
            faults.add(f'{where}: a shape has no frame')
            continue
        for shape, following in zip(shapes, [*shapes[1:], None]):
            first = int(shape.get('frame', ''))
            if first < 0 or shape.get('outside') == '1':
                continue
            own = _annotation(shape, track.get('label', ''), f'{where}, frame {first}')
            frames.setdefault(first, []).append((_order(shape), own))
            last = first + 1 if following is None else int(following.get('frame', ''))
            for frame in range(first + 1, last):
                assert following is not None
                between = f'{where}, frame {frame}'
                try:
                    made = _between(shape, following, (frame - first) / (last - first))
                except ValueError as error:
                    faults.add(f'{between}: {error}')
                    break
                frames.setdefault(frame, []).append((_order(shape), _annotation(made, track.get('label', ''), between)))
    return dict(sorted(frames.items()))


def _between(first: Element, second: Element, share: float) -> Element:
    """The shape at ``share`` of the way from one key frame to the next; what goes outside there stays where it was."""
    made = Element(first.tag, first.attrib)
    if second.get('outside') == '1' or first.tag != second.tag:
        return made
    if first.tag == 'box':
        for side in ('xtl', 'ytl', 'xbr', 'ybr'):
            made.set(side, str((1 - share) * _number(first, side) + share * _number(second, side)))
    elif first.tag == 'polygon':
        points, others = _points(first), _points(second)
        if points.shape != others.shape:
            raise ValueError(f'key frames have {len(points)} and {len(others)} points, between which this frame is '
                             'missing; export the track with all frames')
        made.set('points', ';'.join(f'{x},{y}' for x, y in (1 - share) * points + share * others))
    return made


def _video(
    frames: dict[int, list[tuple[float, Annotation]]], folder: ImageFolder, file: Path, faults: Faults
) -> Iterator[Picture]:
    """Pictures of a video's task: ``frame_000012.png``, or the twelfth image of the folder."""
    images = sorted(folder.folder.iterdir(), key=lambda path: natural_key(path.name))
    by_number = {key[0][-1][1]: path for path in images if path.is_file() and (key := natural_key(path.stem))[0]}
    for frame, shapes in frames.items():
        path = by_number.get(frame)
        if path is None:
            faults.add(f'{file}, frame {frame}: no image of that number in {folder.folder}')
        else:
            name = file.resolve().parent.name if file.stem == 'annotations' else file.stem
            yield Picture(path.name, path, ordered(shapes), video=name)


def _order(shape: Element) -> float:
    return float(shape.get('z_order') or 0)


def _number(shape: Element, key: str) -> float:
    try:
        return float(shape.get(key, ''))
    except ValueError:
        raise ValueError(f"'{key}' should be a number, got {shape.get(key)!r}") from None


def _points(shape: Element) -> np.ndarray:
    return polygon_points([pair.split(',') for pair in shape.get('points', '').split(';') if pair], '')


def _annotation(shape: Element, label: str, where: str) -> Annotation:
    draw = None if shape.tag in _WITHOUT_AREA else partial(_draw, shape)
    return Annotation(label, where, draw, shape.tag)


def _draw(shape: Element, height: int, width: int) -> np.ndarray:
    turn = float(shape.get('rotation') or 0)
    if shape.tag == 'polygon':
        return fill_polygon(_points(shape), height, width)
    if shape.tag == 'box':
        left, top, right, bottom = (_number(shape, side) for side in ('xtl', 'ytl', 'xbr', 'ybr'))
        return fill_polygon(rectangle(left, top, right, bottom, turn), height, width)
    if shape.tag == 'ellipse':
        cx, cy, rx, ry = (_number(shape, key) for key in ('cx', 'cy', 'rx', 'ry'))
        return fill_ellipse((cx, cy), (rx, ry), height, width, turn)
    x, y, columns, rows = (int(_number(shape, key)) for key in ('left', 'top', 'width', 'height'))
    try:
        counts = [int(count) for count in shape.get('rle', '').split(',')]
    except ValueError:
        raise ValueError("'rle' should be numbers with commas between") from None
    if x < 0 or y < 0 or x + columns > width or y + rows > height:
        raise ValueError(f'its mask of {columns}x{rows} at ({x}, {y}) does not fit into the image')
    mask = np.zeros((height, width), bool)
    mask[y : y + rows, x : x + columns] = decode_runs(counts, rows, columns, by_columns=False)
    return mask
