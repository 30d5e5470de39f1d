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


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 150), st.integers(1, 150), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_label_view_equals_resizing_cropping_and_flipping_pixels(h, w, new_h, new_w, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 256, (h, w), np.uint8)
    top, left = rng.integers(0, new_h), rng.integers(0, new_w)
    direction, code = [('horizontal', 1), ('vertical', 0)][seed % 2]
    pixels = cv2.resize(label, (new_w, new_h), interpolation=cv2.INTER_NEAREST)
    pixels = cv2.flip(np.ascontiguousarray(pixels[top:top + 40, left:left + 30]), code)
    view = LabelView.of(label).resize(new_w, new_h).crop(top, left, 40, 30).flip(direction)
    assert view.shape == pixels.shape
    assert np.array_equal(view.array(), pixels)


def plain_photo(image):
    """The distortion as SPEC states it: float32, clip and truncate at every step."""
    def step(x, alpha=1, beta=0):
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def contrast(x):
        return step(x, alpha=np.random.uniform(0.5, 1.5)) if np.random.randint(2) else x

    if np.random.randint(2):
        image = step(image, beta=np.random.uniform(-32, 32))
    mode = np.random.randint(2)
    if mode == 1:
        image = contrast(image)
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = step(hsv[..., 1], alpha=np.random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + np.random.randint(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return contrast(image) if mode == 0 else image


def test_byte_tables_equal_the_plain_distortion_bit_for_bit():
    image = np.random.default_rng(0).integers(0, 256, (37, 41, 3), np.uint8)
    step = PhotoMetricDistortion()
    for seed in range(64):
        seed_all(seed)
        expected = plain_photo(image)
        seed_all(seed)
        assert np.array_equal(step(dict(img=image))['img'], expected), seed


def test_colour_per_clip_gives_equal_frames_equal_colour():
    frame = recipe.frame(0, 0, 20, 30)
    seed_all(3)
    out = PhotoMetricDistortion(per_clip=True)(dict(img=[frame] * 4))['img']
    assert all(np.array_equal(out[0], other) for other in out) and not np.array_equal(out[0], frame)
    out = PhotoMetricDistortion()(dict(img=[frame] * 8))['img']
    assert any(not np.array_equal(out[0], other) for other in out)


def test_an_image_is_a_clip_of_one():
    one, many = clip(7, 1, 60, 107), clip(7, 1, 60, 107)
    one.update(img=one['img'][0], gt_semantic_seg=one['gt_semantic_seg'][0])
    steps = Compose(train_steps((107, 60), 48))
    seed_all(1)
    image = steps(one)
    seed_all(1)
    clips = steps(many)
    assert image['img'].shape == (3, 48, 48) and image['gt_semantic_seg'].shape == (1, 48, 48)
    assert torch.equal(image['img'], clips['img'][0])
    assert torch.equal(image['gt_semantic_seg'], clips['gt_semantic_seg'][0])


def test_a_step_of_ones_own_gets_plain_arrays():
    seen = []

    def own(results):
        seen.append([type(label) for label in results['gt_semantic_seg']])
        return results

    steps = train_steps((107, 60), 48)
    Compose([*steps[:2], own, *steps[2:]])(clip(7, 2, 60, 107))
    assert seen == [[np.ndarray, np.ndarray]]


def test_transforms_leave_their_input_alone():
    inputs = clip(7, 2, 60, 107)
    kept = [image.copy() for image in inputs['img']]
    seed_all(5)
    Compose(train_steps((107, 60), 48))(inputs)
    assert all(np.array_equal(a, b) for a, b in zip(inputs['img'], kept))
    assert set(inputs) == set(clip(7, 2, 60, 107))


def test_reference_names_are_registered():
    names = ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'Collect', 'MultiScaleFlipAug']
    for name in ('AlignedResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion', 'Normalize', 'Pad',
                 'DefaultFormatBundle', 'ImageToTensor'):
        assert PIPELINES.get(name) is PIPELINES.get(f'{name}_clips')
        names.append(name)
    assert all(PIPELINES.get(name) is not None for name in names)


def test_pipeline_errors_name_the_step():
    with pytest.raises(ConfigError, match=r"\[1\]\.cat_max_ration.*cat_max_ratio"):
        Compose([dict(type='LoadImageFromFile'), dict(type='RandomCrop', crop_size=(8, 8), cat_max_ration=0.5)])
    with pytest.raises(ConfigError, match=r"\[0\]\.type.*RandomCrop"):
        Compose([dict(type='RandomCorp')])
    with pytest.raises(ConfigError, match='smaller than the frame'):
        Pad(size=(10, 10))(clip(7, 1, 60, 107))
    with pytest.raises(ConfigError, match='before Normalize'):
        Compose([Normalize(**NORM), PhotoMetricDistortion()])(clip(7, 1, 60, 107))


def view_steps(keys=('img',)):
    return [
        dict(type='AlignedResize_clips', keep_ratio=True, size_divisor=32), dict(type='RandomFlip_clips'),
        dict(type='Normalize_clips', **NORM), dict(type='ImageToTensor_clips', keys=['img']),
        dict(type='Collect', keys=list(keys)),
    ]


def test_views_cover_scales_and_flips():
    aug = MultiScaleFlipAug(
        view_steps(), img_scale=(107, 60), img_ratios=[0.5, 1.0], flip=True, flip_direction=['horizontal', 'vertical'])
    out = aug(clip(7, 2, 60, 107))
    described = [(m['img_shape'][:2], m['flip'], m['flip_direction']) for m in out['img_metas']]
    small, large = (32, 64), (64, 128)
    assert described == [
        (small, False, 'horizontal'), (small, True, 'horizontal'), (small, True, 'vertical'),
        (large, False, 'horizontal'), (large, True, 'horizontal'), (large, True, 'vertical')]
    assert torch.equal(out['img'][1], out['img'][0].flip(-1)) and torch.equal(out['img'][2], out['img'][0].flip(-2))
    assert out['img'][3].shape == (2, 3, 64, 128)


def test_frames_in_memory_equal_frames_on_disk(tmp_path):
    frames = [recipe.frame(3, i, 60, 107) for i in range(2)]
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(tmp_path / f'{i}.png'))
        cv2.imwrite(paths[-1], frame)
    steps = Compose([LoadImageFromFile(), MultiScaleFlipAug(view_steps(), img_scale=(107, 60))])
    disk, memory = steps(dict(frames=paths)), steps(dict(frames=frames))
    assert torch.equal(disk['img'][0], memory['img'][0])
    assert memory['img_metas'][0]['filename'] is None and disk['img_metas'][0]['filename'] == paths[-1]
    one = LoadImageFromFile()(dict(frames=frames[0]))
    assert one['img'].shape == (60, 107, 3)


def encoded(suffix, image):
    return cv2.imencode(suffix, image)[1].tobytes()


JPEG = encoded('.jpg', recipe.frame(3, 0, 60, 107))


@pytest.mark.parametrize('data,message', [
    (JPEG[:len(JPEG) // 2], 'truncated JPEG'),
    (JPEG[:-1], 'truncated JPEG'),
    (JPEG[:len(JPEG) // 2] + bytes(500), 'truncated JPEG'),
    (JPEG[:3], 'truncated JPEG'),
    (b'', r'empty file \(0 bytes\)'),
    (b'no image at all', 'not an image'),
])
def test_a_bad_frame_is_named(tmp_path, data, message):
    path = tmp_path / '00000012.jpg'
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"video 'v7', frame 00000012: .*00000012.jpg: {message}.*skip_bad_clips"):
        LoadImageFromFile()(dict(frames=[str(path)], video='v7'))


def test_bytes_after_the_end_of_a_jpeg_are_harmless(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_bytes(JPEG + b'\0\0 maker notes')
    assert read_frame(str(path)).shape == (60, 107, 3)


def test_an_embedded_thumbnail_does_not_hide_a_truncation():
    thumbnail = encoded('.jpg', recipe.frame(3, 0, 8, 8))
    segment = b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail
    whole = JPEG[:2] + segment + JPEG[2:]
    assert jpeg_is_whole(whole + b'tail') and not jpeg_is_whole(whole[:-20])


def test_a_missing_file_and_sizes_that_differ_are_named(tmp_path):
    with pytest.raises(DataError, match='no such file'):
        LoadImageFromFile()(dict(frames=[str(tmp_path / 'gone.jpg')]))
    for name, size in (('a', (60, 107)), ('b', (64, 100))):
        (tmp_path / f'{name}.jpg').write_bytes(encoded('.jpg', recipe.frame(3, 0, *size)))
    with pytest.raises(DataError, match=r'frame b: .*b.jpg: 100x64, but .*a.jpg of the same clip is 107x60'):
        LoadImageFromFile()(dict(frames=[str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg')], video='v'))


def png(array, mode=None):
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, 'png')
    return stream.getvalue()


GOOD_MASK = recipe.raw_mask(3, 1, 60, 107)[0]


@pytest.mark.parametrize('data,message', [
    (None, 'no such file'),
    (b'', 'empty file'),
    (png(GOOD_MASK)[:60], 'truncated PNG'),
    (png(np.full((60, 107), 200, np.uint8)), r'label out of range: \[200\]; the data set has 124 classes.*1..124'),
    (png(np.zeros((60, 107, 3), np.uint8)), "one channel, got mode 'RGB'"),
    (png(GOOD_MASK[:50]), r'mask is 107x50, its frame is 107x60'),
])
def test_a_bad_mask_is_named(tmp_path, data, message):
    path = tmp_path / '00000012.png'
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=f"video 'v7', frame 00000012: .*{message}"):
        LoadAnnotations(reduce_zero_label=True)(
            dict(masks=[str(path)], video='v7', num_classes=124, ori_shape=(60, 107, 3)))


def test_labels_are_reduced_as_the_format_says(tmp_path):
    raw = np.array([[0, 1, 2, 124, 255]], np.uint8)
    path = tmp_path / 'a.png'
    image = Image.fromarray(raw)
    image.save(path)
    loaded = LoadAnnotations(reduce_zero_label=True)(dict(masks=[str(path)], num_classes=124))['gt_semantic_seg'][0]
    assert loaded.tolist() == [[255, 0, 1, 123, 255]] and loaded.dtype == np.uint8
    palette = image.convert('P')
    palette.putdata(raw.ravel().tolist())
    palette.putpalette([7] * 768)
    palette.save(path)  # a palette is decoration: indices are labels
    assert LoadAnnotations(True)(dict(masks=[str(path)]))['gt_semantic_seg'][0].tolist() == loaded.tolist()
    kept = LoadAnnotations()(dict(masks=[str(path)]))['gt_semantic_seg'][0]
    assert kept.tolist() == raw.tolist()


def test_scales_are_drawn_as_configured():
    inputs = clip(7, 1, 60, 107)
    assert Resize((64, 32), keep_ratio=False)(inputs)['img'][0].shape == (32, 64, 3)
    several = Resize([(64, 32), (128, 96)], multiscale_mode='value')
    assert {several(inputs)['scale'] for _ in range(20)} == {(64, 32), (128, 96)}
    between = Resize([(64, 32), (128, 96)])
    assert all(64 <= between(inputs)['scale'][0] <= 128 and 32 <= between(inputs)['scale'][1] <= 96 for _ in range(20))
    own_size = Resize(ratio_range=(1.0, 1.0))(inputs)
    assert own_size['img'][0].shape == (60, 107, 3)
    with pytest.raises(ConfigError, match='needs img_scale'):
        Resize()(inputs)


def test_collect_says_what_is_missing():
    with pytest.raises(ConfigError, match='flip'):
        Collect(keys=['img'], meta_keys=['flip'])(clip(7, 1, 20, 20))


@pytest.mark.parametrize('step', [
    dict(type='RandomCrop', crop_size=64), dict(type='RandomCrop', crop_size=(64,)),
    dict(type='RandomCrop', crop_size=(64, 0)), dict(type='RandomCrop', crop_size=('64', '64')),
    dict(type='Resize', img_scale=(1, 2, 3)), dict(type='Resize', img_scale=[]), dict(type='Resize', img_scale=9),
    dict(type='Resize', img_scale=[(107, 60), (107,)]), dict(type='Resize', img_scale=(107, 60), ratio_range=(-1, 1)),
    dict(type='AlignedResize', img_scale='107'), dict(type='Pad', size=64), dict(type='Pad', size=(True, 64)),
    dict(type='PhotoMetricDistortion', contrast_range=(0.5,)),
    dict(type='PhotoMetricDistortion', saturation_range=(0.5, float('nan'))),
    dict(type='Normalize', mean=[1, 2], std=[1, 2, 3]), dict(type='Normalize', mean=[1, 2, 3], std=[1, 2, 'x']),
    dict(type='MultiScaleFlipAug', transforms=[], img_scale=(8, 8), img_ratios=['x']),
    dict(type='MultiScaleFlipAug', transforms=[], img_scale=(8, 8), flip_direction='diagonal'),
    dict(type='RandomFlip', prob=1.5), dict(type='RandomFlip', direction='diagonal'),
    dict(type='Resize', img_scale=(8, 8), multiscale_mode='all'),
])
def test_wrong_numbers_are_named(step):
    names = 'crop_size|img_scale|ratio_range|size|.*_range|mean|std|img_ratios|(flip_)?direction|prob|multiscale_mode'
    with pytest.raises(ConfigError, match=rf'(^\[0\]\.)?({names})(\[\d\])?: expected '):
        Compose([step])
