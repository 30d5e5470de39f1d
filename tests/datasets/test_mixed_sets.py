"""Images as clips, and data sets mixed by weight."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mmseg.apps.check_dataset import SplitToCheck, check_split
from mmseg.datasets import ConcatDataset, build_dataset, build_train_loader
from mmseg.datasets.pipelines import RandomMotion
from mmseg.registry import DATASETS, build
from mmseg.utils.errors import ConfigError
from tests.vspw_fixture import train_config, write_vspw


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A set of images: videos of one frame."""
    return write_vspw(tmp_path_factory.mktemp('images'), {'train': {f'i{n}': 1 for n in range(5)}}, seed=40)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('videos'), {'train': {'a': 7, 'b': 9}})


def config(root, **options):
    return {**train_config(root)['dataset'], 'dilation': [-3], **options}


def item_of(data, index, seed=0):
    random.seed(seed)
    np.random.seed(seed)
    return data[index]


@pytest.mark.parametrize('as_clip', ['repeat', 'motion'])
def test_an_image_is_a_clip(images, as_clip):
    steps = [step for step in train_config(images)['dataset']['pipeline'] if step['type'] != 'PhotoMetricDistortion']
    data = build_dataset(config(images, as_clip=as_clip, pipeline=steps))
    assert len(data) == 5
    for seed in range(4):
        item = item_of(data, seed, seed)
        image, label = item['img'], item['gt_semantic_seg']
        assert image.shape == (2, 3, 64, 64) and label.shape == (2, 1, 64, 64)
        same = bool((image[0] == image[1]).all()) and bool((label[0] == label[1]).all())
        assert same == (as_clip == 'repeat')
        assert (item_of(data, seed, seed)['img'] == image).all()
    (split,) = SplitToCheck.from_config(config(images, as_clip=as_clip), 'data.train')
    assert not check_split(split).problems


def test_frame_and_label_move_together():
    """Labels that are drawn into the picture stay on it, and the last frame stays where it is."""
    label = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((20, 20), np.uint8))
    frame = np.repeat((label * 20)[..., None], 3, 2)
    np.random.seed(2)
    moved = RandomMotion(0.05, 5, 0.05)({'img': [frame] * 3, 'gt_semantic_seg': [label] * 3})
    assert (moved['img'][2] == frame).all() and (moved['gt_semantic_seg'][2] == label).all()
    for picture, labels in zip(moved['img'][:2], moved['gt_semantic_seg'][:2]):
        assert (labels != label).any() and set(np.unique(labels)) <= set(range(12))
        inner = picture[..., 0] % 20 == 0  # not between two values
        agree = (picture[..., 0] == labels * 20)[inner]
        assert inner.mean() > 0.7 and agree.mean() > 0.97
    first, second = ((labels != label).mean() for labels in moved['gt_semantic_seg'][:2])
    assert first > second, 'the farther in time, the farther away'
    bare = {'img': frame, 'gt_semantic_seg': label}
    assert RandomMotion()(bare)['img'] is frame


def test_batches_mix_sets_by_weight(images, videos):
    data = ConcatDataset([config(images, as_clip='motion'), config(videos)], weights=[1, 3])
    batches = build_train_loader(data, 4, seed=1)
    names = [meta['video'] for batch in itertools.islice(batches, 25) for meta in batch['img_metas']]
    share = np.mean([name in 'ab' for name in names])
    assert 0.6 < share < 0.9 and len(set(names)) == 7


@pytest.mark.parametrize('ranks', [1, 2])
def test_the_order_depends_on_seed_and_position_alone(images, videos, ranks):
    """Whatever the number of ranks and workers and wherever the run begins, sample g is the same."""

    def samples(world_size, start, number, workers=0):
        found = {}
        for rank in range(world_size):
            data = ConcatDataset([config(images, as_clip='repeat'), config(videos)], weights=[0.5, 0.5])
            loader = build_train_loader(data, 2, workers, 3, rank, world_size, start)
            drawn = [one for batch in itertools.islice(loader, number) for one in zip(batch['img'], batch['img_metas'])]
            found |= {(start + i) * world_size + rank: one for i, one in enumerate(drawn)}
            loader.close()
        return found

    whole, part = samples(1, 0, 8), samples(ranks, 4, 3 - ranks, workers=ranks - 1)
    for number, (image, meta) in part.items():
        assert meta['video'] == whole[number][1]['video'] and (image == whole[number][0]).all()
    assert part


def test_weights_must_fit(videos):
    for weights in ([1], [0, 0], [1, 1, 1]):
        with pytest.raises(ConfigError, match='weights should be 2 numbers'):
            ConcatDataset([config(videos)] * 2, weights=weights)
    with pytest.raises(ConfigError, match=r'data.weights\[1\]: expected float, at least 0, got -1'):
        build(DATASETS, dict(type='ConcatDataset', datasets=[config(videos)] * 2, weights=[1, -1]), 'data')
