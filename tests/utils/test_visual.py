"""Pictures of label maps, and files that are whole or not there."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg.utils.files import atomic_file, write_atomically
from mmseg.utils.visual import colourise, compare, legend, overlay, write_label_png, write_picture

PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
NAMES = ['sky', 'tree', 'a_class_with_a_long_name']


def test_colours_are_rgb_in_the_palette_and_bgr_in_pictures():
    picture = colourise(np.array([[0, 2, 255]], np.uint8), PALETTE)
    assert picture.tolist() == [[[0, 0, 255], [255, 0, 0], [0, 0, 0]]]


def test_overlay_keeps_void_pixels():
    frame = np.full((1, 2, 3), 100, np.uint8)
    picture = overlay(frame, np.array([[0, 255]], np.uint8), PALETTE, opacity=0.5)
    assert picture.tolist() == [[[50, 50, 178], [100, 100, 100]]]
    with pytest.raises(ValueError, match='label map'):
        overlay(frame, np.zeros((2, 2), np.uint8), PALETTE)
    with pytest.raises(ValueError, match='opacity'):
        overlay(frame, np.zeros((1, 2), np.uint8), PALETTE, opacity=2)


def test_legend_holds_every_class_at_any_width():
    for width in (40, 200, 800):
        picture = legend([0, 1, 2], NAMES, PALETTE, width)
        assert picture.shape[1] == width
        colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
        assert {(0, 0, 255), (0, 255, 0), (255, 0, 0)} <= colours
    assert legend([], NAMES, PALETTE, 100).shape[1] == 100


def test_legend_says_how_many_classes_are_left_out():
    all_three, two, counted = (
        legend(classes, NAMES, PALETTE, 60, more) for classes, more in (([0, 1, 2], 0), ([0, 1], 0), ([0, 1], 1)))
    assert counted.shape == all_three.shape and (counted[: len(two) - 6] == two[:-6]).all()
    assert (counted[len(two) - 2 :] < 128).any() and not (counted == [255, 0, 0]).all(2).any(), 'words without a colour'
    assert not (legend([0, 1], NAMES, PALETTE, 60, 2) == counted).all()


@pytest.mark.parametrize('shape', [(60, 107), (31, 17), (480, 853)])
def test_compare_shows_what_is_there(shape, tmp_path):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    pred, gt = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    gt[:3] = 1
    two, three = compare(frame, pred, None, NAMES, PALETTE), compare(frame, pred, gt, NAMES, PALETTE)
    assert three.shape[1] > 1.4 * two.shape[1]
    assert two.shape[0] >= 240
    write_picture(tmp_path / 'new' / 'picture.png', three)
    assert (cv2.imread(str(tmp_path / 'new' / 'picture.png')) == three).all()


def test_label_png_holds_labels_and_colours(tmp_path):
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    write_label_png(tmp_path / 'v' / '1.png', labels, PALETTE)
    with Image.open(tmp_path / 'v' / '1.png') as image:
        assert (np.array(image) == labels).all()
        assert np.array(image.convert('RGB'))[0, 1].tolist() == [0, 255, 0]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / 'folder' / 'file.txt'
    write_atomically(path, 'first')
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b'sec')
        raise RuntimeError('disk full')
    assert path.read_text() == 'first'
    assert [p.name for p in path.parent.iterdir()] == ['file.txt']
    write_atomically(path, b'second', sync=False)
    assert path.read_bytes() == b'second'
