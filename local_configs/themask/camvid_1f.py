"""One-frame training from scratch on CamVid in VSPW layout (``data/camvid_vspw``), small enough for two CPU cores."""

_base_ = './mini_1f.py'

data_root = 'data/camvid_vspw'
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (160, 160)

model = dict(decode_head=dict(num_classes=11))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', img_scale=(240, 180), ratio_range=(0.75, 1.5)),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size=crop_size, pad_val=0, seg_pad_val=255),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_semantic_seg']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(240, 180), flip=False,
        transforms=[
            dict(type='AlignedResize', keep_ratio=True, size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ]),
]
data = dict(
    train=dict(times=100, dataset=dict(type='CamVidDataset', data_root=data_root, pipeline=train_pipeline)),
    val=dict(type='CamVidDataset', data_root=data_root, pipeline=test_pipeline),
    test=dict(type='CamVidDataset', data_root=data_root, pipeline=test_pipeline))

runner = dict(max_iters=2400)
checkpoint_config = dict(interval=800)
