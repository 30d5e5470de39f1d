"""Annotations of labelling tools become data sets: shapes, formats, and what is wrong with them."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg.apps.annotations import READERS, import_annotations, import_video
from mmseg.apps.annotations import shapes as s
from mmseg.datasets import build_dataset
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.images import read_mask
from tests.reference import recipe
from tests.tool_process import run_tool
from tests.vspw_fixture import test_config as config_for_testing

HEIGHT, WIDTH = 24, 32
SQUARE = [[4, 4], [12, 4], [12, 12], [4, 12]]  # covers rows and columns 4..11
FLAT = [value for point in SQUARE for value in point]

masks = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).random((7, 9)) < 0.4)


# Shapes


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), corners=st.integers(3, 9), whole=st.booleans())
def test_a_pixel_is_inside_if_its_centre_is(seed, corners, whole):
    """Against the number of edges that a ray from each centre crosses, also where polygons cross themselves."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-6, 26, (corners, 2))
    points = points.round() if whole else points
    if points.max(0).min() <= 0 or (points.min(0) >= (20, 15)).any():
        return
    mask = s.fill_polygon(points, 15, 20)
    for y, x in itertools.product(range(15), range(20)):
        crossings = 0
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
            if (y0 > y + 0.5) != (y1 > y + 0.5):
                low, high = ((x0, y0), (x1, y1)) if y0 < y1 else ((x1, y1), (x0, y0))
                crossings += low[0] + (y + 0.5 - low[1]) * (high[0] - low[0]) / (high[1] - low[1]) > x + 0.5
        border = not whole or crossings % 2 == mask[y, x]
        assert mask[y, x] == crossings % 2 or not border or on_edge(points, x + 0.5, y + 0.5), (x, y)


def on_edge(points, x, y):
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        length = np.hypot(x1 - x0, y1 - y0)
        if length and abs((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) / length < 1e-9:
            return True
    return False


def test_neighbouring_polygons_share_no_pixel_and_leave_none():
    left, right = [[0, 0], [7.3, 0], [3.1, 15], [0, 15]], [[7.3, 0], [20, 0], [20, 15], [3.1, 15]]
    parts = [s.fill_polygon(np.array(points), 15, 20) for points in (left, right)]
    assert (parts[0] ^ parts[1]).all()


@settings(max_examples=60, deadline=None)
@given(mask=masks, by_columns=st.booleans())
def test_run_lengths_round_trip_and_equal_the_naive_ones(mask, by_columns):
    counts = s.encode_runs(mask, by_columns)
    flat = (mask.T if by_columns else mask).ravel().tolist()
    naive = [len(list(group)) for _, group in itertools.groupby(flat)]
    assert counts == ([0] if flat[0] else []) + naive
    assert (s.decode_runs(counts, *mask.shape, by_columns) == mask).all()
    assert s.decode_text(s.encode_text(counts)) == counts


def test_compressed_text_is_coco_s():
    """A text that pycocotools made, of a mask of 6 x 5 whose second column is filled from row 1 to 4."""
    mask = np.zeros((6, 5), bool)
    mask[1:5, 1] = True
    assert s.encode_runs(mask) == [7, 4, 19] and s.encode_text([7, 4, 19]) == '74c0'
    assert s.decode_text('74c0') == [7, 4, 19]


def brush(mask, word=8):
    """Label Studio's bits, by the naive writer: runs of one value, or single values."""
    values = np.repeat(mask.ravel().astype(int) * 255, 4).tolist()
    bits = f'{len(values):032b}{word - 1:05b}' + ''.join(f'{size - 1:04b}' for size in (3, 4, 8, 16))
    for value, group in itertools.groupby(values):
        length = len(list(group))
        if length <= 8:
            bits += '0' + '00' + f'{length - 1:03b}' + f'{value:0{word}b}' * length
        else:
            bits += '1' + '11' + f'{length - 1:016b}' + f'{value:0{word}b}'
    bits += '0' * (-len(bits) % 8)
    return [int(bits[i:i + 8], 2) for i in range(0, len(bits), 8)]


@settings(max_examples=30, deadline=None)
@given(mask=masks)
def test_brushes_are_read_to_the_bit(mask):
    data = brush(mask)
    assert (s.decode_brush(data, *mask.shape) == mask).all()
    for wrong, message in ((data[:-9], 'end too early'), ([1, 300], 'bytes'), (brush(mask[:-1]), 'values, but the i')):
        with pytest.raises(ValueError, match=message):
            s.decode_brush(wrong, *mask.shape)


def test_turned_shapes():
    square = s.fill_polygon(s.rectangle(4, 4, 12, 12), HEIGHT, WIDTH)
    assert square[4:12, 4:12].all() and square.sum() == 64
    turned = s.fill_polygon(s.rectangle(4, 6, 12, 10, 90), HEIGHT, WIDTH)
    assert (turned == s.fill_polygon(s.rectangle(6, 4, 10, 12), HEIGHT, WIDTH)).all()
    circle = s.fill_ellipse((16, 12), (8, 8), HEIGHT, WIDTH)
    assert abs(circle.sum() - np.pi * 64) < 8 and circle[12, 23] and not circle[12, 24]
    ellipse = s.fill_ellipse((16, 12), (8, 3), HEIGHT, WIDTH, 90)
    assert (ellipse == s.fill_ellipse((16, 12), (3, 8), HEIGHT, WIDTH)).all()


# Formats


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), recipe.frame(seed, 0, HEIGHT, WIDTH))


def png(mask):
    return base64.b64encode(cv2.imencode('.png', mask.astype(np.uint8) * 255)[1].tobytes()).decode()


def expected():
    """A square of class a, and a smaller one of b on top of it."""
    labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels[4:12, 4:12] = 0
    labels[6:8, 6:10] = 1
    return labels


SMALL = [[6, 6], [10, 6], [10, 8], [6, 8]]


def coco(root, **changes):
    small = np.zeros((HEIGHT, WIDTH), bool)
    small[6:8, 6:10] = True
    runs = s.encode_runs(small)
    image(root / 'images/v_1.jpg')
    image(root / 'images/v_2.jpg', 1)
    annotations = [
        dict(id=1, image_id=1, category_id=7, area=8, segmentation=dict(size=[HEIGHT, WIDTH], counts=runs), iscrowd=1),
        dict(id=2, image_id=1, category_id=3, area=64, segmentation=[FLAT]),
        dict(id=3, image_id=2, category_id=7, segmentation=dict(size=[HEIGHT, WIDTH], counts=s.encode_text(runs))),
        dict(id=4, image_id=2, category_id=3, bbox=[4, 4, 8, 8], segmentation=[FLAT]),
        dict(id=5, image_id=2, category_id=3, bbox=[1, 1, 2, 2], segmentation=[])]
    content = dict(
        images=[dict(id=i, file_name=f'v_{i}.jpg', height=HEIGHT, width=WIDTH) for i in (1, 2)],
        categories=[dict(id=3, name='a'), dict(id=7, name='b')], annotations=annotations)
    content.update(changes)
    (root / 'instances.json').write_text(json.dumps(content))
    return root / 'instances.json'


def labelme(root):
    for i in (1, 2):
        image(root / f'v_{i}.png')
        shapes = [
            dict(label='a', shape_type='polygon', points=SQUARE) if i == 1 else
            dict(label='a', shape_type='mask', points=[[4, 4], [11, 11]], mask=png(np.ones((8, 8)))),
            dict(label='b', shape_type='rectangle', points=[[6, 6], [10, 8]]),
            dict(label='b', shape_type='point', points=[[3, 3]])]
        (root / f'v_{i}.json').write_text(json.dumps(dict(
            shapes=shapes, imagePath=f'v_{i}.png', imageHeight=HEIGHT, imageWidth=WIDTH, imageData=None)))
    data = base64.b64encode((root / 'v_2.png').read_bytes()).decode()
    (root / 'v_2.png').unlink()  # that one is embedded
    content = json.loads((root / 'v_2.json').read_text())
    (root / 'v_2.json').write_text(json.dumps({**content, 'imageData': data}))
    return root


def points(pairs):
    return ';'.join(f'{x},{y}' for x, y in pairs)


def cvat(root):
    box = 'label="b" xtl="6" ytl="6" xbr="10" ybr="8"'
    rows = s.encode_runs(np.ones((2, 4), bool), by_columns=False)
    mask = f'<mask label="b" rle="{", ".join(map(str, rows))}" left="6" top="6" width="4" height="2" z_order="1"/>'
    entries = ''
    for i, small in ((1, f'<box {box} z_order="1"/>'), (2, mask)):
        image(root / f'images/v_{i}.jpg')
        entries += (
            f'<image id="{i}" name="v_{i}.jpg" width="{WIDTH}" height="{HEIGHT}">{small}<polygon label="a" '
            f'points="{points(SQUARE)}" z_order="0"/><polyline label="a" points="1,1;2,2"/><tag label="a"/></image>')
    names = ''.join(f'<label><name>{name}</name></label>' for name in 'ab')
    (root / 'annotations.xml').write_text(
        f'<?xml version="1.0"?><annotations><version>1.1</version><meta><task><labels>{names}</labels></task></meta>'
        f'{entries}</annotations>')
    return root


def cvat_video(root):
    """A track with two key frames, four frames apart, and one that moves into place: the frame between is made."""
    for i in range(1, 6):
        image(root / f'images/frame_{i:06d}.png', i)
    shifted = [[x + 8, y] for x, y in SQUARE]
    polygons = ''.join(f'<polygon frame="{i}" keyframe="1" outside="{int(i == 5)}" points="{points(p)}" z_order="0"/>'
                       for i, p in ((1, SQUARE), (5, shifted)))
    boxes = ''.join(f'<box frame="{i}" keyframe="1" outside="{int(i == 3)}" xtl="{6 + 2 * (i - 1)}" ytl="6" '
                    f'xbr="{10 + 2 * (i - 1)}" ybr="8" z_order="1"/>' for i in (1, 2, 3))
    (root / 'annotations.xml').write_text(
        f'<annotations><track id="0" label="a">{polygons}</track><track id="1" label="b">{boxes}</track></annotations>')
    return root


def label_studio(root):
    scale = np.array([100 / WIDTH, 100 / HEIGHT])
    tasks = []
    small = np.zeros((HEIGHT, WIDTH), bool)
    small[6:8, 6:10] = True
    for i in (1, 2):
        image(root / f'v_{i}.jpg')
        result = [
            dict(type='polygonlabels', id='p', original_width=WIDTH, original_height=HEIGHT,
                 value=dict(points=(np.array(SQUARE) * scale).tolist(), polygonlabels=['a'])),
            dict(type='brushlabels', id='q', value=dict(format='rle', rle=brush(small), brushlabels=['b'])) if i == 1
            else dict(type='rectanglelabels', id='q', value=dict(
                x=6 * scale[0], y=6 * scale[1], width=4 * scale[0], height=2 * scale[1], rotation=0,
                rectanglelabels=['b'])),
            dict(type='choices', id='r', value=dict(choices=['day']))]
        link = f'/data/upload/3/0a1b2c3d-v_{i}.jpg' if i == 1 else f'/data/local-files/?d=photos%2Fv_{i}.jpg'
        tasks.append(dict(id=i, data=dict(image=link), annotations=[dict(result=result), dict(was_cancelled=True)]))
    (root / 'export.json').write_text(json.dumps(tasks))
    return root / 'export.json'


def voc(root, labelmap=True):
    labels = expected()
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (root / folder).mkdir(parents=True)
    for i in (1, 2):
        image(root / f'JPEGImages/v_{i}.jpg')
        if labelmap:
            colours = np.zeros((256, 3), np.uint8)
            colours[[0, 1, 255]] = [(128, 0, 0), (0, 128, 0), (224, 224, 192)]
            Image.fromarray(colours[labels]).save(root / f'SegmentationClass/v_{i}.png')
        else:
            Image.fromarray(labels).save(root / f'SegmentationClass/v_{i}.png')
    (root / 'ImageSets/Segmentation/train.txt').write_text('v_1\nv_2\n')
    if labelmap:
        (root / 'labelmap.txt').write_text('# label:color_rgb:parts:actions\na:128,0,0::\nb:0,128,0::\n')
        for i in (1, 2):  # the border of VOC's objects, which CVAT does not write
            path = root / f'SegmentationClass/v_{i}.png'
            pixels = np.array(Image.open(path))
            pixels[labels == 255] = (0, 0, 0)
            Image.fromarray(pixels).save(path)
        with open(root / 'labelmap.txt', 'a') as file:
            file.write('background:0,0,0::\n')
    return root


def roboflow(root):
    (root / 'made').mkdir(parents=True)
    coco(root / 'made')
    content = json.loads((root / 'made/instances.json').read_text())
    content['categories'].insert(0, dict(id=0, name='things', supercategory='none'))
    for split in ('train', 'valid'):
        (root / split).mkdir()
        own = [entry for entry in content['images'] if (entry['id'] == 1) == (split == 'train')]
        ids = {entry['id'] for entry in own}
        for entry in own:
            os.rename(root / 'made/images' / entry['file_name'], root / split / entry['file_name'])
        (root / split / '_annotations.coco.json').write_text(json.dumps({
            **content, 'images': own,
            'annotations': [each for each in content['annotations'] if each['image_id'] in ids]}))
    return root


def roboflow_masks(root):
    (root / 'train').mkdir(parents=True)
    (root / 'train/_classes.csv').write_text('Pixel Value, Class\n0, background\n1, a\n2, b\n')
    for i in (1, 2):
        image(root / f'train/v_{i}.jpg')
        Image.fromarray((expected() + 1).astype(np.uint8)).save(root / f'train/v_{i}_mask.png')
    return root


def imported(kind, source, out, **options):
    return import_annotations(READERS[kind], source, out, **options)


@pytest.mark.parametrize('kind, make', [
    ('coco', coco), ('labelme', labelme), ('cvat', cvat), ('labelstudio', label_studio), ('roboflow', roboflow)])
def test_every_format_gives_the_same_label_maps(kind, make, tmp_path):
    (tmp_path / 'in').mkdir()
    report = imported(kind, make(tmp_path / 'in'), tmp_path / 'out')
    assert report.classes == ['a', 'b'] and not report.faults and report.annotations['drawn'] == 4
    others = {'coco': 1, 'labelme': 2, 'cvat': 4, 'labelstudio': 2, 'roboflow': 1}
    assert sum(report.annotations.values()) == 4 + others[kind]
    videos = ['v_train', 'v_val'] if kind == 'roboflow' else ['v']
    for path in (tmp_path / 'out/data').glob('*/mask/*.png'):
        assert (read_mask(str(path)) == expected()).all(), path
    assert sorted(path.name for path in (tmp_path / 'out/data').iterdir()) == videos
    listed = sorted((tmp_path / 'out').glob('*.txt'))
    assert [path.stem for path in listed] == (['train', 'val'] if kind == 'roboflow' else ['train'])
    suffix = '.png' if kind == 'labelme' else '.jpg'
    data = build_dataset({**config_for_testing(tmp_path / 'out', split='train'), 'type': 'VideoDataset',
                          'classes': str(tmp_path / 'out/classes.json'), 'layout': dict(frame_suffix=suffix)})
    assert data.CLASSES == ('a', 'b') and all((item['label'] == expected()).all() for item in data)


@pytest.mark.parametrize('make, names, shift', [
    (lambda root: voc(root), ['a', 'b', 'background'], {255: 2}), (lambda root: voc(root, False), None, {}),
    (roboflow_masks, ['background', 'a', 'b'], {0: 1, 1: 2, 255: 0})])
def test_sets_of_label_maps(make, names, shift, tmp_path):
    kind = 'roboflow' if make is roboflow_masks else 'voc'
    report = imported(kind, make(tmp_path / 'in'), tmp_path / 'out')
    assert report.classes == names or len(report.classes) == 21
    table = np.arange(256, dtype=np.uint8)
    for value, label in shift.items():
        table[value] = label
    paths = list((tmp_path / 'out/data').glob('*/mask/*.png'))
    assert len(paths) == 2 and all((read_mask(str(path)) == table[expected()]).all() for path in paths)
    assert report.annotations == {'label maps': 2} and report.frames == {'v': 2}


def test_tracks_are_interpolated_between_key_frames(tmp_path):
    (tmp_path / 'task').mkdir()
    report = imported('cvat', cvat_video(tmp_path / 'task'), tmp_path / 'out')
    assert report.frames == {'task': 4} and report.annotations['drawn'] == 6
    for i in range(1, 5):
        labels = read_mask(str(tmp_path / f'out/data/task/mask/frame_{i:06d}.png'))
        square = np.full((HEIGHT, WIDTH), 255, np.uint8)
        square[4:12, 4:12] = 0  # the next key frame is outside: the track stays where it was until then
        if i < 3:
            square[6:8, 4 + 2 * i:8 + 2 * i] = 1
        assert (labels == square).all(), i


def test_between_key_frames_polygons_move(tmp_path):
    (tmp_path / 'task').mkdir()
    file = cvat_video(tmp_path / 'task') / 'annotations.xml'
    file.write_text(file.read_text().replace('outside="1"', 'outside="0"'))
    imported('cvat', tmp_path / 'task', tmp_path / 'out')
    labels = read_mask(str(tmp_path / 'out/data/task/mask/frame_000003.png'))
    assert (labels[4:6] == 0).all(0).nonzero()[0].tolist() == list(range(8, 16))  # half way
    file.write_text(file.read_text().replace(points(SQUARE), points([*SQUARE, [3, 8]])))
    with pytest.raises(DataError, match='track 0, frame 2: key frames have 5 and 4 points, between which'):
        imported('cvat', tmp_path / 'task', tmp_path / 'other')


# Options, faults


def test_background_copies_splits_and_names_of_videos(tmp_path):
    (tmp_path / 'in').mkdir()
    source = coco(tmp_path / 'in')
    report = imported('coco', source, tmp_path / 'out', background='rest', copy=True, seed=3,
                      video_of=r'(?P<frame>v_(?P<video>\d))', split='train=0.5,val=0.5')
    assert report.classes == ['rest', 'a', 'b'] and set(report.frames) == {'1', '2'}
    assert sorted(len(videos) for videos in report.splits.values()) == [1, 1]
    labels = read_mask(str(tmp_path / 'out/data/1/mask/v_1.png'))
    assert (labels == np.where(expected() == 255, 0, expected() + 1)).all()
    frame = tmp_path / 'out/data/1/origin/v_1.jpg'
    assert frame.stat().st_nlink == 1 and frame.read_bytes() == (tmp_path / 'in/images/v_1.jpg').read_bytes()
    three = imported('coco', source, tmp_path / 'three', video_of=r'(?P<video>v_\d)', split='train=0.9,val=0.1')
    assert [len(videos) for videos in three.splits.values()] == [1, 1] and not three.notes
    alone = imported('coco', source, tmp_path / 'alone', split='train=0.5,val=0.5')
    assert len(alone.notes) == 1 and 'there are 1 in all' in alone.notes[0]
    (tmp_path / 'split.json').write_text('{"val": ["v"]}')
    linked = imported('coco', source, tmp_path / 'linked', split=str(tmp_path / 'split.json'))
    assert linked.splits == {'val': ['v']}
    assert (tmp_path / 'linked/data/v/origin/v_1.jpg').samefile(tmp_path / 'in/images/v_1.jpg')


@pytest.mark.parametrize('edit, message', [
    (lambda c: c['annotations'][1].update(category_id=9), 'annotation 2: category 9 is not in the list of categories'),
    (lambda c: c['annotations'][1].update(segmentation=[[90, 90, 99, 90, 99, 99]]), 'annotation 2: lies outside'),
    (lambda c: c['annotations'][1].update(segmentation=[[1, 2, 3, 4]]), 'annotation 2: a polygon needs at least three'),
    (lambda c: c['annotations'][1].update(segmentation=[['x', 2]]), 'annotation 2: a polygon should be numbers'),
    (lambda c: c['annotations'][0]['segmentation'].update(counts=[5, 6]), 'annotation 1: run lengths of 11 pixels'),
    (lambda c: c['annotations'][0]['segmentation'].update(size=[1, 2]), r'annotation 1: run lengths of an image of'),
    (lambda c: c['annotations'][2]['segmentation'].update(counts='~'), 'annotation 3: the character .~. is none'),
    (lambda c: c['images'][1].update(file_name='v_1.jpg'), "image 2: has the name 'v_1.jpg' of image 1"),
    (lambda c: c['images'][1].update(file_name='gone.jpg'), "image 2: the image 'gone.jpg' is not in .*no such file"),
    (lambda c: c['annotations'][1].update(image_id=5), r'annotation 2: image 5 is not in the list of images \(1 annot'),
    (lambda c: c['annotations'].append(7), 'annotation 5: has no image_id'),
])
def test_what_is_wrong_is_one_line_with_file_and_id(tmp_path, edit, message):
    """Nothing is left of the set; with keep_going only the entry is left out, and named."""
    (tmp_path / 'in').mkdir()
    source = coco(tmp_path / 'in')
    content = json.loads(source.read_text())
    edit(content)
    source.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r'instances.json, ' + message) as error:
        imported('coco', source, tmp_path / 'out')
    assert '\n' not in str(error.value) and os.listdir(tmp_path) == ['in']
    report = imported('coco', source, tmp_path / 'out', keep_going=True)
    assert len(report.faults) == 1 and report.annotations['drawn'] >= 2
    assert sum(report.frames.values()) == len(list((tmp_path / 'out/data').glob('*/mask/*.png')))


@pytest.mark.parametrize('kind, content, message', [
    ('coco', '{', 'is no JSON'), ('coco', '[]', 'expected a JSON'), ('coco', '{}', "expected 'categories'"),
    ('labelstudio', '{}', 'expected a JSON'), ('cvat', '<a/>', "expected the element 'annotations'"),
    ('cvat', '<a', 'is no XML'), ('cvat', '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', 'declares entities'),
])
def test_files_of_another_kind(tmp_path, kind, content, message):
    (tmp_path / 'x.json').write_text(content)
    with pytest.raises(DataError, match=message):
        imported(kind, tmp_path / 'x.json', tmp_path / 'out')
    for other in ('labelme', 'voc', 'roboflow'):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        with pytest.raises(DataError):
            imported(other, tmp_path / 'empty', tmp_path / 'out')
    assert sorted(os.listdir(tmp_path)) == ['empty', 'x.json']


def test_places_and_options_that_are_refused(tmp_path):
    (tmp_path / 'in').mkdir()
    source = coco(tmp_path / 'in')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/x').touch()
    for out, options, message in (
            ('full', {}, 'is there already'),
            ('in/images/out', {'images': tmp_path / 'in/images'}, 'lies in the folder'),
            ('o', {'split': 'train=0.5'}, 'add up to 1'), ('o', {'split': 'train'}, 'add up to 1'),
            ('o', {'video_of': '('}, 'no regular expression'), ('o', {'video_of': 'x'}, 'needs a group named video')):
        with pytest.raises(ConfigError, match=message):
            imported('coco', source, tmp_path / out, **options)
    with pytest.raises(DataError, match=r"v_1.jpg: --video-of .* finds no video in it"):
        imported('coco', source, tmp_path / 'o', video_of='(?P<video>cam)')
    assert sorted(os.listdir(tmp_path)) == ['full', 'in']


def test_an_interrupted_import_leaves_nothing(tmp_path):
    (tmp_path / 'in').mkdir()

    def stop(pictures):
        yield pictures[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported('coco', coco(tmp_path / 'in'), tmp_path / 'out', track=stop)
    assert os.listdir(tmp_path) == ['in']


def test_images_without_a_common_name_are_videos_of_one_frame(tmp_path):
    (tmp_path / 'in').mkdir()
    source = coco(tmp_path / 'in')
    content = json.loads(source.read_text())
    for entry, name in zip(content['images'], ('000000000139.jpg', 'street/7.png')):
        os.makedirs(tmp_path / 'in/images/street', exist_ok=True)
        os.rename(tmp_path / 'in/images' / entry['file_name'], tmp_path / 'in/images' / name)
        entry['file_name'] = name
    source.write_text(json.dumps(content))
    report = imported('coco', source, tmp_path / 'out')
    assert report.frames == Counter({'000000000139': 1, 'street': 1}) and len(report.notes) == 1


def test_the_tool_says_what_it_did_and_how_to_go_on(tmp_path):
    (tmp_path / 'in').mkdir()
    source = coco(tmp_path / 'in')
    done = run_tool('import_annotations', 'coco', source, tmp_path / 'out', '--background', 'rest')
    assert done.returncode == 0, done.stderr
    assert 'train: 1 videos, 2 frames' in done.stdout and '4 drawn, 1 without an area (box alone)' in done.stdout
    assert f"classes='{tmp_path}/out/classes.json'" in done.stdout
    done = run_tool('import_annotations', 'coco', source, tmp_path / 'out')
    assert done.returncode == 1 and 'is there already' in done.stderr and 'Traceback' not in done.stderr


def test_frames_of_a_video_for_those_who_label(tmp_path):
    pytest.importorskip('av')

    from mmseg.apps.video_io import VideoWriter

    writer = VideoWriter(tmp_path / 'drive.mp4', fps=Fraction(10))
    for i in range(12):
        writer.write(recipe.frame(0, i, 64, 96), Fraction(i, 10))
    writer.close()
    report = import_video(tmp_path / 'drive.mp4', tmp_path / 'out', every=5)
    names = sorted(path.name for path in (tmp_path / 'out/data/drive/origin').iterdir())
    assert names == ['00000000.jpg', '00000005.jpg', '00000010.jpg'] and report.frames == {'drive': 3}
    assert (tmp_path / 'out/train.txt').read_text() == 'drive\n'
    with pytest.raises(ConfigError, match='--every: expected a whole number >= 1'):
        import_video(tmp_path / 'drive.mp4', tmp_path / 'other', every=0)
