"""Data sets: which frames make a clip, what an item holds, and what a damaged data set says."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg.apps.check_dataset import SplitToCheck
from mmseg.datasets import (
    CamVidDataset,
    ConcatDataset,
    Layout,
    RepeatDataset,
    VideoDataset,
    VSPWDataset,
    build_dataset,
)
from mmseg.datasets.clip_sampler import cut_test_clips, frames_needed, sample_training_clip
from mmseg.registry import DATASETS, PIPELINES, build
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.names import order_changed
from tests.conftest import CAMVID
from tests.vspw_fixture import test_config as config_for_testing
from tests.vspw_fixture import train_config, write_video, write_vspw


@pytest.fixture(scope='module')
def vspw(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('vspw'))


@pytest.fixture
def damaged(vspw, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(vspw, tmp_path, dirs_exist_ok=True)
    return tmp_path


def build_train(root, **options):
    return build_dataset({**train_config(root)['dataset'], **options}, 'data.train.dataset')


def build_test(root, **options):
    return build_dataset(config_for_testing(root, **options), 'data.test')


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)


def test_training_clips_equal_the_recorded_ones(reference):
    for key, clips in reference('train_frames.json').items():
        length, dilation = re.fullmatch(r'n(\d+)_dil(.*)', key).groups()
        dilation = tuple(map(int, dilation.strip('[]').split(',')))
        for seed, expected in enumerate(clips):
            if expected is None:
                assert int(length) < frames_needed(dilation)
                continue
            seed_all(seed)
            assert list(sample_training_clip(int(length), dilation)) == expected, (key, seed)


def test_the_data_set_draws_the_recorded_frames(reference, tmp_path):
    """The same through files, items and pipeline: nothing else draws before the clip sampler."""
    write_vspw(tmp_path, {'train': {'v0': 12, 'v1': 12}})
    dataset = build_train(tmp_path, dilation=[-9, -6, -3])
    dataset.pipeline.transforms = dataset.pipeline.transforms[:1]
    for seed, expected in enumerate(reference('train_frames.json')['n12_dil[-9, -6, -3]']):
        seed_all(seed)
        item = dataset[seed % 2]
        assert item['all_names'] == [dataset.frame_path(f'v{seed % 2}', f'{p + 1:08d}') for p in expected]


@settings(deadline=None)
@given(st.integers(1, 60), st.sets(st.integers(-20, 0), min_size=1, max_size=5), st.integers(0, 2**31))
def test_training_clips_keep_their_offsets(length, offsets, seed):
    dilation = tuple(sorted(offsets))
    length += frames_needed(dilation) - 1
    seed_all(seed)
    clip = sample_training_clip(length, dilation)
    expected = dilation if dilation[-1] == 0 else (*dilation, 0)
    steps = {abs(position - clip[-1]) for position in clip}
    assert steps == {-offset for offset in expected} and len(clip) == len(expected)
    assert all(0 <= position < length for position in clip)
    assert len({np.sign(position - clip[-1]) for position in clip[:-1]}) <= 1  # all before, or all after (reversed)


def test_test_clips_equal_the_recorded_ones(reference):
    checked = 0
    for key, record in reference('test_groups.json').items():
        lengths, size = re.fullmatch(r'\[(.*)\]_ts(\d+)', key).groups()
        if not record.get('complete'):
            continue
        ours = [
            [f'v{video}', list(clip)] for video, length in enumerate(map(int, lengths.split(',')))
            for clip in cut_test_clips(length, int(size))
        ]
        assert ours == record['batches'], key
        checked += 1
    assert checked >= 10


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 20))
def test_test_clips_hold_every_frame_once(length, size):
    clips = cut_test_clips(length, size)
    assert sorted(position for clip in clips for position in clip) == list(range(length))
    assert all(len(clip) == size for clip in clips[:-1]) and all(1 <= len(clip) <= size for clip in clips)
    left_over = length - length % (3 * size)
    if size > 1:
        for clip in clips:
            stride = 3 if clip[0] < left_over else 1
            assert set(np.diff(clip).tolist()) <= {stride}


def test_items_of_training(vspw):
    dataset = build_dataset(train_config(vspw, dilation=[-3, -2, -1], times=4))
    assert len(dataset) == 12 and dataset.CLASSES == VSPWDataset.CLASSES and dataset.is_training
    item = dataset[11]
    assert item['img'].shape == (4, 3, 64, 64) and item['img'].dtype == torch.float32
    assert item['gt_semantic_seg'].shape == (4, 1, 64, 64) and item['gt_semantic_seg'].dtype == torch.int64
    assert item['skipped'] == [] and item['img_metas']['video'] == 'c'
    values = set(item['gt_semantic_seg'].unique().tolist())
    assert values <= {*range(124), 255}


def test_items_of_testing(vspw, reference, tmp_path):
    dataset = build_test(vspw, test_size=2, scale=(853, 480))
    assert [(clip.video, clip.positions) for clip in dataset.clips[:5]] == [
        (0, (0, 3)), (0, (1, 4)), (0, (2, 5)), (0, (6,)), (1, (0, 1))]
    item = dataset[0]
    assert item['video'] == 'v0' and item['frames'] == ['00000001', '00000004']
    assert item['img'][0].shape == (2, 3, 480, 864)
    assert item['label'].shape == (2, 60, 107) and item['label'].dtype == np.uint8
    raw = np.array(Image.open(dataset.mask_path('v0', '00000004')))
    assert np.array_equal(item['label'][1], np.where(raw == 0, 255, raw.astype(int) - 1))
    meta, recorded = item['img_metas'][0], reference('test_item_meta.json')
    for key, value in recorded.items():
        expected = [v.replace('DATA_ROOT', str(vspw)) for v in value] if key == 'all_names' else value
        expected = expected.replace('DATA_ROOT', str(vspw)) if key == 'filename' else expected
        assert list(meta[key]) == expected if isinstance(expected, list) else meta[key] == expected, key
    assert sum(len(dataset[i]['frames']) for i in range(len(dataset))) == 18


def test_a_split_without_masks_can_be_tested_but_not_trained_on(vspw):
    item = build_test(vspw, split='test')[0]
    assert item['label'] is None and item['img'][0].shape[0] == 1
    with pytest.raises(DataError, match=r'no masks.*training needs them'):
        build_train(vspw, split='test')


def test_hidden_files_are_no_masks(damaged):
    (damaged / 'data' / 't0' / 'mask' / '._00000001.png').write_bytes(b'of macOS')
    dataset = build_test(damaged, split='test')
    assert not dataset.has_masks and dataset[0]['label'] is None
    with pytest.raises(DataError, match='no masks'):
        build_train(damaged, split='test')
    (damaged / 'data' / 'v0' / 'mask' / '._00000001.png').write_bytes(b'of macOS')
    dataset = build_test(damaged)
    assert dataset.has_masks and dataset[0]['label'].shape == (1, 60, 107)


def test_aliases_and_retired_keys(vspw):
    assert len({DATASETS.get(f'VSPWDataset{n}') for n in ('', '2', '_multiFrameTest')}) == 1
    assert DATASETS.get('CamVidDataset') is CamVidDataset
    build_train(vspw, img_dir='images/training', ann_dir='annotations/training')
    with pytest.raises(ConfigError, match=r"data.train.dataset.dilations: .*did you mean 'dilation'"):
        build_train(vspw, dilations=[0])


def test_classes_are_those_of_the_reference(reference):
    recorded = reference('vspw_classes.json')
    assert list(VSPWDataset.CLASSES) == recorded['classes']
    assert [list(colour) for colour in VSPWDataset.PALETTE] == recorded['palette']


@pytest.mark.parametrize('dilation', [[-3], (-3,), -3])
def test_dilation_may_come_in_any_form_a_command_line_gives(vspw, dilation):
    assert build_train(vspw, dilation=dilation).dilation == (-3,)


@pytest.mark.parametrize('dilation', [[], [-1, -3], [3], [0, 0], ['-3'], '-3', [-1.5]])
def test_a_wrong_dilation_is_refused(vspw, dilation):
    with pytest.raises(ConfigError, match=r'dilation(\[0\])?: expected '):
        build_train(vspw, dilation=dilation)


def test_a_data_set_is_for_training_or_for_testing(vspw):
    with pytest.raises(ConfigError, match='either dilation'):
        build_test(vspw, dilation=[0])
    with pytest.raises(ConfigError, match='test_size: expected'):
        build_test(vspw, test_size=0)
    with pytest.raises(ConfigError, match='training and evaluation labels would differ'):
        build_train(vspw, reduce_zero_label=False)


def test_short_videos_are_named_at_start_up_or_skipped(vspw):
    message = r'2 videos have fewer than the 8 frames.*a \(7 frames\), c \(5 frames\).*set skip_short_videos=True'
    with pytest.raises(DataError, match=message):
        build_train(vspw, dilation=[-7])
    dataset = build_train(vspw, dilation=[-7], skip_short_videos=True)
    assert [video.name for video in dataset.videos] == ['b'] and dataset.short_videos == ['a', 'c']
    with pytest.raises(DataError, match='no other video is left'):
        build_train(vspw, dilation=[-70], skip_short_videos=True)


def test_split_files_may_be_untidy(damaged):
    (damaged / 'train.txt').write_bytes(b'\xef\xbb\xbfb\r\n\r\n  a \r\nb\r\nc')
    assert [video.name for video in build_train(damaged).videos] == ['b', 'a', 'c']


def test_files_that_are_no_frames_are_skipped_and_numbers_sort_as_numbers(damaged):
    folder = damaged / 'data' / 'a' / 'origin'
    for name in ('.00000001.jpg', 'Thumbs.db', '00000003.jpg.part'):
        (folder / name).write_bytes(b'')
    assert build_train(damaged).videos[0].frames == [f'{i:08d}' for i in range(1, 8)]
    for path in sorted(folder.glob('0*.jpg')):
        path.rename(folder / f'{int(path.stem) + 5}.jpg')
    assert build_train(damaged).videos[0].frames == [str(i) for i in range(6, 13)]


@pytest.mark.parametrize('names', [
    [f'frame_{i}' for i in range(1, 21)], [f'{i}_rgb' for i in range(1, 21)], [f'{i}' for i in range(1, 21)],
    [f'take{i}_{j}' for i in (2, 10) for j in (9, 10)], ['01', '1', '2'],
])
def test_frames_are_in_natural_order(damaged, names):
    for folder in ('origin', 'mask'):
        files = damaged / 'data' / 'b' / folder
        one = next(files.iterdir()).read_bytes()
        shutil.rmtree(files)
        files.mkdir()
        for name in names:
            (files / (name + ('.jpg' if folder == 'origin' else '.png'))).write_bytes(one)
    assert build_train(damaged).videos[1].frames == names


def test_where_the_order_of_frames_has_changed():
    assert order_changed([f'frame_{i}' for i in range(1, 21)])
    assert not order_changed([f'frame_{i:02d}' for i in range(1, 21)])
    assert not order_changed(map(str, range(1, 21))), 'numbers have always been in order'
    assert not order_changed(['01', '1', '10', 'x'])


@pytest.mark.parametrize('text,message', [
    ('a\n/etc\n', r"train.txt, line 2: the video name '/etc' leads out of the data set"),
    ('../a', r"the video name '../a' leads out"),
    ('a/../../b', 'leads out'),
    ('.', 'leads out'),
    ('a\nb\n'.encode('utf-16'), 'train.txt: is UTF-16 text; save it as UTF-8'),
    ('a\nb\n'.encode('utf-16-be'), 'holds zero bytes'),
    ('a\nb\n'.encode('utf-32'), 'is UTF-32 text'),
    ('a\nstra\xdfe\n'.encode('latin-1'), r'train.txt, line 2: byte 0xdf is not UTF-8 \(Latin-1'),
])
def test_split_files_that_cannot_be_followed(damaged, text, message):
    (damaged / 'train.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        build_train(damaged)


def test_video_names_may_have_slashes(tmp_path):
    write_vspw(tmp_path, {'train': {'city/a': 4, 'city/b': 4}, 'val': {'city/v': 3}})
    (tmp_path / 'train.txt').write_text('city/a/\n./city//b\ncity/a\n')
    dataset = build_train(tmp_path)
    assert [video.name for video in dataset.videos] == ['city/a', 'city/b']
    assert dataset[1]['img_metas']['video'] == 'city/b'
    assert build_test(tmp_path)[0]['label'] is not None


@pytest.mark.parametrize('kind,what', [('origin', "frame_suffix), there are .jpeg (7)"), ('mask', '.bmp (7)')])
def test_files_of_another_suffix_are_named(damaged, kind, what):
    for video in 'abc':
        for path in list((damaged / 'data' / video / kind).iterdir()):
            path.rename(path.with_suffix('.jpeg' if kind == 'origin' else '.bmp'))
    looked_for = {'origin': '.jpg', 'mask': '.png'}[kind]
    with pytest.raises(DataError, match=f"/a/{kind}: no file ends in '{looked_for}' .*{re.escape(what)}"):
        build_train(damaged)


def test_a_folder_without_permission_is_named(damaged, monkeypatch):
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith(kind):
            raise PermissionError(13, 'Permission denied', str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, 'listdir', refuse)
    for kind in ('b/origin', 'a/mask'):
        with pytest.raises(DataError, match=f'{kind}: cannot be read: Permission denied'):
            build_train(damaged)


@pytest.mark.parametrize('options,message', [
    (dict(test_size=True), 'test_size: expected (a whole number|int or None)'),
    (dict(classes='no.txt'), "data.test.classes: 'no.txt' cannot be read: No such file"),
    (dict(classes=['car', 3]), r'data.test.classes\[1\]: expected str, got 3'),
    (dict(classes=['car', 'roat']), r"\['roat'\] are not among the 124 .*mean 'boat|road'.*and a palette"),
    (dict(classes=['car'], other='car', label_map={1: 0}), r"other: collects .*in a label_map it is the key 'other'"),
    (dict(other='rest'), r'data.test.other: collects what classes'),
    (dict(label_map={1: 124}), r'data.test.label_map\[1\]: expected a class, 0..123 .*got 124'),
    (dict(label_map={1: 'wal'}), r"data.test.label_map\[1\]: no class 'wal' .did you mean 'wall'"),
    (dict(label_map={-1: 0}), r"data.test.label_map: -1 is no raw label 0..255, nor 'other'"),
    (dict(label_map={200: 0}), r'label_map: masks of VSPWDataset hold no \[200\], but 0..124 and 255'),
    (dict(label_map=[[1, 0], [1, 2]]), r'label_map: 1 is there more than once'),
    (dict(label_map=[1]), r'data.test.label_map\[0\]: expected list, got 1'),
    (dict(colour_map={(0, 0, 300): 0}), r"colour_map: \(0, 0, 300\) is no colour"),
    (dict(label_map={1: 0}, colours=True), 'label_map: not together with colours'),
    (dict(decoder='redd_channel'), r"unknown mask decoder 'redd_channel' .did you mean 'red_channel'"),
    (dict(unlabelled='no'), r"unlabelled: expected 'error' or 'ignore' or 'skip'"),
    (dict(classes=['a', 'b', 'a'], palette=[[0, 0, 0]] * 3), r"classes: \['a'\] are there more than once"),
    (dict(classes=[f'c{i}' for i in range(254)], palette=[[0, 0, 0]] * 254), 'at most 253 classes, got 254'),
    (dict(classes=['a', 'b'], palette=[[0, 0, 0]]), '2 classes but 1 colours'),
    (dict(classes=['a', 'b'], palette=[[0, 0, 0], [0, 0]]), r'data.test.palette: expected \[R, G, B\]'),
    (dict(classes=['a', 'b'], palette=[[0, 0, 0], [0, 0, 256]]), r'0..255 for each of the 2 classes'),
    (dict(classes=['a', 'b'], palette=[[0, 0, 0], [0, 0, 0.5]]), 'expected int, got 0.5'),
    (dict(classes=['a', 'b'], palette='viridis'), 'data.test.palette: expected'),
    (dict(palette=7), 'data.test.palette: expected'),
    (dict(layout=dict(frame_suffix='jpg')), r"data.test.layout.frame_suffix: .* with its dot.*got 'jpg'"),
    (dict(layout=dict(frames='{vidio}')), r"data.test.layout.frames: .*{video} for names, got '{vidio}'"),
    (dict(layout=dict(masks=3)), 'data.test.layout.masks: expected str'),
    (dict(layout='own'), 'data.test.layout: expected Layout or dict'),
    (dict(data_root=None), 'data.test.data_root: expected (the folder of the data set|str), got None'),
    (dict(split=''), "data.test.split: expected the name of a split"),
    (dict(ignore_index=0), 'data.test.ignore_index: VSPWDataset supports only 255, got 0; remove the key'),
])
def test_wrong_values_are_one_error_in_data_set_and_check(vspw, options, message):
    cfg = {**config_for_testing(vspw), **options}
    with pytest.raises(ConfigError, match=message):
        build_dataset(cfg, 'data.test')
    if 'ignore_index' not in options:  # every argument's name is checked when the config is loaded
        with pytest.raises(ConfigError, match=message):
            SplitToCheck.from_config(cfg, 'data.test')


def test_void_is_255_everywhere(vspw):
    assert build_train(vspw, ignore_index=255).ignore_index == 255
    crop = dict(type='RandomCrop', crop_size=(64, 64))
    build(PIPELINES, {**crop, 'ignore_index': 255}, 'step')
    with pytest.raises(ConfigError, match=r'step\.ignore_index: RandomCrop supports only 255, got 0'):
        build(PIPELINES, {**crop, 'ignore_index': 0}, 'step')


def test_the_home_folder_and_the_suffix_of_a_split(vspw, monkeypatch):
    monkeypatch.setenv('HOME', str(vspw.parent))
    dataset = build_test(f'~/{vspw.name}', split='val.txt')
    assert dataset.data_root == str(vspw) and dataset.split == 'val' and dataset[0]['label'] is not None


def test_changed_entries_of_a_layout_are_those_of_the_class(tmp_path):
    cfg = {**config_for_testing(tmp_path), 'type': OwnDataset, 'layout': dict(masks='more/{video}')}
    (split,) = SplitToCheck.from_config(cfg, 'data.val')
    assert split.files.layout == replace(OwnDataset.layout, masks='more/{video}')
    with pytest.raises(DataError, match=r'lists/val.lst: no such split file'):
        build_dataset(cfg)


def test_a_frame_that_is_turned_has_no_fitting_mask(damaged):
    exif = Image.Exif()
    exif[274] = 3
    for video in ('v0', 't0'):
        path = damaged / 'data' / video / 'origin' / '00000001.jpg'
        with Image.open(path) as image:
            image.save(path, exif=exif)
    with pytest.raises(DataError, match=r"video 'v0', frame 00000001: .*EXIF orientation 3"):
        _ = build_test(damaged)[0]
    assert build_test(damaged, split='test')[0]['img'] is not None, 'no mask that it could disagree with'


@pytest.mark.parametrize('break_it,message', [
    (lambda root: shutil.rmtree(root / 'data' / 'b'),
     r'no frames of 1 videos: b \(.*data/b/origin: no such folder\); .*split file'),
    (lambda root: (root / 'train.txt').write_text('\n \n'), 'names no video'),
    (lambda root: (root / 'train.txt').unlink(), r"train.txt: no such split file; there are \['test.txt', 'val.txt'\]"),
    (lambda root: shutil.rmtree(root), 'no such folder; set data_root'),
    (lambda root: [p.unlink() for p in (root / 'data' / 'b' / 'origin').iterdir()], r'b \(0 frames\)'),
])
def test_a_damaged_data_set_is_refused_at_start_up(damaged, break_it, message):
    break_it(damaged)
    with pytest.raises(DataError, match=message):
        build_train(damaged)


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def void(root, name):
    for path in (root / 'data' / name / 'mask').iterdir():
        Image.fromarray(np.zeros((60, 107), np.uint8)).save(path)


def test_training_names_a_bad_frame_or_passes_over_it(damaged):
    for path in (damaged / 'data' / 'a' / 'origin').iterdir():
        truncate(path)
    with pytest.raises(DataError, match=r"video 'a', frame 0000000\d: .*a/origin/0000000\d.jpg: truncated JPEG"):
        _ = build_train(damaged)[0]
    item = build_train(damaged, skip_bad_clips=True)[0]
    assert item['img_metas']['video'] in 'bc' and item['skipped'] and 'truncated JPEG' in item['skipped'][0]


def test_testing_names_a_bad_mask_or_passes_over_its_clip(damaged):
    (damaged / 'data' / 'v1' / 'mask' / '00000002.png').unlink()
    dataset = build_test(damaged)
    assert dataset[7]['label'] is not None
    with pytest.raises(DataError, match=r"video 'v1', frame 00000002: .*00000002.png: no such file"):
        _ = dataset[8]
    item = build_test(damaged, skip_bad_clips=True)[8]
    assert item['img'] is None and item['label'] is None and item['frames'] == ['00000002']
    assert len(item['skipped']) == 1 and 'no such file' in item['skipped'][0]


def test_sizes_that_differ_inside_a_clip_are_named(damaged):
    write_video(damaged, 'v1', 1, size=(64, 100))
    with pytest.raises(DataError, match=r"00000002.jpg: 107x60, but .*00000001.jpg of the same clip is 100x64"):
        _ = build_test(damaged, test_size=5)[7 // 5 + 1]


def test_a_clip_of_void_is_drawn_again(damaged):
    void(damaged, 'a')
    dataset = build_train(damaged)
    assert {dataset[0]['img_metas']['video'] for _ in range(6)} <= {'b', 'c'}
    for name in 'bc':
        void(damaged, name)
    with pytest.raises(DataError, match='none of 100 clips drawn could be used: 0 could not be read and 100 hold void'):
        _ = dataset[0]


class OwnDataset(VideoDataset):
    """What a user writes for data of their own."""

    CLASSES = ('background', 'thing')
    PALETTE = ((0, 0, 0), (255, 0, 0))
    layout = Layout(split_file='lists/{split}.lst', frames='{split}/{video}/rgb', masks='labels/{video}',
                    frame_suffix='.jpeg', mask_suffix='_label.png')


def test_a_data_set_of_ones_own_is_a_few_names(tmp_path):
    write_vspw(tmp_path / 'made', {'train': {'x': 3}})
    for folder in ('lists', 'train/x/rgb', 'labels/x'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'lists' / 'train.lst').write_text('x')
    made = tmp_path / 'made' / 'data' / 'x'
    for path in (made / 'origin').iterdir():
        path.rename(tmp_path / 'train/x/rgb' / f'{path.stem}.jpeg')
        label = np.array(Image.open(made / 'mask' / f'{path.stem}.png')) % 2
        Image.fromarray(label).save(tmp_path / 'labels/x' / f'{path.stem}_label.png')
    cfg = config_for_testing(tmp_path, split='train')
    item = OwnDataset(**{k: v for k, v in cfg.items() if k != 'type'})[0]
    assert set(np.unique(item['label'])) == {0, 1} and item['frames'] == ['00000001']
    by_config = build_dataset({
        **cfg, 'type': 'VideoDataset', 'classes': ['background', 'thing'], 'palette': [[0, 0, 0], [9, 9, 9]],
        'layout': vars(OwnDataset.layout)})
    assert np.array_equal(by_config[0]['label'], item['label'])
    with pytest.raises(ConfigError, match=r"data.test.layout.frame: .*did you mean 'frames'"):
        build_dataset({**cfg, 'layout': dict(frame='x')}, 'data.test')


def test_wrappers(vspw):
    cfg = train_config(vspw, times=1)['dataset']
    joined = build_dataset([cfg, dict(type='RepeatDataset', times=2, dataset=cfg)])
    assert isinstance(joined, ConcatDataset) and len(joined) == 9
    assert [joined[i]['img_metas']['video'] for i in (0, 2, 3, 8, -1)] == ['a', 'c', 'a', 'c', 'c']
    assert isinstance(build_dataset(train_config(vspw)), RepeatDataset)
    with pytest.raises(ConfigError, match=r'data.train.dataset.dataset.type'):
        build_dataset(dict(type='RepeatDataset', times=1, dataset=dict(
            type='RepeatDataset', times=1, dataset=dict(type='VSPWDataset3'))))
    for wrong in (None, 5, 'a', [cfg]):
        with pytest.raises(ConfigError, match=r"train.dataset: expected (a dict with a 'type' key|dict or Dataset)"):
            build_dataset(dict(type='RepeatDataset', times=1, dataset=wrong))
    with pytest.raises(ConfigError, match='joins training sets'):
        build_dataset([config_for_testing(vspw)])


@pytest.mark.skipif(not CAMVID.exists(), reason='CamVid is not here')
def test_camvid_loads():
    cfg = {**config_for_testing(CAMVID, test_size=4, scale=(240, 180)), 'type': 'CamVidDataset'}
    dataset = build_dataset(cfg)
    assert len(dataset.videos) == 1 and sum(len(clip.positions) for clip in dataset.clips) == 101
    item = dataset[0]
    assert item['label'].shape == (4, 360, 480) and item['img'][0].shape == (4, 3, 192, 256)
    assert set(np.unique(item['label']).tolist()) <= {*range(11), 255}


def test_a_data_set_can_be_sent_to_a_spawned_worker(vspw):
    dataset = pickle.loads(pickle.dumps(build_dataset(train_config(vspw))))
    assert dataset[0]['img'].shape == (1, 3, 64, 64)
