"""What the values in mask files mean: one rule for training, testing, evaluation, checks and reports.

Masks hold one value a pixel, or a colour, or an id from which a decoder takes the class (``id * 1000 + instance`` of
Cityscapes, the red channel of KITTI-STEP).  A :class:`LabelRule` turns them into training labels: 0..K-1 for the
classes, :data:`~mmseg.utils.images.VOID` and, in training, :data:`~mmseg.utils.images.UNKNOWN`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmseg.registry import MASK_DECODERS, find
from mmseg.utils.errors import ConfigError, DataError, nearest
from mmseg.utils.files import read_lines
from mmseg.utils.images import VOID, read_colours, read_mask, read_stored

MAX_CLASSES = 253
"""Number of classes that 8-bit labels can hold beside void, unknown, and the mark of a value that no class has."""

_NO_CLASS = 253  # label tables hold it for raw values that no class has
_OTHER = 'other'  # key of a label map for all values that it does not name
_SHOWN = 10
_BLACK = (0, 0, 0)
_ROWS = 32

LabelMap = Mapping[Any, Any] | Sequence[Sequence[Any]]
"""Raw label or colour -> index or name of a class, or None for void; also as a list of pairs."""


@MASK_DECODERS.register_module()
def cityscapes_instances(pixels: np.ndarray) -> np.ndarray:
    """The class of ``id * 1000 + instance``; values below 1000 are ids themselves."""
    return np.where(pixels < 1000, pixels, pixels // 1000)


@MASK_DECODERS.register_module()
def vipseg(pixels: np.ndarray) -> np.ndarray:
    """The class of VIPSeg's ``id * 100 + instance`` of things; values up to 124 are ids themselves."""
    return np.where(pixels < 125, pixels, pixels // 100)


@MASK_DECODERS.register_module()
def red_channel(pixels: np.ndarray) -> np.ndarray:
    """The class in the red channel of an RGB image (KITTI-STEP)."""
    if pixels.ndim != 3:
        raise ValueError(f'expected an RGB image, got one channel of {pixels.dtype}')
    return pixels[..., 0]


class UnknownLabelError(DataError):
    """A mask holds what no class has."""


@dataclass(frozen=True)
class LabelRule:
    """How the content of a mask file becomes training labels.

    Attributes:
        num_classes: K.
        labels: raw value, or colour (R, G, B), -> label 0..K-1 or void.
        other: the label of all other values; None: they are an error.
        colours: masks hold colours.
        decoder: turns stored pixels (``[H,W]``, or RGB ``[H,W,3]``) into raw values 0..65535.
        as_stored: labels are the values in the files, but for ``reduce_zero_label``: the video consistency compares
            what is in the files, as the official VSPW script does.  Otherwise it compares the labels.
    """

    num_classes: int
    labels: Mapping[Any, int]
    other: int | None = None
    colours: bool = False
    decoder: Callable[[np.ndarray], np.ndarray] | None = None
    as_stored: bool = False

    @classmethod
    def plain(cls, num_classes: int, reduce_zero_label: bool = False) -> LabelRule:
        """Raw 0..K-1 are the classes, or with ``reduce_zero_label`` 1..K, and raw 0 is void; 255 is void."""
        first = int(reduce_zero_label)
        labels = {first + label: label for label in range(num_classes)} | {VOID: VOID}
        return cls(num_classes, labels | ({0: VOID} if reduce_zero_label else {}), as_stored=True)

    @property
    def reduce_zero_label(self) -> bool:
        """Whether labels differ from what is in the files by VSPW's rule."""
        return self.as_stored and self.labels.get(0) == VOID

    @cached_property
    def table(self) -> np.ndarray:
        """uint8, label of each raw value; of a colour at R * 65536 + G * 256 + B."""
        size = 2**24 if self.colours else 2**16 if self.decoder else 2**8
        table = np.full(size, _NO_CLASS if self.other is None else self.other, np.uint8)
        for raw, label in self.labels.items():
            table[_packed(raw)] = label
        return table

    def read(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels of a mask file, and what the video consistency compares; both ``[H,W]`` uint8.

        Raises:
            DataError: the file cannot be read.
            UnknownLabelError: it holds a value or a colour that no class has.
        """
        raw = self.raw(path)
        labels = self.labels_of(raw, path)
        return labels, raw if self.as_stored else labels

    def raw(self, path: str) -> np.ndarray:
        """What a mask file holds: values ``[H,W]``, decoded ids ``[H,W]``, or colours ``[H,W,3]`` BGR.

        Raises:
            DataError: the file cannot be read.
        """
        if self.colours:
            return read_colours(path)
        return self._decoded(path) if self.decoder else read_mask(path)

    def labels_of(self, raw: np.ndarray, path: str) -> np.ndarray:
        """Labels ``[H,W]`` uint8 of what :meth:`raw` has read.

        Raises:
            UnknownLabelError: a value or a colour that no class has.
        """
        if self.colours:
            labels = _labels_of_colours(raw, self.table)
        else:
            labels = self.table.take(raw) if self.decoder else cv2.LUT(raw, self.table)
        if self.other is None and (labels == _NO_CLASS).any():
            raise UnknownLabelError(f'{path}: {self._unknown(raw, labels == _NO_CLASS)}')
        return labels

    def counts(self, raw: np.ndarray) -> Counter[tuple[Any, int]]:
        """Pixels of each value that :meth:`raw` has read, or colour (R, G, B), with its label."""
        if self.colours:
            raw = raw @ np.array([1, 1 << 8, 1 << 16])  # BGR
        values, counts = np.unique(raw, return_counts=True)
        return Counter({((v >> 16, v >> 8 & 255, v & 255) if self.colours else v, int(self.table[v])): n
                        for v, n in zip(values.tolist(), counts.tolist())})

    def _decoded(self, path: str) -> np.ndarray:
        assert self.decoder is not None
        try:
            raw = self.decoder(read_stored(path))
        except (ValueError, IndexError) as error:
            raise DataError(f'{path}: {getattr(self.decoder, "__name__", self.decoder)}: {error}') from None
        if raw.size and not 0 <= int(raw.min()) <= int(raw.max()) < len(self.table):
            raise DataError(f'{path}: decoded ids should be 0..{len(self.table) - 1}, got {raw.min()}..{raw.max()}')
        return raw

    def _unknown(self, raw: np.ndarray, where: np.ndarray) -> str:
        """What an error says of raw values that no class has."""
        values, counts = np.unique(raw[where], axis=0, return_counts=True)
        if self.colours:
            bgr = values[counts.argmax()]
            row, column = np.argwhere((raw == bgr).all(2))[0]
            more = f', and {len(values) - 1} other colours' if len(values) > 1 else ''
            return (f'colour {tuple(bgr[::-1].tolist())} of {counts.max()} pixels, the first at x={column}, y={row}, '
                    f'is of no class{more}; add it to colour_map (None: void), or save the masks without smoothing')
        shown = ', '.join(f'{value} ({count} pixels)' for value, count in zip(values[:_SHOWN], counts))
        if self.as_stored:
            allowed = [value for value, label in self.labels.items() if label != VOID]
            return (f'label out of range: {values.tolist()}; the data set has {self.num_classes} classes, stored as '
                    f'{allowed[0]}..{allowed[-1]}, and 255 for void')
        return (f'label out of range: {shown}; label_map does not name it: add it ({{raw: class, or None for void}}), '
                f"or '{_OTHER}' for all the rest")


def _labels_of_colours(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Labels of pixels ``[H,W,3]`` BGR by :attr:`LabelRule.table`, a few rows at a time, which stay in the cache."""
    height, width = pixels.shape[:2]
    labels = np.empty((height, width), np.uint8)
    for top in range(0, height, _ROWS):
        rows = slice(top, top + _ROWS)
        packed = cv2.cvtColor(pixels[rows], cv2.COLOR_BGR2BGRA).view('<u4')[..., 0]
        np.take(table, np.bitwise_and(packed, 0xFFFFFF, dtype=np.intp), out=labels[rows], mode='clip')
    return labels


def _packed(raw: Any) -> Any:
    return raw if isinstance(raw, int) else raw[0] << 16 | raw[1] << 8 | raw[2]


def describe_labels(
    component: Any, where: str, classes: Sequence[str] | str | None = None,
    palette: Sequence[Sequence[int]] | None = None, label_map: LabelMap | None = None, other: str | None = None,
    reduce_zero_label: bool | None = None, colours: bool | None = None, colour_map: LabelMap | None = None,
    decoder: str | None = None,
) -> tuple[tuple[str, ...], list[list[int]], LabelRule]:
    """Class names, palette and label rule of a data set.

    Args:
        component: a class of data sets, which says what the arguments leave out.
        where: its place in the config.
        classes: names, or a file of them; a part of the class's own names, in any order, leaves out the others.
        palette: [R,G,B] a class; with it ``classes`` are names of one's own.
        label_map: raw value -> class or None; ``'other'`` stands for all values that it does not name.
        other: the name of a class that collects those which ``classes`` leaves out.
        reduce_zero_label: raw 0 is void and 1..K are the classes.
        colours: masks hold the colours of the palette.
        colour_map: colour -> class or None, for masks with other colours than the palette's.
        decoder: name in the registry ``MASK_DECODERS``.

    Raises:
        ConfigError: naming the key.
    """
    own = tuple(component.CLASSES)
    if isinstance(classes, str):
        classes, read = _classes_of_file(classes, f'{where}.classes')
        palette = read if palette is None else palette
    names = own if classes is None else tuple(classes)
    is_part = palette is None and bool(own) and set(names) <= set(own)
    whole = own if is_part else names
    mapped = component.label_map if label_map is None else label_map
    coloured = (component.colours if colours is None else colours) or colour_map is not None
    if own and not is_part and palette is None and label_map is None:
        unknown = [name for name in names if name not in own]
        raise ConfigError(
            f'{where}.classes: {unknown[:_SHOWN]} are not among the {len(own)} classes of the data set'
            f'{nearest(unknown[0], own)}; where masks hold labels of your own, give the names of all of them and a '
            'palette; a label_map says which raw labels make a new class')
    if other is not None:
        if classes is None or not is_part or label_map is not None:
            raise ConfigError(f"{where}.other: collects what classes=[...], a part of the data set's own, leaves out; "
                              f"in a label_map it is the key '{_OTHER}'")
        names += () if other in names else (other,)
    _check_names(names, where)
    colour_list = _palette(component, names, palette, is_part, where)

    if coloured and mapped is not None and label_map is not None:
        raise ConfigError(f'{where}.label_map: not together with colours; colour_map says what each colour is')
    if coloured:
        given = colour_map
        if given is None:
            own_colours = component.PALETTE if is_part else colour_list
            given = {_BLACK: None} | {tuple(map(int, colour)): i for i, colour in enumerate(own_colours)}
        labels = _resolved(given, whole, f'{where}.colour_map', _is_colour, 'colour (R, G, B) of whole numbers 0..255')
    elif mapped is not None:
        name = decoder or component.decoder
        limit = 2**16 if name else 2**8
        labels = _resolved(mapped, whole if label_map is None else names, f'{where}.label_map',
                           lambda raw: type(raw) is int and 0 <= raw < limit, f'raw label 0..{limit - 1}')
        if label_map is not None and own and not name:
            _check_raw(component, labels, f'{where}.label_map')
        labels.setdefault(VOID, VOID)
    else:
        reduce = component.reduce_zero_label if reduce_zero_label is None else reduce_zero_label
        labels = dict(LabelRule.plain(len(whole), reduce).labels)
    rest = labels.pop(_OTHER, None)
    if is_part and names != own and label_map is None:
        kept = {i: names.index(name) for i, name in enumerate(own) if name in names}
        left = VOID if other is None else names.index(other)
        labels = {raw: label if label == VOID else kept.get(label, left) for raw, label in labels.items()}
        rest = rest if rest in (None, VOID) else kept.get(rest, left)
    decoder = component.decoder if decoder is None else decoder
    stored = not coloured and mapped is None and decoder is None and whole == names
    function = None if decoder is None or coloured else find(MASK_DECODERS, decoder, f'{where}.decoder')
    return names, colour_list, LabelRule(len(names), labels, rest, coloured, function, stored)


def _classes_of_file(path: str, where: str) -> tuple[list[str], list[list[int]] | None]:
    """Names in a text file, one a line, or names and palette of a ``classes.json``."""
    file = Path(path).expanduser()
    try:
        if file.suffix != '.json':
            return read_lines(file), None
        content = json.loads(file.read_text(encoding='utf-8'))
        return [str(name) for name in content['classes']], content.get('palette')
    except OSError as error:
        raise ConfigError(f"{where}: '{path}' cannot be read: {error.strerror}") from None
    except DataError as error:
        raise ConfigError(f'{where}: {error}') from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{where}: '{path}' should hold {{\"classes\": [...], \"palette\": [[R, G, B], ...]}}: {error}") from None


def _check_names(names: Sequence[str], where: str) -> None:
    if not names:
        raise ConfigError(f'{where}: has no class names; set CLASSES or give classes=[...]')
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f'{where}.classes: {twice} are there more than once')
    if len(names) > MAX_CLASSES:
        raise ConfigError(f'{where}.classes: 8-bit masks hold at most {MAX_CLASSES} classes, got {len(names)}')


def _palette(
    component: Any, names: Sequence[str], palette: Sequence[Sequence[int]] | None, is_part: bool, where: str
) -> list[list[int]]:
    """One [R,G,B] of 0..255 for every class: given ones, or the data set's own; others are made."""
    if palette is None and is_part:
        own = dict(zip(component.CLASSES, component.PALETTE))
        palette = [own.get(name, (128, 128, 128)) for name in names]
    elif palette is None:
        palette = voc_colours(len(names))
    if len(palette) != len(names):
        raise ConfigError(f'{where}.palette: {len(names)} classes but {len(palette)} colours')
    for colour in palette:
        if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            raise ConfigError(f'{where}.palette: expected [R, G, B] of whole numbers 0..255 for each of the '
                              f'{len(names)} classes, got {colour!r}')
    return [list(map(int, colour)) for colour in palette]


def voc_colours(number: int) -> list[list[int]]:
    """Colours 1, 2, ... of PASCAL VOC's colour map: the bits of the index, spread over R, G and B from the top down."""
    return [[sum((i >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3)]
            for i in range(1, number + 1)]


def _resolved(
    given: LabelMap, names: Sequence[str], where: str, is_key: Callable[[Any], bool], key: str
) -> dict[Any, int]:
    """A map of a config with checked keys, and with indices in place of names."""
    try:
        pairs = [(raw, target) for raw, target in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise ConfigError(f'{where}: expected {{raw: class or None}} or a list of such pairs, got {given!r}') from None
    labels: dict[Any, int] = {}
    for raw, target in pairs:
        own = tuple(raw) if isinstance(raw, list) else raw
        if own != _OTHER and not is_key(own):
            raise ConfigError(f"{where}: {raw!r} is no {key}, nor '{_OTHER}'")
        if own in labels:
            raise ConfigError(f'{where}: {raw!r} is there more than once')
        if isinstance(target, str):
            if target not in names:
                raise ConfigError(f"{where}[{raw!r}]: no class '{target}'{nearest(target, names)}")
            target = names.index(target)
        if target is not None and not (type(target) is int and (0 <= target < len(names) or target == VOID)):
            raise ConfigError(f'{where}[{raw!r}]: expected a class, 0..{len(names) - 1} or its name, or None for void; '
                              f'got {target!r}')
        labels[own] = VOID if target is None else target
    return labels


def _is_colour(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(type(x) is int and 0 <= x <= 255 for x in value)


def _check_raw(component: Any, labels: Mapping[Any, int], where: str) -> None:
    """Refuses raw labels that the masks of a known data set cannot hold."""
    known = component.label_map
    if known is None:
        known = LabelRule.plain(len(component.CLASSES), component.reduce_zero_label).labels
    unknown = [raw for raw in labels if raw not in known and raw not in (_OTHER, VOID)]
    if unknown:
        numbers = [raw for raw in known if raw not in (_OTHER, VOID)]
        name = getattr(component, '__name__', type(component).__name__)
        raise ConfigError(f'{where}: masks of {name} hold no {unknown}, but {min(numbers)}..{max(numbers)} and 255')
