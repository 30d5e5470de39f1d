"""Clips of two frames on DAVIS in VSPW layout, from a checkpoint of davis_1f.py."""

_base_ = './mini_video.py'

data_root = 'data/davis_vspw'
img_scale = (427, 240)
crop_size = (192, 192)
classes = dict(
    type='VideoDataset', classes=['other', 'animal', 'vehicle', 'person'], reduce_zero_label=True,
    palette=[[90, 90, 90], [219, 124, 28], [46, 110, 200], [214, 44, 74]])
data = dict(train=dict(times=100, dataset=classes), val=classes, test=classes)

model = dict(decode_head=dict(num_classes=4))
runner = dict(max_iters=600)
checkpoint_config = dict(interval=200)
