"""VSPW at 480p: one item a video, clips by ``dilation``; see docs/data.md for the layout on disk.

The first four keys are variables: a config that inherits this one sets them for all that stands below.
"""

data_root = 'data/vspw/VSPW_480p'
img_scale = (853, 480)  # width, height
ratio_range = (0.5, 2.0)  # of the random scale in training
crop_size = (480, 480)  # height, width

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', img_scale='${img_scale}', ratio_range='${ratio_range}'),
    dict(type='RandomCrop', crop_size='${crop_size}', cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='Normalize'),  # with the values of the backbone
    dict(type='Pad', size='${crop_size}', pad_val=0, seg_pad_val=255),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_semantic_seg']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale='${img_scale}', flip=False,
        transforms=[
            dict(type='AlignedResize', keep_ratio=True, size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize'),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ]),
]
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=4,
    train=dict(
        type='RepeatDataset', times=50,
        dataset=dict(
            type='VSPWDataset2', data_root='${data_root}', split='train', pipeline=train_pipeline, dilation=[0])),
    val=dict(
        type='VSPWDataset_multiFrameTest', data_root='${data_root}', split='val', pipeline=test_pipeline, test_size=1),
    test=dict(
        type='VSPWDataset_multiFrameTest', data_root='${data_root}', split='val', pipeline=test_pipeline, test_size=1))
