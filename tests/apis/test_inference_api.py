"""init_segmentor, inference_segmentor, show_result on a tiny model."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmseg.apis import inference_segmentor, init_segmentor, segment_video, show_result
from mmseg.apis.inference import as_frame
from mmseg.models import build_segmentor
from mmseg.utils.errors import CheckpointError, ConfigError, DataError
from tests.reference import recipe
from tests.tiny import tiny_model
from tests.tiny_config import write_tiny_config

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


@pytest.mark.parametrize('convert, grey', [
    (lambda bgr: Image.fromarray(bgr[..., ::-1]), False),
    (lambda bgr: Image.fromarray(bgr[..., ::-1]).convert('RGBA'), False),
    (lambda bgr: bgr[::-1][::-1], False),
    (lambda bgr: bgr[..., 0], True),
    (lambda bgr: bgr[..., :1], True),
    (lambda bgr: Image.fromarray(bgr[..., 0].copy()), True),
])  # fmt: skip
def test_what_can_only_be_meant_in_one_way_is_a_frame(convert, grey):
    bgr = recipe.frame(3, 0, 20, 30)
    frame = as_frame(convert(bgr))
    assert frame.dtype == np.uint8 and frame.flags.c_contiguous
    np.testing.assert_array_equal(frame, np.repeat(bgr[..., :1], 3, 2) if grey else bgr)


NO_FRAMES = [
    (None, 'got None .which cv2.imread returns'),
    (torch.zeros(3, 8, 8), r'got Tensor torch.float32 \[3, 8, 8\]; of a uint8 tensor'),
    (np.zeros((8, 8, 3), np.float32), r'got ndarray float32 \[8, 8, 3\]'),
    (np.zeros((8, 8, 4), np.uint8), r'got ndarray uint8 \[8, 8, 4\]'),
    (np.zeros((0, 8, 3), np.uint8), r'\[0, 8, 3\]'),
    (Image.new('I;16', (8, 8)), "PIL image of mode 'I;16'"),
    (7, 'got int'),
]


@pytest.mark.parametrize('frame, message', NO_FRAMES)
def test_what_is_no_frame_is_named(model, frame, message):
    with pytest.raises(DataError, match=f'frame #1: .*{message}'):
        inference_segmentor(model, [recipe.frame(1, 0, 8, 8), frame])
    with pytest.raises(DataError, match=f'frame #0: .*{message}'):
        next(segment_video(model, [frame]))
    with pytest.raises(DataError, match=message):
        show_result(frame, np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize('source', [None, recipe.frame(1, 0, 8, 8), 1.5, Image.new('RGB', (8, 8))])
def test_a_single_frame_is_no_video(model, source):
    with pytest.raises(DataError, match=r'wrap a single frame in \[\]'):
        next(segment_video(model, source))


def test_paths_and_pil_images_are_a_video_too(model, tmp_path):
    frames = [recipe.frame(4, i, 20, 30) for i in range(2)]
    cv2.imwrite(str(tmp_path / '0.png'), frames[0])
    labels = [label for _, label in segment_video(model, [tmp_path / '0.png', Image.fromarray(frames[1][..., ::-1])])]
    np.testing.assert_array_equal(labels, [label for _, label in segment_video(model, frames)])
    np.testing.assert_array_equal(
        inference_segmentor(model, [Image.fromarray(f[..., ::-1]) for f in frames]), inference_segmentor(model, frames))


@pytest.mark.parametrize('label', [None, torch.zeros(8, 8), np.zeros((1, 8, 8), np.uint8), np.zeros((8, 8))])
def test_what_is_no_label_map_is_named(label):
    with pytest.raises(ValueError, match='label: expected a label map'):
        show_result(recipe.frame(1, 0, 8, 8), label)


@pytest.mark.parametrize('name', ['x.xyz', 'x', 'x.mp4'])
def test_a_type_of_picture_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=f'{name}: pictures cannot be written'):
        show_result(recipe.frame(1, 0, 8, 8), np.zeros((8, 8), np.uint8), out_file=tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('device', ['cuda', 'cuda:7', 'gpu', 'cuda:x', 'xpu', ''])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match=f"device: .*'{device}'"):
        init_segmentor(tiny_config(), device=device)


def test_a_gpu_too_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ConfigError, match=r'cuda:2.* cuda:0 to cuda:1'):
        init_segmentor(tiny_config(), device='cuda:2')


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    config = write_tiny_config(tmp_path / 'config.py', tmp_path)
    torch.save({'state_dict': init_segmentor(config).state_dict(), 'meta': {}}, tmp_path / 'model.pth')
    cv2.imwrite(str(tmp_path / '0.png'), recipe.frame(4, 0, 20, 30))
    loaded = init_segmentor('~/config.py', '~/model.pth')
    (label,) = inference_segmentor(loaded, ['~/0.png'])
    show_result('~/0.png', label, out_file='~/shown.jpg')
    assert (tmp_path / 'shown.jpg').exists()
    assert len(list(segment_video(loaded, '~/*.png'))) == 1
