"""AdamW with a tenth of the learning rate for the backbone, polynomial decay, 160,000 iterations."""

optimizer = dict(
    type='AdamW', lr=1e-4, weight_decay=0.05,
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1), norm=dict(decay_mult=0.0))))
optimizer_config = dict(grad_clip=dict(max_norm=0.01, norm_type=2))
lr_config = dict(policy='poly', power=0.9, min_lr=0.0, by_epoch=False)
runner = dict(type='IterBasedRunner', max_iters=160000)
checkpoint_config = dict(by_epoch=False, interval=4000)
evaluation = dict(interval=170000, metric='mIoU')  # beyond max_iters: evaluate with tools/test.py
