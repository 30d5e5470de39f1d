"""One-frame training from scratch on CamVid in VSPW layout (``data/camvid_vspw``), small enough for two CPU cores."""

_base_ = './mini_1f.py'

data_root = 'data/camvid_vspw'
img_scale = (240, 180)
crop_size = (160, 160)
data = dict(
    train=dict(times=100, dataset=dict(type='CamVidDataset')),
    val=dict(type='CamVidDataset'),
    test=dict(type='CamVidDataset'))

model = dict(decode_head=dict(num_classes=11))
runner = dict(max_iters=2400)
checkpoint_config = dict(interval=800)
