"""The one reader of frames and masks: what decoders pass over is an error that names the file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmseg.datasets.pipelines import LoadAnnotations, LoadImageFromFile
from mmseg.utils import images
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import read_frame, read_mask
from tests.reference import recipe

PICTURE = recipe.frame(3, 0, 12, 20)
LABELS = recipe.raw_mask(3, 1, 12, 20)[0]


def encoded(array, kind='PNG', **options):
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, body=b''):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(width, height, bits, colour=0, rows=b'', more=b''):
    """A PNG of any bit depth; ``rows`` holds the packed pixels, each row behind a filter byte."""
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0))
    palette = chunk(b'PLTE', bytes(3 * 2**bits)) if colour == 3 else b''
    body = chunk(b'IDAT', zlib.compress(rows))
    return b'\x89PNG\r\n\x1a\n' + header + palette + body + more + chunk(b'IEND')


def turned(array, orientation, kind='JPEG'):
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(array, kind, exif=exif)


def write(folder, data, name='a.img'):
    path = folder / name
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize('read', [read_frame, read_mask])
def test_no_flipped_bit_of_a_png_is_read(tmp_path, read):
    data = encoded(PICTURE if read is read_frame else LABELS)
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 200, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataError, match=r'a.img: (damaged|truncated|not an image|a JPEG|expected|cannot)'):
            read(write(tmp_path, damaged))
    assert read(write(tmp_path, data + b'after the end')).shape[:2] == (12, 20)


@pytest.mark.parametrize('bits,colour,row,expected', [
    (1, 0, b'\x00\xa0', [1, 0, 1, 0]),
    (2, 0, b'\x00\x1b', [0, 1, 2, 3]),
    (4, 0, b'\x00\x01\x2f', [0, 1, 2, 15]),
    (8, 0, b'\x00\x00\x01\x02\xff', [0, 1, 2, 255]),
    (1, 3, b'\x00\xa0', [1, 0, 1, 0]),
    (2, 3, b'\x00\x1b', [0, 1, 2, 3]),
    (4, 3, b'\x00\x01\x2f', [0, 1, 2, 15]),
])
def test_masks_hold_the_stored_values(tmp_path, bits, colour, row, expected):
    mask = read_mask(write(tmp_path, png(4, 1, bits, colour, row)))
    assert mask.tolist() == [expected] and mask.dtype == np.uint8


@pytest.mark.parametrize('kind', ['BMP', 'TIFF', 'PPM'])
def test_masks_of_other_lossless_formats(tmp_path, kind):
    assert (read_mask(write(tmp_path, encoded(LABELS, kind))) == LABELS).all()


@pytest.mark.parametrize('data,message', [
    (encoded(LABELS, 'JPEG'), 'JPEG holds no exact labels; save masks as PNG'),
    (encoded(LABELS, 'TIFF', compression='jpeg'), 'compressed with loss'),
    (encoded(LABELS, 'GIF'), 'not an image of a known format'),
    (b'P5\n4 4\n15\n' + bytes(range(16)), 'values stored as'),
    (encoded(Image.fromarray(LABELS).convert('I;16')), "mode 'I;16'"),
    (turned(LABELS, 3, 'TIFF'), 'EXIF orientation 3'),
])
def test_masks_that_hold_no_exact_labels(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read_mask(write(tmp_path, data))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', [3, 6])
def test_a_turned_frame_does_not_fit_its_mask(tmp_path, kind, orientation):
    path = write(tmp_path, turned(PICTURE, orientation, kind))
    upright = (12, 20) if orientation == 3 else (20, 12)
    assert LoadImageFromFile()(dict(frames=[path]))['img'][0].shape[:2] == upright, 'as players show it'
    for known in (dict(has_masks=True), dict(masks=[path])):
        with pytest.raises(DataError, match=f"video 'v', frame a: .*EXIF orientation {orientation}.*save it again"):
            LoadImageFromFile()(dict(frames=[path], video='v', **known))


def test_a_turn_that_stands_behind_the_pixels_of_a_png(tmp_path):
    tag = b'MM\0*\0\0\0\x08\0\x01' + struct.pack('>HHIHH', 274, 3, 1, 6, 0) + bytes(4)
    path = write(tmp_path, png(2, 1, 8, 0, b'\0\1\2', more=chunk(b'eXIf', tag)))
    assert read_frame(path).shape == (2, 1, 3)
    with pytest.raises(DataError, match='EXIF orientation 6'):
        read_frame(path, turn=False)


def test_an_upright_frame_is_read_beside_its_mask(tmp_path):
    path = write(tmp_path, turned(PICTURE, 1, 'PNG'))
    assert (read_frame(path, turn=False) == PICTURE[..., ::-1]).all()


BMP = encoded(PICTURE, 'BMP')
VP8X = b'RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0' + b'\xff\xff\x01' * 2


@pytest.mark.parametrize('read', [read_frame, read_mask])
@pytest.mark.parametrize('data', [
    png(30000, 30000, 8), BMP[:18] + struct.pack('<ii', 30000, 30000) + BMP[26:],
    b'P5\n30000 30000\n255\n', VP8X,
])
def test_a_header_that_asks_for_gigabytes(tmp_path, monkeypatch, read, data):
    for decoder in ('cv2.imdecode', 'PIL.ImageFile.ImageFile.load'):
        monkeypatch.setattr(decoder, lambda *_: pytest.fail('decoded before the size was checked'))
    with pytest.raises(DataError, match=r'a.img: .* is more than \d+ pixels.*THEMASK_MAX_PIXELS'):
        read(write(tmp_path, data))


def test_the_limit_is_the_users(tmp_path, monkeypatch):
    path = write(tmp_path, encoded(PICTURE))
    monkeypatch.setenv('THEMASK_MAX_PIXELS', '239')
    with pytest.raises(DataError, match='20x12 is more than 239 pixels'):
        read_frame(path)
    monkeypatch.setenv('THEMASK_MAX_PIXELS', '240')
    assert read_frame(path).shape == (12, 20, 3)
    monkeypatch.setenv('THEMASK_MAX_PIXELS', '2e8')
    with pytest.raises(ConfigError, match=r"THEMASK_MAX_PIXELS: expected a whole number .*'2e8'"):
        read_frame(path)


def test_formats_that_nobody_expects_are_not_opened(tmp_path):
    for kind in ('ICO', 'TGA', 'EPS', 'JPEG2000', 'GIF'):
        with pytest.raises(DataError, match='not an image of a known format'):
            read_frame(write(tmp_path, encoded(PICTURE, kind)))


def test_files_are_announced_before_they_are_opened(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(images, 'watch', seen.append)
    (tmp_path / 'a.png').write_bytes(encoded(LABELS))
    LoadImageFromFile()(dict(frames=[str(tmp_path / 'a.png')]))
    LoadAnnotations()(dict(masks=[str(tmp_path / 'a.png')]))
    with pytest.raises(DataError, match='gone'):
        read_frame(str(tmp_path / 'gone'))
    assert seen == [str(tmp_path / name) for name in ('a.png', 'a.png', 'gone')]


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('pathlib.Path.read_bytes', refuse)
    with pytest.raises(DataError, match=r'a\.img: cannot be read: Permission denied'):
        read_mask(str(tmp_path / 'a.img'))


@pytest.mark.filterwarnings('ignore::UserWarning')  # of Pillow, about tags
def test_random_bytes_are_a_data_error(tmp_path):
    rng = np.random.default_rng(1)
    wholes = [encoded(PICTURE, kind) for kind in ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'PPM')]
    wholes += [encoded(LABELS, kind) for kind in ('PNG', 'BMP', 'TIFF', 'PPM')]
    for whole in wholes:
        for _ in range(40):
            damaged = bytearray(whole)
            for position in rng.integers(2, min(len(whole), 200), 4):
                damaged[position] = rng.integers(256)
            path = write(tmp_path, damaged[:rng.integers(2, len(whole) + 1)])
            for read in (read_frame, read_mask):
                try:
                    assert read(path).dtype == np.uint8
                except DataError as error:
                    assert 'a.img' in str(error)
