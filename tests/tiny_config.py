"""Configs of ``local_configs`` made small enough for tests: real files on disk, so that tools can be run on them."""

from __future__ import annotations

import textwrap
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / 'local_configs' / 'themask'
CROP = 64

TINY_MODEL = """
model = dict(
    pretrained=None,
    backbone=dict(type='mit_b0'),
    decode_head=dict(
        loss_cfg=dict(warmup_iters=2, train_num_points=64),
        pixel_decoder_cfg=dict(
            conv_dim=32, mask_dim=32, transformer_dim_feedforward=32, transformer_enc_layers=1),
        transformer_decoder_cfg=dict(
            hidden_dim=32, mask_dim=32, num_queries=8, nheads=4, dim_feedforward=32, dec_layers=2)))
"""
_DATA = """
_train = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', img_scale=(107, 60), ratio_range=(0.8, 1.5)),
    dict(type='RandomCrop', crop_size=({crop}, {crop}), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='Normalize'),
    dict(type='Pad', size=({crop}, {crop}), pad_val=0, seg_pad_val=255),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_semantic_seg']),
]
_test = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(107, 60), flip=False,
        transforms=[
            dict(type='AlignedResize', keep_ratio=True, size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize'),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ]),
]
data = dict(
    samples_per_gpu=2, workers_per_gpu={workers},
    train=dict(times=10, dataset=dict(data_root={root!r}, pipeline=_train)),
    val=dict(data_root={root!r}, pipeline=_test),
    test=dict(data_root={root!r}, pipeline=_test))
"""
_SCHEDULE = """
optimizer = dict(lr=1e-3)
runner = dict(max_iters={iters})
checkpoint_config = dict(interval={interval})
evaluation = dict(interval=1000)
log_config = dict(interval=1)
seed = 0
"""


def write_tiny_config(
    path: Path, data_root: Path, *, base: str = '1f_themask_mit_b0', iters: int = 4, interval: int = 2,
    workers: int = 0, crop: int = CROP, extra: str = '',
) -> Path:
    """Writes a config of a tiny model on the data set at ``data_root`` and returns its path.

    Args:
        path: the file to write.
        data_root: from :func:`tests.vspw_fixture.write_vspw`.
        base: name of a config under ``local_configs/themask``.
        iters: length of the training.
        interval: iterations between checkpoints.
        workers: loader processes.
        crop: side of the training crops.
        extra: more lines of config.
    """
    path.write_text(
        f'_base_ = {str(CONFIGS / (base + ".py"))!r}\n'
        + TINY_MODEL
        + _DATA.format(root=str(data_root), workers=workers, crop=crop)
        + _SCHEDULE.format(iters=iters, interval=interval)
        + textwrap.dedent(extra)
    )
    return path
