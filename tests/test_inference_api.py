"""init_segmentor, inference_segmentor, show_result on a tiny model."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmseg.apis import inference_segmentor, init_segmentor, show_result
from mmseg.models import build_segmentor
from mmseg.utils.errors import CheckpointError, ConfigError, DataError
from tests.reference import recipe
from tests.tiny import tiny_model

NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def tiny_config(**aug):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='MultiScaleFlipAug', img_scale=(80, 64), **aug, transforms=[
            dict(type='AlignedResize', keep_ratio=True, size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize', **NORM),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])]
    return Config(dict(model=tiny_model('video'), data=dict(test=dict(pipeline=pipeline))))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp('weights') / 'iter_1.pth'
    meta = {'CLASSES': ['road', 'car'], 'PALETTE': [[128, 64, 128], [0, 0, 142]]}
    torch.save({'state_dict': build_segmentor(tiny_model('video')).state_dict(), 'meta': meta}, path)
    return init_segmentor(tiny_config(), path)


@pytest.mark.parametrize('length', [1, 3])
def test_frames_in_memory_and_on_disk_give_the_same_labels(model, tmp_path, length):
    frames = [recipe.frame(7, i, 47, 61) for i in range(length)]
    paths = [tmp_path / f'{i}.png' for i in range(length)]
    for path, frame in zip(paths, frames):
        cv2.imwrite(str(path), frame)
    labels = inference_segmentor(model, frames)
    assert len(labels) == length
    assert all(label.shape == (47, 61) and label.dtype == np.uint8 and label.max() < 5 for label in labels)
    for a, b in zip(labels, inference_segmentor(model, [str(p) for p in paths[:1]] + paths[1:])):
        np.testing.assert_array_equal(a, b)


def test_labels_are_the_argmax_of_the_scores(model):
    frames = [recipe.frame(8, i, 64, 64) for i in range(2)]
    mean, std = (torch.tensor(NORM[key])[:, None, None] for key in ('mean', 'std'))
    clip = torch.stack([(torch.from_numpy(f[..., ::-1].copy()).permute(2, 0, 1) - mean) / std for f in frames])[None]
    with torch.no_grad():
        expected = model.scores(clip, (64, 64)).argmax(2)[0].numpy()
    assert (np.stack(inference_segmentor(model, frames)) == expected).mean() > 0.999


def test_the_checkpoint_names_the_classes(model):
    assert model.CLASSES == ['road', 'car'] and model.PALETTE[1] == [0, 0, 142]


def test_config_decides_scales_and_flips(model):
    several = init_segmentor(tiny_config(img_ratios=[0.5, 1.0], flip=True))
    several.load_state_dict(model.state_dict())
    frame = recipe.frame(9, 0, 40, 50)
    label = inference_segmentor(several, [frame])[0]
    mirrored = inference_segmentor(several, [np.ascontiguousarray(frame[:, ::-1])])[0]
    assert (label == mirrored[:, ::-1]).mean() > 0.99  # flipped views make the prediction symmetric


def test_options_and_weights(tmp_path):
    config = tiny_config()
    sliding = init_segmentor(
        config, options={'model.test_cfg.mode': 'slide', 'model.test_cfg.crop_size': (32, 64),
                         'model.test_cfg.stride': (32, 32)})
    assert sliding.inference.mode == 'slide' and not sliding.training
    assert config.model.test_cfg.mode == 'whole' and sliding.CLASSES is None
    assert inference_segmentor(sliding, [recipe.frame(1, 0, 70, 90)])[0].shape == (70, 90)

    with pytest.raises(ConfigError, match="unknown key 'modl' at the top level"):
        init_segmentor(config, options={'modl.test_cfg.mode': 'slide'})

    wider = tiny_model('video')
    wider['backbone'].update(embed_dims=(8, 16, 16, 32))
    torch.save(build_segmentor(wider).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'backbone\.patch_embed3\.proj\.weight'):
        init_segmentor(config, tmp_path / 'other.pth')


def test_bad_frames_are_named(model, tmp_path):
    with pytest.raises(ValueError, match='at least one frame'):
        inference_segmentor(model, [])
    with pytest.raises(ValueError, match='wrap a single one'):
        inference_segmentor(model, recipe.frame(1, 0, 8, 8))
    with pytest.raises(DataError, match=r'missing\.jpg'):
        inference_segmentor(model, [tmp_path / 'missing.jpg'])
    with pytest.raises(DataError, match='61x47'):
        inference_segmentor(model, [recipe.frame(1, 0, 47, 60), recipe.frame(1, 1, 47, 61)])
    with pytest.raises(DataError, match='frame #1: expected a frame as uint8') as error:
        inference_segmentor(model, [recipe.frame(1, 0, 8, 8), recipe.frame(1, 1, 8, 8).astype(np.float32)])
    assert 'split file' not in str(error.value), 'advice for data sets'
    with pytest.raises(ConfigError, match='init_segmentor'):
        inference_segmentor(build_segmentor(tiny_model('1f')), [recipe.frame(1, 0, 8, 8)])


def test_show_result_blends_classes_and_keeps_void(tmp_path):
    frame = recipe.frame(2, 0, 20, 30)
    label = np.full((20, 30), 255, np.uint8)
    label[5:10, 5:10] = 1
    picture = show_result(frame, label, [(0, 0, 0), (255, 0, 0)], tmp_path / 'out' / 'picture.png', opacity=1.0)
    assert picture[7, 7].tolist() == [0, 0, 255]  # BGR
    np.testing.assert_array_equal(picture[15:], frame[15:])
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'out' / 'picture.png')), picture)
    assert show_result(tmp_path / 'out' / 'picture.png', label).shape == frame.shape
