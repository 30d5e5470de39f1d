"""Layouts: where files are looked for, which video and frame they are of, and what is said when they are not there."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest

from mmseg.datasets import Layout, Split, VideoDataset
from mmseg.registry import check_arguments
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting

CITY = dict(
    split_file=None, frames='images/{split}', masks='fine/{split}',
    frame_pattern=r'[^/]+/(?P<video>[a-z]+_\d+)_(?P<frame>\d+)_image\.png',
    mask_pattern=r'[^/]+/(?P<video>[a-z]+_\d+)_(?P<frame>\d+)_labels\.png')
IMAGES = dict(split_file=None, frames='images/{split}', masks='labels/{split}')
FOLDERS = dict(split_file=None, frames='{split}/{video}/rgb', masks='{split}/{video}/seg')


class Own(VideoDataset):
    CLASSES = ('a', 'b')
    PALETTE = ((0, 0, 0), (9, 9, 9))


def split_of(root, name='train', **layout):
    return Split.of(Own, str(root), name, layout=layout)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def below(root, *paths):
    return [str(Path(path).relative_to(root)) for path in paths]


def city_paths(*frames, split='train', city='aachen', sequence='000000'):
    stem = f'{city}/{city}_{sequence}_'
    return [f'images/{split}/{stem}{frame:06d}_image.png' for frame in frames]


def test_videos_are_groups_of_files_in_one_folder(tmp_path):
    touch(tmp_path, *city_paths(2, 1, 10), *city_paths(5, city='bonn', sequence='000003'),
          'fine/train/aachen/aachen_000000_000002_labels.png', 'fine/train/aachen/aachen_000000_000002_color.png',
          'fine/train/aachen/aachen_000000_000002_polygons.json')
    split = split_of(tmp_path, **CITY)
    assert split.videos() == ['aachen_000000', 'bonn_000003']
    assert split.files('frames', 'aachen_000000') == ['000001', '000002', '000010']
    assert split.files('masks', 'aachen_000000') == ['000002'] and not split.has('masks', 'bonn_000003')
    path = split.path('frames', 'aachen_000000', '000010')
    assert below(tmp_path, path) == city_paths(10) and split.frame_name(path) == '000010'
    assert below(tmp_path, split.path('masks', 'aachen_000000', '000002')) == [
        'fine/train/aachen/aachen_000000_000002_labels.png']
    assert not os.path.exists(split.path('masks', 'aachen_000000', '000001'))
    assert below(tmp_path, split.folder('frames', 'bonn_000003')) == ['images/train/bonn']


def test_further_groups_are_joined_to_the_name(tmp_path):
    touch(tmp_path, *city_paths(1, 2))
    pattern = r'(?P<city>[^/]+)/(?P=city)_(?P<sequence>\d+)_(?P<frame>\d+)_image\.png'
    assert split_of(tmp_path, **{**CITY, 'frame_pattern': pattern}).videos() == ['aachen/000000']


def test_a_path_that_names_no_video_is_none(tmp_path):
    touch(tmp_path, 'f/a_1.jpg', 'f/2.jpg')
    pattern = r'(?:(?P<video>[a-z]+)_)?(?P<frame>\d+)\.jpg'
    split = split_of(tmp_path, split_file=None, frames='f', masks='m/{video}', frame_pattern=pattern)
    assert split.videos() == ['a'] and split.files('frames', 'a') == ['1']


def test_patterns_of_names_in_the_folders_of_videos(tmp_path):
    touch(tmp_path, 'data/a/origin/left_2.jpeg', 'data/a/origin/left_10.jpeg', 'data/a/origin/right_2.jpeg',
          'data/a/mask/label-2.png')
    (tmp_path / 'train.txt').write_text('a')
    split = split_of(tmp_path, frame_pattern=r'left_(?P<frame>\d+)\.jpeg', mask_pattern=r'label-(?P<frame>\d+)\.png')
    assert split.files('frames', 'a') == ['2', '10'] and split.files('masks', 'a') == ['2']
    path = split.path('frames', 'a', '10')
    assert below(tmp_path, path) == ['data/a/origin/left_10.jpeg'] and split.frame_name(path) == '10'
    assert not os.path.exists(split.path('masks', 'a', '10'))


def test_an_image_is_a_video_of_one_frame(tmp_path):
    touch(tmp_path, 'images/train/x_10.jpg', 'images/train/x_2.jpg', 'images/train/more/y.jpg', 'labels/train/x_2.png')
    split = split_of(tmp_path, **IMAGES)
    assert split.videos() == ['more/y', 'x_2', 'x_10']
    assert split.files('frames', 'x_2') == ['x_2'] and split.files('frames', 'more/y') == ['y']
    assert below(tmp_path, split.path('masks', 'x_2', 'x_2')) == ['labels/train/x_2.png']
    assert split.has('masks', 'x_2') and not split.has('masks', 'x_10')
    listed = split_of(tmp_path, **{**IMAGES, 'split_file': '{split}.txt'})
    (tmp_path / 'train.txt').write_text('x_10\nx_2\n')
    assert listed.videos() == ['x_10', 'x_2']


@pytest.mark.parametrize('mask_suffix', ['.png', '_label.jpg'])
def test_frames_and_masks_side_by_side(tmp_path, mask_suffix):
    touch(tmp_path, 'all/a.jpg', 'all/b.jpg', f'all/a{mask_suffix}')
    split = split_of(tmp_path, 'all', split_file=None, frames='{split}', masks='{split}', mask_suffix=mask_suffix)
    assert split.videos() == ['a', 'b'] and split.files('masks', 'a') == ['a'] and not split.has('masks', 'b')


def test_nested_videos_need_no_list(tmp_path):
    touch(tmp_path, *(f'train/{video}/{kind}' for video in ('rome/10', 'rome/9', 'alone')
                      for kind in ('rgb/1.jpg', 'seg/1.png')), 'train/rome/empty/rgb/notes.txt', 'val/other/rgb/1.jpg')
    split = split_of(tmp_path, **FOLDERS)
    assert split.videos() == ['alone', 'rome/9', 'rome/10']
    assert split.files('frames', 'rome/9') == ['1'] and split.has('masks', 'rome/10')
    assert below(tmp_path, split.path('frames', 'rome/9', '1')) == ['train/rome/9/rgb/1.jpg']


@pytest.mark.parametrize('text', ['["b", "a"]', '{"train": ["b", "./a", "b"], "val": []}'])
def test_a_json_list_of_videos(tmp_path, text):
    touch(tmp_path, 'data/a/origin/1.jpg', 'data/b/origin/1.jpg')
    (tmp_path / 'splits.json').write_text(text)
    assert split_of(tmp_path, split_file='splits.json').videos() == ['b', 'a']


@pytest.mark.parametrize('pattern,videos', [
    ('maps/{split}/*', ['2', '10']), ('data/*', ['2', '3', '10']), ('maps/*/1*', ['train/10', 'val/11']),
    ('lists/*.txt', ['2'])])
def test_a_glob_names_the_videos(tmp_path, pattern, videos):
    touch(tmp_path, 'maps/train/10/1.png', 'maps/train/2/1.png', 'maps/val/11/1.png', 'lists/2.txt',
          *(f'data/{video}/origin/1.jpg' for video in ('2', '3', '10')))
    assert split_of(tmp_path, split_file=pattern).videos() == videos


def test_videos_may_be_left_out(tmp_path):
    touch(tmp_path, *(f'train/{video}/rgb/1.jpg' for video in ('a/1', 'a/2', 'b', 'bad')))
    assert split_of(tmp_path, **FOLDERS, exclude=['bad', 'a/*']).videos() == ['b']
    with pytest.raises(DataError, match=r'layout.exclude leaves out all 4 videos: a/1, a/2, b, bad'):
        split_of(tmp_path, **FOLDERS, exclude=['*']).videos()


def cut(root, **layout):
    split = split_of(root, **layout)
    return split, {video: split.files('frames', video) for video in split.videos()}


def test_a_video_is_cut_at_gaps(tmp_path):
    touch(tmp_path, *city_paths(8, 9, 10, 13, 14, 30), *city_paths(7, city='bonn'),
          *(f'fine/train/aachen/aachen_000000_{frame:06d}_labels.png' for frame in (9, 11, 30)))
    assert cut(tmp_path, **CITY, max_gap=30)[1].keys() == {'aachen_000000', 'bonn_000000'}
    split, videos = cut(tmp_path, **CITY, max_gap=2)
    assert videos == {
        'aachen_000000_000008-000010': ['000008', '000009', '000010'],
        'aachen_000000_000013-000014': ['000013', '000014'],
        'aachen_000000_000030-000030': ['000030'],
        'bonn_000000': ['000007']}
    assert [split.files('masks', video) for video in videos] == [
        ['000009', '000011'], [], ['000030'], None]
    last = 'aachen_000000_000030-000030'
    assert below(tmp_path, split.path('frames', last, '000030')) == city_paths(30)
    assert below(tmp_path, split.folder('frames', last)) == ['images/train/aachen']
    assert list(cut(tmp_path, **CITY, max_gap=2, exclude=['*_000013-*', 'bonn*'])[1]) == [
        'aachen_000000_000008-000010', last]


def test_listed_videos_are_cut_too(tmp_path):
    touch(tmp_path, *(f'data/{video}/{kind}' for video, frame in (('a', 1), ('a', 2), ('a', 9), ('b', 3))
                      for kind in (f'origin/{frame}.jpg', f'mask/{frame}.png')))
    (tmp_path / 'train.txt').write_text('b\na')
    split, videos = cut(tmp_path, max_gap=3)
    assert videos == {'b': ['3'], 'a_1-2': ['1', '2'], 'a_9-9': ['9']}
    assert split.files('masks', 'a_9-9') == ['9']
    assert below(tmp_path, split.path('masks', 'a_9-9', '9')) == ['data/a/mask/9.png']
    assert below(tmp_path, split.folder('frames', 'a_9-9')) == ['data/a/origin']
    touch(tmp_path, 'data/a_9-9/origin/1.jpg')
    (tmp_path / 'train.txt').write_text('b\na\na_9-9')
    with pytest.raises(DataError, match=r"a part of the video 'a', .* would have the name of the video 'a_9-9'"):
        cut(tmp_path, max_gap=3)
    touch(tmp_path, 'data/b/origin/title.jpg')
    with pytest.raises(DataError, match=r"max_gap needs a number.* frame 'title' of video 'b' has none"):
        cut(tmp_path, max_gap=3)


def test_a_split_keeps_what_it_found_when_it_is_sent_to_a_worker(tmp_path):
    touch(tmp_path, *city_paths(1, 9))
    split = split_of(tmp_path, **CITY, max_gap=1)
    names = split.videos()
    (tmp_path / 'images').rename(tmp_path / 'elsewhere')
    assert pickle.loads(pickle.dumps(split)).files('frames', names[1]) == ['000009']


@pytest.mark.parametrize('layout,message', [
    (dict(frame_pattern='(?P<frame>'), r"layout.frame_pattern: '\(\?P<frame>' is no regular expression: missing \)"),
    (dict(frame_pattern=r'(\d+)\.jpg'), r"expected the one named group \(\?P<frame>...\), since .*'data/{video}/ori"),
    (dict(mask_pattern=r'(?P<video>a)(?P<frame>b)'), r'layout.mask_pattern: expected the one named group'),
    (dict(frames='f', frame_pattern=r'(?P<frame>\d+)\.jpg'), r"expected a named group for the video, .*'f' has no {v"),
    (dict(frames='f', masks='m', frame_pattern=r'(?P<video>a)(?P<frame>b)'), "mask_pattern: masks 'm' lie in one fol"),
    (dict(max_gap=0), 'layout.max_gap: expected int, at least 1'),
    (dict(exclude='a'), 'layout.exclude: expected list of str'),
    (dict(split_file='{splitt}.txt'), r'layout.split_file: expected a path'),
    (dict(frame_patern='a'), "did you mean 'frame_pattern'"),
])
def test_layouts_that_do_not_work_are_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(Layout, layout, 'layout')
        Layout(**layout)


@pytest.mark.parametrize('layout,message', [
    (CITY, r"split 'train' of .* has no frames; .*images/train: no path has the pattern '\[\^/\].*"
           r"\(layout.frame_pattern\), there are aachen/1.png, aachen/2.png, bonn/1.png and 1 more"),
    ({**CITY, 'frames': 'image'}, '/image: no such folder'),
    ({**IMAGES, 'frames': 'empty'}, r"/empty: no path ends in '.jpg' \(layout.frame_suffix\), it is empty"),
    (FOLDERS, "has no frames"),
    (dict(split_file='splits.json'), r"splits.json: no such split file; there are \['damaged.json', 'lists.json'\]"),
    (dict(split_file='lists.json'), "lists.json: has no split 'train'; it has test, val"),
    (dict(split_file='damaged.json'), 'damaged.json: is no JSON'),
    (dict(split_file='images/*/x'), r'images/\*/x: nothing has such a name \(layout.split_file\)'),
])
def test_what_is_missing_is_named_with_what_is_there(tmp_path, layout, message):
    touch(tmp_path, *(f'images/train/{path}.png' for path in ('aachen/1', 'aachen/2', 'bonn/1', 'bonn/2')))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'lists.json').write_text(json.dumps({'test': [], 'val': []}))
    (tmp_path / 'damaged.json').write_text('["a"')
    with pytest.raises(DataError, match=message):
        split_of(tmp_path, **layout).videos()


@pytest.mark.parametrize('content', ['{"train": "a"}', '[1]', '"a"'])
def test_a_json_file_of_something_else(tmp_path, content):
    (tmp_path / 's.json').write_text(content)
    with pytest.raises(DataError, match=r's.json: expected a list of names of videos, or a dict of such lists'):
        split_of(tmp_path, split_file='s.json').videos()
    (tmp_path / 's.json').write_text('["../a"]')
    with pytest.raises(DataError, match=r"s.json: the video name '../a' leads out"):
        split_of(tmp_path, split_file='s.json').videos()


def test_two_files_of_one_frame(tmp_path):
    touch(tmp_path, *city_paths(1), 'images/train/other/aachen_000000_000001_image.png')
    message = r"'aachen/aachen_\S+' and 'other/aachen_\S+' would both be frame '000001' of one video"
    with pytest.raises(DataError, match=message):
        split_of(tmp_path, **CITY).videos()


def test_a_listed_video_that_is_not_in_the_folder_of_all(tmp_path):
    touch(tmp_path, 'images/train/x.jpg')
    (tmp_path / 'train.txt').write_text('y')
    message = r"no frames of 1 videos: y \(.*/train: no path that ends in '.jpg'.* is of the video 'y'; there are .* x"
    with pytest.raises(DataError, match=message):
        Own(str(tmp_path), 'train', [], dilation=[0], layout={**IMAGES, 'split_file': '{split}.txt'})


def test_results_are_not_written_among_the_frames(tmp_path):
    touch(tmp_path, *city_paths(1), 'images/train/aachen/x.json')
    split = split_of(tmp_path, **CITY)
    for output in ('images/train/aachen', 'images/train/aachen_000000'):
        with pytest.raises(ConfigError, match=r'--out: .* would be overwritten'):
            refuse_overwriting({'--out': tmp_path / output}, split.inputs())
    refuse_overwriting({'--out': tmp_path / 'results'}, split.inputs())
    with pytest.raises(ConfigError, match="the file of the frames of 'aachen_000000'"):
        refuse_overwriting({'--json': tmp_path / city_paths(1)[0]}, split.inputs(Path(city_paths(1)[0]).name))


def test_folders_that_lead_back_are_read_once(tmp_path):
    touch(tmp_path, 'images/train/a.jpg')
    (tmp_path / 'images/train/again').symlink_to(tmp_path / 'images')
    assert split_of(tmp_path, **IMAGES).videos() == ['a']


@pytest.fixture
def read(monkeypatch):
    """How often each folder has been read."""
    found: Counter[str] = Counter()
    for name in ('listdir', 'scandir'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, real=real: (found.update([str(path)]), real(path))[1])
    return found


def test_a_folder_of_many_videos_is_read_once(tmp_path, read):
    for city in ('a', 'b'):
        folder = tmp_path / 'images' / 'train' / city
        folder.mkdir(parents=True)
        for sequence in range(50):
            for frame in range(30):
                (folder / f'{city}_{sequence:06d}_{frame:06d}_image.png').touch()
    touch(tmp_path, 'fine/train/a/a_000000_000019_labels.png')
    split = split_of(tmp_path, **CITY, max_gap=1)
    frames = sum(len(split.files('frames', video)) for video in split.videos())
    assert frames == 3000 and sum(split.has('masks', video) for video in split.videos()) == 1
    assert max(read.values()) == 1 and len(read) == 5, read


@pytest.mark.parametrize('layout', [dict(max_gap=1), dict(max_gap=1, split_file=None), dict(split_file=None)])
def test_the_folder_of_a_video_is_read_once_however_it_is_cut(tmp_path, read, layout):
    touch(tmp_path, *(f'data/a/{kind}' for i in (1, 5, 9) for kind in (f'origin/{i}.jpg', f'mask/{i}.png')))
    (tmp_path / 'train.txt').write_text('a')
    assert len(cut(tmp_path, **layout)[1]) == (3 if 'max_gap' in layout else 1)
    assert read[str(tmp_path / 'data/a/origin')] == 1
