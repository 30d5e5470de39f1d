"""Reading images from files: frames, label maps and the labels in them, by one reader for every part of the project.

What a decoder would pass over is an error here that names the file: a truncated JPEG, a PNG whose checksums are wrong,
a mask that lost its labels to lossy compression, an image whose header asks for gigabytes.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mmseg.utils.errors import ConfigError, DataError

VOID = 255
"""Label of what belongs to no class: a negative of every mask in training, as in the reference, and not scored."""

UNKNOWN = 254
"""Label of what nobody has labelled: takes no part in training, and is not scored."""

LIMIT_VARIABLE = 'THEMASK_MAX_PIXELS'
"""Environment variable with the largest number of pixels that an image may have."""

watch: Callable[[str], None] | None = None
"""Called with the path of every file before it is opened; None for nobody."""

_DEFAULT_LIMIT = 2**28  # pixels: 16384 x 16384
_JPEG_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')
_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_PNG_START = b'\x89PNG\r\n\x1a\n'
_READERS: dict[bytes, Callable[[io.BytesIO], ImageFile]] = {
    _PNG_START: PngImageFile,
    _JPEG_START: JpegImageFile,
    b'BM': BmpImageFile,
    b'II*\x00': TiffImageFile,
    b'MM\x00*': TiffImageFile,
    b'RIFF': WebPImageFile,
    **{b'P%d' % kind: PpmImageFile for kind in range(1, 7)},
}
_LABEL_SCALES = {'L': 1, 'P': 1, 'P;1': 1, 'P;2': 1, 'P;4': 1, '1': 1, 'L;2': 85, 'L;4': 17}
"""How masks may store their values -> the factor by which Pillow multiplies them."""
_LOSSY = ('JPEG', 'WEBP', 'jpeg', 'tiff_jpeg', 'webp')  # formats, and compressions of a TIFF file
_REMEDIES = {
    'RGB': '; where its colours are the labels, set colours=True on the data set',
    'I;16': '; where its values are ids of classes and instances, name their decoder on the data set',
}
_ORIENTATION = 274  # the EXIF and TIFF tag; 1 is upright


def read_file(path: str | Path) -> bytes:
    """The bytes of a file that must hold some.

    Raises:
        DataError: the file is missing, empty, or cannot be read.
    """
    if watch is not None:
        watch(str(path))
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    if not data:
        raise DataError(f'{path}: empty file (0 bytes)')
    return data


def max_pixels() -> int:
    """Largest number of pixels that an image may have, from the environment."""
    given = os.environ.get(LIMIT_VARIABLE, str(_DEFAULT_LIMIT))
    if not given.isdecimal() or not int(given):
        raise ConfigError(f"{LIMIT_VARIABLE}: expected a whole number of pixels >= 1, got '{given}'")
    return int(given)


def _check_size(width: int, height: int, path: str) -> None:
    if width * height > max_pixels():
        raise DataError(
            f'{path}: {width}x{height} is more than {max_pixels()} pixels; if the image really is that large, set the '
            f'environment variable {LIMIT_VARIABLE} to a larger number')


def _open(path: str) -> tuple[bytes, ImageFile]:
    """The bytes of a file that is whole, and its image with the header read and its size checked, not decoded."""
    data, exif = read_file(path), b''
    if data.startswith(_JPEG_START) and not jpeg_is_whole(data):
        raise DataError(f'{path}: truncated JPEG ({len(data)} bytes, no end marker)')
    if data.startswith(_PNG_START):  # Pillow finds only what is before the pixels
        exif = bytes(_png_chunks(data, path).get(b'eXIf', b''))
    reader = next((reader for start, reader in _READERS.items() if data.startswith(start)), None)
    if reader is None:
        raise DataError(f'{path}: not an image of a known format (JPEG, PNG, BMP, TIFF, WebP, PPM)')
    if reader is WebPImageFile and data[12:16] == b'VP8X':  # its reader allocates the canvas at once
        width, height = (1 + int.from_bytes(data[at:at + 3], 'little') for at in (24, 27))
        _check_size(width, height, path)
    try:
        image = reader(io.BytesIO(data))
    except Exception as error:  # a damaged header may raise anything
        raise DataError(f'{path}: cannot be decoded: {error}') from None
    _check_size(*image.size, path)
    if exif:
        image.info['exif'] = exif
    return data, image


def jpeg_is_whole(data: bytes) -> bool:
    """Whether a JPEG stream reaches its end marker; a decoder fills a truncated one with grey and goes on.

    Markers are walked segment by segment, so an embedded thumbnail does not count, nor do bytes after the end.
    """
    if data.endswith(_JPEG_END):
        return True
    position = 2
    while True:
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return False
        if marker.group() == _JPEG_END:
            return True
        length = data[marker.end():marker.end() + 2]
        if len(length) < 2:
            return False
        position = marker.end() + int.from_bytes(length, 'big')


def _png_chunks(data: bytes, path: str) -> dict[bytes, memoryview]:
    """Content of the last chunk of each kind; every checksum is compared, since one flipped bit is another label."""
    view, chunks = memoryview(data), {}
    position, kind = len(_PNG_START), b''
    while kind != b'IEND':
        end = position + 8 + int.from_bytes(view[position:position + 4], 'big')
        if end + 4 > len(data):
            raise DataError(f'{path}: truncated PNG ({len(data)} bytes, no end chunk)')
        if zlib.crc32(view[position + 4:end]) != int.from_bytes(view[end:end + 4], 'big'):
            raise DataError(f'{path}: damaged PNG (wrong checksum of a chunk at byte {position})')
        kind = data[position + 4:position + 8]
        chunks[kind] = view[position + 8:end]
        position = end + 4
    return chunks


def _check_upright(image: ImageFile, path: str) -> None:
    """Refuses an image that its camera says is to be turned or mirrored."""
    try:
        if isinstance(image, TiffImageFile):
            orientation = image.tag_v2.get(_ORIENTATION, 1)
        else:
            exif = Image.Exif()
            exif.load(image.info.get('exif', b''))
            orientation = exif.get(_ORIENTATION, 1)
    except Exception:  # decoders pass over a damaged one, too
        return
    if orientation in range(2, 9):
        raise DataError(
            f'{path}: has the EXIF orientation {orientation}, so that viewers turn or mirror it, and frame and mask '
            'would not fit; save it again without that tag, both the same way up')


def read_frame(path: str, turn: bool = True) -> np.ndarray:
    """Reads an image as [H,W,3] uint8 BGR.

    Args:
        path: the file.
        turn: turn and mirror it as its EXIF orientation says, as players do; otherwise such a frame is an error, since
            it would not fit its mask.

    Raises:
        DataError: the file is missing, empty, damaged, too large, or no image.
    """
    data, image = _open(path)
    if not turn:
        _check_upright(image, path)
    return _pixels(data, path)


def _pixels(data: bytes, path: str, mode: int = cv2.IMREAD_COLOR) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error as error:
        raise DataError(f'{path}: cannot be decoded: {error.err}') from None
    if pixels is None:
        raise DataError(f'{path}: not an image that OpenCV can decode')
    return pixels


def _open_mask(path: str) -> tuple[bytes, ImageFile]:
    """As :func:`_open`; refuses what holds no exact labels, or does not fit its frame."""
    data, image = _open(path)
    if image.format in _LOSSY or image.info.get('compression') in _LOSSY:
        raise DataError(f'{path}: is compressed with loss: {image.format} holds no exact labels; save masks as PNG, '
                        'from where they were made')
    _check_upright(image, path)
    return data, image


def read_colours(path: str) -> np.ndarray:
    """Reads a mask whose labels are colours, or indices of a palette of them, as [H,W,3] uint8 BGR.

    Raises:
        DataError: as :func:`read_mask`, but the image must have three channels or a palette.
    """
    data, image = _open_mask(path)
    if image.mode not in ('RGB', 'RGBA', 'P'):
        raise DataError(f"{path}: expected an RGB or palette image, whose colours are the labels, got mode "
                        f"'{image.mode}'")
    return _pixels(data, path)


def read_stored(path: str) -> np.ndarray:
    """Reads a mask from whose values a decoder takes the labels: [H,W] uint8 or uint16, or [H,W,3] uint8 RGB.

    Raises:
        DataError: the file is missing, empty, damaged, too large, no image, or lossy.
    """
    data, image = _open_mask(path)
    if image.mode in ('RGB', 'RGBA'):
        return cv2.cvtColor(_pixels(data, path), cv2.COLOR_BGR2RGB)
    if image.mode.startswith('I'):
        return _pixels(data, path, cv2.IMREAD_UNCHANGED)
    return _values(image, path)


def read_mask(path: str) -> np.ndarray:
    """Reads a label image as [H,W] uint8: palette indices or grey values, as stored, of 1, 2, 4 or 8 bits.

    Raises:
        DataError: the file is missing, empty, damaged, too large, no image, lossy, or has not one channel of 8 bits.
    """
    return _values(_open_mask(path)[1], path)


def _values(image: ImageFile, path: str) -> np.ndarray:
    scale = _label_scale(image, path)
    try:
        values = np.array(image)
        return values if values.dtype == np.uint8 and scale == 1 else values.astype(np.uint8) // scale
    except Exception as error:  # damaged pixel data may raise anything
        raise DataError(f'{path}: cannot be decoded: {error}') from None


def _label_scale(image: ImageFile, path: str) -> int:
    """Factor by which Pillow multiplies the stored values; refuses what does not store labels of one channel."""
    if image.mode not in ('L', 'P', '1') or not image.tile:
        remedy = _REMEDIES.get(image.mode, '')
        raise DataError(f"{path}: expected an 8-bit image with one channel, got mode '{image.mode}'{remedy}")
    codec, _, _, args = image.tile[0]
    stored = args if isinstance(args, str) or not args else args[0]
    if stored not in _LABEL_SCALES or codec.startswith('ppm'):  # inverted, or scaled by a maximum of its own
        raise DataError(f"{path}: expected an 8-bit image with one channel, got values stored as '{stored}' ({codec})")
    return _LABEL_SCALES[str(stored)]


def as_label_map(labels: np.ndarray, what: str) -> np.ndarray:
    """``labels`` as a contiguous uint8 map.

    Args:
        labels: [H, W], any integer or bool type, values 0..255.
        what: what the map is, for the error message.

    Raises:
        ValueError: not two-dimensional, not integers, or a value outside 0..255.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f'{what}: expected a label map [H, W], got shape {labels.shape}')
    if labels.dtype != np.uint8:
        if labels.dtype.kind not in 'iub':
            raise ValueError(f'{what}: expected integer labels, got {labels.dtype}')
        if labels.size and (labels.min() < 0 or labels.max() > 255):
            raise ValueError(f'{what}: expected labels 0..255, got {labels.min()}..{labels.max()}')
        labels = labels.astype(np.uint8)
    return np.ascontiguousarray(labels)
