"""SegFormer-B1 on VSPW: the all-MLP head, each frame by itself, with the optimizer of its paper."""

_base_ = '../themask/1f_themask_mit_b1.py'

model = dict(decode_head=dict(_delete_=True, type='SegformerHead', num_classes=124, embed_dim=256))
optimizer = dict(
    lr=6e-5, weight_decay=0.01,
    paramwise_cfg=dict(_delete_=True, custom_keys=dict(norm=dict(decay_mult=0.0), decode_head=dict(lr_mult=10.0))))
