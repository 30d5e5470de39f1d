"""Cityscapes: the annotated images."""

_base_ = './vspw.py'

data_root = 'data/cityscapes'
img_scale = (2048, 1024)
crop_size = (512, 1024)
data = dict(
    train=dict(dataset=dict(type='Cityscapes')),
    val=dict(type='Cityscapes'),
    test=dict(type='Cityscapes'))
