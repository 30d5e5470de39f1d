"""COCO-Stuff: 171 classes in single images."""

_base_ = './vspw.py'

data_root = 'data/coco_stuff164k'
img_scale = (2048, 512)
crop_size = (512, 512)
data = dict(
    train=dict(times=2, dataset=dict(type='COCOStuff164k', split='train2017')),
    val=dict(type='COCOStuff164k', split='val2017'),
    test=dict(type='COCOStuff164k', split='val2017'))
