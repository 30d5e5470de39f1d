"""Pipelines: parity with the recorded transforms, exactness of the shortcuts, errors that name the file."""

from __future__ import annotations

import io
import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg.datasets.pipelines import (
    AlignedResize,
    Collect,
    Compose,
    LoadAnnotations,
    LoadImageFromFile,
    MultiScaleFlipAug,
    Normalize,
    Pad,
    PhotoMetricDistortion,
    RandomCrop,
    RandomFlip,
    Resize,
)
from mmseg.datasets.pipelines.loading import jpeg_is_whole, read_frame
from mmseg.datasets.pipelines.transform import LabelView
from mmseg.registry import PIPELINES
from mmseg.utils.errors import ConfigError, DataError
from tests.reference import recipe

NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def clip(seed, t, h, w):
    """The recorded transforms' input: t frames and their labels."""
    labels = recipe.raw_mask(seed, t, h, w)
    labels[labels == 0] = 255
    labels = np.where(labels == 255, 255, labels - 1).astype(np.uint8)
    shape = (h, w, 3)
    return dict(
        img=[recipe.frame(seed, i, h, w) for i in range(t)], gt_semantic_seg=list(labels), img_shape=shape,
        pad_shape=shape, ori_shape=shape, scale_factor=1.0, filename='f.jpg', ori_filename='f.jpg')


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)


CASES = {
    'resize': (lambda: Resize((214, 120), ratio_range=(0.5, 2.0)), (500, 2, 120, 213), 6),
    'crop': (lambda: RandomCrop((96, 96), cat_max_ratio=0.75), (501, 2, 120, 213), 6),
    'cropsmall': (lambda: RandomCrop((96, 96), cat_max_ratio=0.75), (502, 2, 60, 107), 6),
    'flip': (lambda: RandomFlip(prob=0.5), (503, 2, 60, 107), 6),
    'photo': (PhotoMetricDistortion, (504, 3, 60, 107), 6),
    'normalize': (lambda: Normalize(**NORM), (505, 2, 60, 107), 0),
    'pad': (lambda: Pad(size=(96, 120)), (506, 2, 60, 107), 0),
    'aligned': (lambda: AlignedResize((213, 120)), (507, 2, 120, 213), 0),
    'aligned_480': (lambda: AlignedResize((853, 480)), (508, 1, 480, 853), 0),
    'aligned_up': (lambda: AlignedResize((853, 480)), (509, 1, 120, 180), 0),
}


@pytest.mark.parametrize('name', CASES)
def test_single_transforms_equal_the_recorded_ones(reference, name):
    make, shape, seeds = CASES[name]
    gold, meta = reference('pipeline.npz'), reference('pipeline_meta.json')['meta']
    for seed in range(seeds) if seeds else [None]:
        seed_all(seed or 0)
        out = make()(clip(*shape))
        key = name if seed is None else f'{name}/{seed}'
        difference, _ = recipe.check(gold, f'{key}/img', np.stack(out['img']))
        assert difference <= (1e-6 if name == 'normalize' else 0)
        if f'{key}/gt/shape' in gold:
            assert recipe.check(gold, f'{key}/gt', np.stack(out['gt_semantic_seg']))[0] == 0
        for field, value in meta[key].items():
            got = out[field]
            assert np.allclose(got, value, atol=0) if field in ('scale_factor', 'scale') else (
                got == (tuple(value) if isinstance(value, list) else value)), field


def train_steps(scale, crop):
    """The training pipeline in the reference's own type names."""
    return [
        dict(type='Resize', img_scale=scale, ratio_range=(0.5, 2.0), process_clips=True),
        dict(type='RandomCrop_clips', crop_size=(crop, crop), cat_max_ratio=0.75),
        dict(type='RandomFlip_clips', prob=0.5),
        dict(type='PhotoMetricDistortion_clips'),
        dict(type='Normalize_clips', **NORM),
        dict(type='Pad_clips', size=(crop, crop), pad_val=0, seg_pad_val=255),
        dict(type='DefaultFormatBundle_clips'),
        dict(type='Collect', keys=['img', 'gt_semantic_seg']),
    ]


@pytest.mark.parametrize('name,seeds,scale,crop,shape', [
    ('train_small', 6, (214, 120), 96, (510, 2, 120, 213)),
    ('train_full', 2, (853, 480), 480, (511, 2, 480, 853)),
])
def test_the_train_pipeline_equals_the_recorded_one(reference, name, seeds, scale, crop, shape):
    gold, meta = reference('pipeline.npz'), reference('pipeline_meta.json')['meta']
    for seed in range(seeds):
        seed_all(seed)
        out = Compose(train_steps(scale, crop))(clip(*shape))
        assert recipe.check(gold, f'{name}/{seed}/img', out['img'].numpy())[0] <= 1e-6
        assert recipe.check(gold, f'{name}/{seed}/gt', out['gt_semantic_seg'].numpy())[0] == 0
        assert out['img'].dtype == torch.float32 and out['gt_semantic_seg'].dtype == torch.int64
        if f'{name}/{seed}' in meta:
            assert set(meta[f'{name}/{seed}']['metas']) <= set(out['img_metas'])
