"""Shapes of annotations as sets of pixels.

A pixel belongs to a shape if its centre lies inside; coordinates are in pixels, and the first pixel covers 0..1.  Where
a polygon crosses itself the even-odd rule holds.  Run lengths are those of COCO (column by column, as numbers or as its
text) and CVAT (row by row); Label Studio packs bits (the ``rle-pack`` of thi.ng/umbrella).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_TEXT_BITS = 5  # of a character of COCO's text that hold a number; the sixth says that it goes on
_TEXT_FIRST = 48
_CHANNELS = 4  # Label Studio's brush keeps RGBA


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels inside a closed polygon, bool ``[H, W]``.

    Every row of centres is crossed by the edges at some columns, and pixels between an odd and an even crossing are
    inside.

    Args:
        points: float ``[P, 2]``, x and y.
        height: of the image.
        width: of the image.

    Raises:
        ValueError: it lies outside of the image as a whole.
    """
    first, second = np.asarray(points, float), np.roll(points, -1, 0)
    _check_inside(first, height, width)
    upwards = first[:, 1] > second[:, 1]
    low, high = np.where(upwards[:, None], second, first), np.where(upwards[:, None], first, second)
    # an edge crosses the centres y + 0.5 in [low, high)
    start = np.clip(np.ceil(low[:, 1] - 0.5), 0, height).astype(int)
    stop = np.clip(np.ceil(high[:, 1] - 0.5), 0, height).astype(int)
    edge = np.repeat(np.arange(len(first)), stop - start)
    row = np.concatenate([np.arange(a, b) for a, b in zip(start, stop)]) if len(edge) else np.zeros(0, int)
    rise = high[edge, 1] - low[edge, 1]
    x = low[edge, 0] + (row + 0.5 - low[edge, 1]) * (high[edge, 0] - low[edge, 0]) / np.where(rise, rise, 1)
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
    toggles = np.zeros((height, width + 1), np.uint8)
    np.bitwise_xor.at(toggles, (row, column), 1)
    return np.bitwise_xor.accumulate(toggles, 1)[:, :-1].astype(bool)


def fill_ellipse(
    centre: tuple[float, float], radii: tuple[float, float], height: int, width: int, degrees: float = 0.0
) -> np.ndarray:
    """The pixels inside an ellipse that is turned clockwise, bool ``[H, W]``; raises as :func:`fill_polygon`."""
    _check_inside(np.array([centre]) + np.array([[-1], [1]]) * max(radii), height, width)
    angle = np.deg2rad(degrees)
    y, x = np.ogrid[0.5:height, 0.5:width]
    dx, dy = x - centre[0], y - centre[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (along / max(radii[0], 1e-9)) ** 2 + (across / max(radii[1], 1e-9)) ** 2 <= 1


def _check_inside(points: np.ndarray, height: int, width: int) -> None:
    (left, top), (right, bottom) = points.min(0), points.max(0)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f'lies outside of the image of {width}x{height}: x {left:g}..{right:g}, y {top:g}..{bottom:g}')


def rectangle(left: float, top: float, right: float, bottom: float, degrees: float = 0.0,
              centre: tuple[float, float] | None = None) -> np.ndarray:  # fmt: skip
    """The corners ``[4, 2]`` of a rectangle that is turned clockwise, around its middle or another ``centre``."""
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = corners.mean(0) if centre is None else np.array(centre)
    return (corners - middle) @ turn + middle


def decode_runs(counts: Sequence[int], height: int, width: int, by_columns: bool = True) -> np.ndarray:
    """Run lengths, of 0 first, as a mask, bool ``[H, W]``.

    Raises:
        ValueError: negative numbers, or not as many pixels as the image has.
    """
    runs = np.asarray(counts)
    if runs.dtype.kind not in 'iu' or (runs < 0).any() or int(runs.sum()) != height * width:
        pixels = int(runs.sum()) if runs.dtype.kind in 'iu' else 'no whole number of'
        raise ValueError(f'run lengths of {pixels} pixels, but the image has {height} x {width} = {height * width}')
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T if by_columns else flat.reshape(height, width)


def encode_runs(mask: np.ndarray, by_columns: bool = True) -> list[int]:
    """The inverse of :func:`decode_runs`."""
    flat = (mask.T if by_columns else mask).reshape(-1).astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(changes, prepend=0, append=flat.size).tolist()


def decode_text(text: str) -> list[int]:
    """Run lengths of COCO's compressed text.

    A character holds five bits of a number.  From the third number on it is the difference to the one two before.

    Raises:
        ValueError: a character outside of the code, or the text ends inside a number.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - _TEXT_FIRST
        if not 0 <= bits < 64:
            raise ValueError(f'the character {character!r} is none of run lengths')
        value |= (bits & 31) << shift
        shift += _TEXT_BITS
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError('the text of run lengths ends inside a number')
    return counts


def encode_text(counts: Sequence[int]) -> str:
    """The inverse of :func:`decode_text`."""
    characters = []
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> _TEXT_BITS
            more = value != (-1 if bits & 16 else 0)
            characters.append(chr(bits + 32 * more + _TEXT_FIRST))
    return ''.join(characters)


def decode_brush(data: Sequence[int], height: int, width: int) -> np.ndarray:
    """Label Studio's brush as a mask, bool ``[H, W]``: where the last of four channels is not 0.

    The bits hold the number of values (32 bits), their width less one (5), and four widths less one (4 each) of run
    lengths; then for each run one bit (1: one value for all of it), two bits that choose a width, the length less one,
    and the values.

    Raises:
        ValueError: another number of values, or the data end too early.
    """
    if any(not 0 <= byte < 256 for byte in data):
        raise ValueError('brush data should be bytes')
    bits = int.from_bytes(bytes(data), 'big')
    left = 8 * len(data)

    def read(number: int) -> int:
        nonlocal left
        left -= number
        if left < 0:
            raise ValueError('brush data end too early')
        return bits >> left & (1 << number) - 1

    total, word = read(32), read(5) + 1
    if total != height * width * _CHANNELS:
        raise ValueError(f'brush data of {total} values, but the image has {height} x {width} x {_CHANNELS}')
    sizes = [read(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint32)
    place = 0
    while place < total:
        same, length = read(1), read(sizes[read(2)]) + 1
        if place + length > total:
            raise ValueError('brush data hold too many values')
        values[place : place + length] = read(word) if same else [read(word) for _ in range(length)]
        place += length
    return values.reshape(height, width, _CHANNELS)[..., -1] > 0
