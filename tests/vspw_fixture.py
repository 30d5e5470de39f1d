"""A tiny data set in VSPW's format for everybody's tests: a few videos of small frames with labels that move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
from PIL import Image

from tests.reference import recipe

SIZE = (60, 107)
VIDEOS = {'train': {'a': 7, 'b': 12, 'c': 5}, 'val': {'v0': 7, 'v1': 5, 'v2': 6}, 'test': {'t0': 4}}


def write_video(root: Path, name: str, frames: int, *, size: tuple[int, int] = SIZE, seed: int = 0, start: int = 1,
                step: int = 1, masks: bool = True) -> None:
    """Writes ``data/<name>/origin/*.jpg`` and ``mask/*.png`` under ``root``; raw labels 0 (void) and 1..124."""
    folder = root / 'data' / name
    (folder / 'origin').mkdir(parents=True, exist_ok=True)
    (folder / 'mask').mkdir(exist_ok=True)
    labels = recipe.raw_mask(seed, frames, *size)
    for index in range(frames):
        stem = f'{start + index * step:08d}'
        cv2.imwrite(str(folder / 'origin' / f'{stem}.jpg'), recipe.frame(seed, index, *size))
        if masks:
            Image.fromarray(labels[index]).save(folder / 'mask' / f'{stem}.png')


def write_vspw(root: str | Path, videos: Mapping[str, Mapping[str, int]] = VIDEOS, *, size: tuple[int, int] = SIZE,
               seed: int = 500) -> Path:
    """Writes ``{split: {video: frames}}`` under ``root`` in VSPW's layout; split ``test`` gets no masks.

    Returns:
        ``root``, to be used as ``data_root``.
    """
    root = Path(root)
    for split, lengths in videos.items():
        root.mkdir(parents=True, exist_ok=True)
        (root / f'{split}.txt').write_text('\n'.join(lengths) + '\n')
        for index, (name, frames) in enumerate(lengths.items()):
            write_video(root, name, frames, size=size, seed=seed + 10 * len(split) + index, masks=split != 'test')
    return root


def _crop_pipeline(scale: tuple[int, int], crop: int) -> list[dict]:
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='Resize', img_scale=scale, ratio_range=(0.5, 2.0)),
        dict(type='RandomCrop', crop_size=(crop, crop), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        dict(type='Pad', size=(crop, crop), pad_val=0, seg_pad_val=255),
        dict(type='DefaultFormatBundle'),
        dict(type='Collect', keys=['img', 'gt_semantic_seg']),
    ]


def train_config(root: str | Path, *, dilation=(0,), times: int = 2, crop: int = 64, **options) -> dict:
    """Config of the training set: ``RepeatDataset`` over ``VSPWDataset2`` with the full pipeline on small crops."""
    return dict(
        type='RepeatDataset', times=times,
        dataset=dict(
            type='VSPWDataset2', data_root=str(root), split='train', dilation=list(dilation),
            pipeline=_crop_pipeline((107, 60), crop), **options))


def test_config(root: str | Path, *, test_size: int = 1, split: str = 'val', scale: tuple[int, int] = (107, 60),
                size_divisor: int = 32, **options) -> dict:
    """Config of a test set: every frame once, resized to about ``scale`` and a multiple of ``size_divisor``."""
    view = [
        dict(type='AlignedResize', keep_ratio=True, size_divisor=size_divisor),
        dict(type='RandomFlip'),
        dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        dict(type='ImageToTensor', keys=['img']),
        dict(type='Collect', keys=['img']),
    ]
    return dict(
        type='VSPWDataset_multiFrameTest', data_root=str(root), split=split, test_size=test_size,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='MultiScaleFlipAug', img_scale=scale, flip=False, transforms=view),
        ], **options)


test_config.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test to pytest
