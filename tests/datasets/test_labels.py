"""What mask files mean: label maps, parts of the classes, colours, ids; and frames without labels."""

from __future__ import annotations

import json
import random
import types

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg.apis.test import metrics_for, stream_test
from mmseg.apps.check_dataset import SplitToCheck, check_split
from mmseg.datasets import VideoDataset, build_dataset
from mmseg.datasets.clip_sampler import can_draw, sample_training_clip
from mmseg.datasets.labels import LabelRule, describe_labels, voc_colours
from mmseg.models import build_segmentor
from mmseg.registry import MASK_DECODERS
from mmseg.utils.errors import ConfigError, DataError
from tests.tiny import tiny_model
from tests.vspw_fixture import test_config as config_for_testing
from tests.vspw_fixture import train_config, write_vspw

RAW = np.array([[0, 1, 2, 3], [255, 3, 2, 1]], np.uint8)
PALETTE = ((10, 20, 30), (40, 50, 60), (70, 80, 90))
THREE = types.SimpleNamespace(
    CLASSES=('a', 'b', 'c'), PALETTE=PALETTE, reduce_zero_label=True, label_map=None, colours=False, decoder=None)
OWN = types.SimpleNamespace(**{**vars(THREE), 'CLASSES': (), 'PALETTE': (), 'reduce_zero_label': False})


def written(path, pixels, mode=None):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels, mode)
    image.save(path)
    return str(path)


@pytest.mark.parametrize('component, options, names, expected', [
    (THREE, {}, 'abc', [[255, 0, 1, 2], [255, 2, 1, 0]]),
    (THREE, {'classes': ['c', 'a']}, 'ca', [[255, 1, 255, 0], [255, 0, 255, 1]]),
    (THREE, {'classes': ['c'], 'other': 'rest'}, ['c', 'rest'], [[255, 1, 1, 0], [255, 0, 1, 1]]),
    (THREE, {'classes': ['c', 'a'], 'other': 'a'}, 'ca', [[255, 1, 1, 0], [255, 0, 1, 1]]),
    (THREE, {'label_map': {1: 'a', 2: 'a', 3: 2, 0: None}}, 'abc', [[255, 0, 0, 2], [255, 2, 0, 0]]),
    (THREE, {'label_map': {0: 'b', 'other': 'c', 255: 'a'}}, 'abc', [[1, 2, 2, 2], [0, 2, 2, 2]]),
    (THREE, {'classes': ['x', 'y'], 'label_map': [[1, 'x'], ['other', 'y']]}, 'xy', [[1, 0, 1, 1], [255, 1, 1, 0]]),
    (OWN, {'classes': ['p', 'q', 'r', 's']}, 'pqrs', [[0, 1, 2, 3], [255, 3, 2, 1]]),
    (OWN, {'classes': ['p'], 'label_map': {3: 'p', 'other': None}}, 'p', [[255, 255, 255, 0], [255, 0, 255, 255]]),
])
def test_label_maps_and_parts_of_the_classes(tmp_path, component, options, names, expected):
    found, palette, rule = describe_labels(component, 'data.test', **options)
    labels, compared = rule.read(written(tmp_path / 'mask.png', RAW))
    assert found == tuple(names) and labels.tolist() == expected and labels.dtype == np.uint8
    assert len(palette) == len(names) and rule.num_classes == len(names)
    assert compared.tolist() == (RAW.tolist() if rule.as_stored else expected)
    assert rule.as_stored == (not options or (component is OWN and 'label_map' not in options))
    for name, colour in zip(found, palette):
        if component is THREE and name in 'abc':
            assert tuple(colour) == PALETTE['abc'.index(name)]


def test_a_value_that_no_class_has_is_named(tmp_path):
    path = written(tmp_path / 'mask.png', RAW)
    _, _, rule = describe_labels(THREE, 'data.test', label_map={1: 0, 3: 1})
    with pytest.raises(DataError, match=r'png: label out of range: 0 \(1 pixels\), 2 \(2 pixels\); label_map does'):
        rule.read(path)
    with pytest.raises(DataError, match=r'label out of range: \[3\]; the data set has 2 classes, stored as 1..2'):
        LabelRule.plain(2, True).read(path)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 40), indexed=st.booleans(), black=st.booleans())
def test_colours_are_read_exactly(tmp_path_factory, seed, classes, indexed, black):
    rng = np.random.default_rng(seed)
    colours = np.unique(rng.integers(0, 256, (classes, 3)), axis=0)
    colours = rng.permutation(colours[1:] if len(colours) > 1 else colours)
    palette = [tuple(map(int, colour)) for colour in colours]
    if black:
        palette[0] = (0, 0, 0)
    component = types.SimpleNamespace(**{
        **vars(THREE), 'CLASSES': tuple(map(str, range(len(palette)))), 'PALETTE': palette, 'colours': True})
    index = rng.integers(0, len(palette), (9, 13)).astype(np.uint8)
    pixels = np.array(palette, np.uint8)[index]
    path = tmp_path_factory.mktemp('colours') / 'mask.png'
    if indexed:
        order = rng.permutation(len(palette))  # of a palette of its own, whatever the order of the classes
        image = Image.fromarray(np.argsort(order).astype(np.uint8)[index], 'P')
        image.putpalette([v for i in order for v in palette[i]])
        image.save(path)
    else:
        pixels[0, 0] = 0  # void, unless a class is black
        written(path, pixels)
        index[0, 0] = 0 if black else 255
    names, _, rule = describe_labels(component, 'data.test')
    labels, compared = rule.read(str(path))
    assert (labels == index).all() and compared is labels and len(names) == rule.num_classes


def test_an_unknown_colour_is_an_error_with_place_and_count(tmp_path):
    pixels = np.full((4, 5, 3), PALETTE[1], np.uint8)
    pixels[2, 3:], pixels[3, 0] = (1, 2, 3), (4, 5, 6)
    path = written(tmp_path / 'mask.png', pixels)
    _, _, rule = describe_labels(THREE, 'data.test', colours=True)
    with pytest.raises(DataError, match=(
            r'mask.png: colour \(1, 2, 3\) of 2 pixels, the first at x=3, y=2, is of no class, and 1 other colours')):
        rule.read(path)
    own = {(1, 2, 3): None, PALETTE[1]: 'c', 'other': 'a'}
    labels, _ = describe_labels(THREE, 'data.test', colour_map=own)[2].read(path)
    assert labels[2].tolist() == [2, 2, 2, 255, 255] and labels[3, 0] == 0
    with pytest.raises(DataError, match=r"got mode 'RGB'; .*set colours=True on the data set"):
        LabelRule.plain(3).read(path)
    with pytest.raises(DataError, match=r"expected an RGB or palette image.*got mode 'L'"):
        rule.read(written(tmp_path / 'grey.png', RAW))


@pytest.mark.parametrize('decoder, pixels, expected', [
    ('cityscapes_instances', np.array([[7, 24000, 24015, 33]], np.uint16), [[7, 24, 24, 33]]),
    ('vipseg', np.array([[0, 124, 6100, 12401]], np.uint16), [[0, 124, 61, 124]]),
    ('red_channel', np.array([[[3, 0, 9], [18, 1, 255]]], np.uint8), [[3, 18]]),
])
def test_ids_with_instances(tmp_path, decoder, pixels, expected):
    path = written(tmp_path / 'mask.png', pixels)
    ids = sorted({i for row in expected for i in row})
    names = [f'c{i}' for i in ids]
    _, _, rule = describe_labels(OWN, 'd', classes=names, decoder=decoder, label_map={i: f'c{i}' for i in ids})
    assert rule.read(path)[0].tolist() == [[ids.index(i) for i in row] for row in expected]
    if pixels.dtype == np.uint16:
        with pytest.raises(DataError, match=r"got mode 'I;16'; .*name their decoder"):
            LabelRule.plain(3).read(path)
        wrong = describe_labels(OWN, 'd', classes=['a'], decoder='red_channel', label_map={0: 'a'})[2]
        with pytest.raises(DataError, match=r'red_channel: expected an RGB image, got one channel of uint16'):
            wrong.read(path)


def test_a_decoder_of_ones_own(tmp_path):
    MASK_DECODERS.register_module(name='halved', module=lambda pixels: pixels // 2, force=True)
    _, _, rule = describe_labels(OWN, 'd', classes=['a', 'b'], decoder='halved', label_map={0: 'a', 1: 'b', 127: None})
    assert rule.read(written(tmp_path / 'mask.png', RAW))[0].tolist() == [[0, 0, 1, 1], [255, 1, 1, 0]]


def test_classes_come_from_files(tmp_path):
    (tmp_path / 'names.txt').write_text('sky\n\nroad\n')
    (tmp_path / 'classes.json').write_text(json.dumps({'classes': ['sky', 'road'], 'palette': [[1, 2, 3], [4, 5, 6]]}))
    names, palette, _ = describe_labels(OWN, 'd', classes=str(tmp_path / 'names.txt'))
    assert names == ('sky', 'road') and palette == voc_colours(2) == [[128, 0, 0], [0, 128, 0]]
    assert describe_labels(OWN, 'd', classes=str(tmp_path / 'classes.json'))[:2] == (names, [[1, 2, 3], [4, 5, 6]])
    (tmp_path / 'classes.json').write_text('[1]')
    with pytest.raises(ConfigError, match=r'd.classes: .*classes.json. should hold'):
        describe_labels(OWN, 'd', classes=str(tmp_path / 'classes.json'))


# Frames without labels


@pytest.fixture
def vspw(tmp_path):
    return write_vspw(tmp_path)


def segmentor():
    model = tiny_model('video')
    model['decode_head']['num_classes'] = 124
    return build_segmentor(model)


def labelled_only(root, **frames):
    """Deletes the masks of all other frames (numbers from 1) of these videos."""
    for video, kept in frames.items():
        for path in (root / 'data' / video / 'mask').iterdir():
            if int(path.stem) not in kept:
                path.unlink()


def build_train(root, **options):
    return build_dataset({**train_config(root)['dataset'], **options}, 'data.train.dataset')


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 20), reach=st.integers(0, 6), data=st.data())
def test_the_current_frame_is_a_labelled_one(length, reach, data):
    labelled = tuple(sorted(data.draw(st.sets(st.integers(0, length - 1)))))
    dilation = [-reach, 0] if reach else [0]
    if not can_draw(length, reach + 1, labelled):
        assert all(max(i, length - 1 - i) < reach for i in labelled)
        return
    seen = set()
    for seed in range(120):
        seed_all(seed)
        clip = sample_training_clip(length, dilation, labelled)
        assert all(0 <= i < length for i in clip) and clip[-1] in labelled
        assert len(clip) == len(dilation) and abs(clip[0] - clip[-1]) == reach
        seen.add(clip[-1])
    assert len(labelled) > 6 or seen == {i for i in labelled if max(i, length - 1 - i) >= reach}


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 20), reach=st.integers(0, 6), seed=st.integers(0, 10**6))
def test_where_all_frames_are_labelled_the_draw_is_the_same(length, reach, seed):
    if length > reach:
        clips = []
        for labelled in (None, tuple(range(length))):
            seed_all(seed)
            clips.append((sample_training_clip(length, [-reach, 0] if reach else [0], labelled), random.random(),
                          np.random.rand()))
        assert clips[0] == clips[1]


def test_all_labelled_frames_give_the_same_items(vspw):
    items = []
    for unlabelled in ('error', 'ignore', 'skip'):
        seed_all(3)
        items.append(build_train(vspw, unlabelled=unlabelled, dilation=[-2, 0])[1])
    for item in items[1:]:
        assert (item['img'] == items[0]['img']).all()
        assert (item['gt_semantic_seg'] == items[0]['gt_semantic_seg']).all()


def test_training_on_sparse_labels(vspw):
    labelled_only(vspw, a={4}, b={1, 12}, c={})
    with pytest.raises(DataError, match='no such file'):
        for _ in range(20):
            build_train(vspw)[0]
    data = build_train(vspw, unlabelled='ignore', dilation=[-3])
    assert data.short_videos == ['c'] and data.videos[0].labelled == (3,) and data.videos[1].labelled == (0, 11)
    for seed in range(12):
        seed_all(seed)
        label = data[seed % 2]['gt_semantic_seg'][:, 0]
        assert (label[0] == 254).all(), 'also where it is padded'
        assert (label[1] < 124).any() and not (label[1] == 254).any()
    skipping = build_train(vspw, unlabelled='skip')
    assert [video.frames for video in skipping.videos] == [['00000004'], ['00000001', '00000012']]


@pytest.mark.parametrize('unlabelled', ['ignore', 'skip'])
def test_masks_that_no_frame_has_are_an_error(vspw, unlabelled):
    for path in (vspw / 'data').glob('[abc]/mask/*.png'):
        path.rename(path.with_stem(f'other_{path.stem}'))
    with pytest.raises(DataError, match=r"mask: a, b, c; in 'a' the first frame is '00000001' and .*'other_00000001'"):
        build_train(vspw, unlabelled=unlabelled)


def test_void_may_be_unknown(vspw):
    for void in ('negative', 'ignore'):
        seed_all(1)
        steps = train_config(vspw)['dataset']['pipeline']
        label = build_train(vspw, void=void, pipeline=[*steps[:2], *steps[-2:]])[0]
        values = np.unique(label['gt_semantic_seg'][0])
        assert (254 in values, 255 in values) == (void == 'ignore', void == 'negative')
    assert 255 in build_dataset(config_for_testing(vspw, void='ignore'), 'data.test')[0]['label']


def test_a_sparse_test_set_is_predicted_whole_and_scored_where_it_is_labelled(vspw):
    """Frames without labels break the windows of VC; scores are those of the labelled frames alone."""
    labelled_only(vspw, v0={1, 2, 3, 6}, v1={}, v2={2})
    data = build_dataset(config_for_testing(vspw, unlabelled='ignore', test_size=2), 'data.test')
    assert [len(video.frames) for video in data.videos] == [7, 5, 6]
    outcome = stream_test(segmentor(), data, list(data), metrics=metrics_for(data, ['VC2', 'VC4', 'VEC2']),
                          progress=False)
    assert outcome.frames == 18
    results = outcome.results
    assert {row['video']: row['frames'] for row in results.videos} == {'v0': 4, 'v1': 0, 'v2': 1}
    assert results.notes == ['VC4 has no value: no video has 5 labelled frames in a row']
    assert 0 <= results.summary['VC2'] <= 1 and np.isnan(results.summary['VC4'])
    masks = [np.array(Image.open(path)) for path in (vspw / 'data').glob('v*/mask/*.png')]
    assert results.confusion.sum() == sum((mask % 255 > 0).sum() for mask in masks)


def test_windows_lie_between_gaps():
    """VC over labelled stretches equals the naive count of windows, those before a gap included."""
    rng = np.random.default_rng(0)
    gts, preds = (rng.integers(0, 2, (12, 6, 7)).astype(np.uint8) for _ in range(2))
    labelled = [i not in (3, 8) for i in range(12)]
    from mmseg.core.evaluation import ConsistencyOptions, StreamingMetrics

    metrics = StreamingMetrics(2, consistency=ConsistencyOptions((2, 3)))
    for i in rng.permutation(12):
        metrics.update('v', int(i), preds[i], gts[i] if labelled[i] else None)
    metrics.finish('v')
    for n in (2, 3):
        ratios = []
        for start in range(12 - n):  # the window that ends at the last frame is left out, as ever
            if all(labelled[start:start + n]):
                constant = (gts[start:start + n] == gts[start]).all(0)
                both = constant & (preds[start:start + n] == preds[start]).all(0)
                ratios += [both.sum() / constant.sum()] if constant.any() else []
        assert metrics.compute()[f'VC{n}'] == pytest.approx(np.mean(ratios))


def test_check_dataset_reads_masks_as_the_data_set_does(vspw):
    cfg = {**config_for_testing(vspw), 'classes': ['wall', 'ceiling'], 'other': 'rest'}
    (split,) = SplitToCheck.from_config(cfg, 'data.test')
    report = check_split(split)
    assert report.classes == ('wall', 'ceiling', 'rest') and not report.problems
    data = build_dataset(cfg, 'data.test')
    expected = sum(np.bincount(item['label'].ravel(), minlength=256) for item in data)
    assert (report.pixels == expected).all() and report.pixels[2] > 0


def test_a_model_trains_on_what_the_data_set_gives(vspw):
    """One step on a clip with an unlabelled frame: finite losses and gradients."""
    labelled_only(vspw, a={4}, b={1, 12}, c={3})
    seed_all(0)
    item = build_train(vspw, unlabelled='ignore', dilation=[-2])[0]
    losses = segmentor()(item['img'][None], item['gt_semantic_seg'][None, :, 0])
    total = sum(value for key, value in losses.items() if 'loss' in key)
    total.backward()
    assert torch.isfinite(total)


def test_a_colour_mask_trains_through_the_pipeline_step(vspw):
    """``LoadAnnotations(colours=True)`` is the data set's rule, in a training set."""
    palette = build_train(vspw).PALETTE
    for path in (vspw / 'data').glob('*/mask/*.png'):
        raw = np.array(Image.open(path))
        table = np.zeros((256, 3), np.uint8)
        table[1:125] = palette
        cv2.imwrite(str(path), table[raw][..., ::-1])
    pipeline = [step if step['type'] != 'LoadAnnotations' else dict(type='LoadAnnotations', colours=True)
                for step in train_config(vspw)['dataset']['pipeline']]
    data = build_train(vspw, pipeline=pipeline)
    assert data.labels.colours and isinstance(data, VideoDataset)
    assert (data[0]['gt_semantic_seg'] < 124).any()
