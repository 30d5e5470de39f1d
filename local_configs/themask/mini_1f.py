"""Stage 1 on the mini data set: a THE-Mask small enough for two CPU cores, from random weights."""

_base_ = [
    '../_base_/models/themask_1f.py', '../_base_/datasets/mini_vspw.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(type='mit_b0'),
    decode_head=dict(
        loss_cfg=dict(warmup_iters=300, train_num_points=1024),
        pixel_decoder_cfg=dict(conv_dim=64, mask_dim=64, transformer_dim_feedforward=256, transformer_enc_layers=2),
        transformer_decoder_cfg=dict(
            hidden_dim=64, mask_dim=64, num_queries=24, dim_feedforward=256, dec_layers=3)))

optimizer = dict(lr=1e-3, paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
runner = dict(max_iters=1000)
checkpoint_config = dict(interval=500, max_keep_ckpts=2)
seed = 0
