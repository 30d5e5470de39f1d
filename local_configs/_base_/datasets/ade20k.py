"""ADE20K: 150 classes in single images."""

_base_ = './vspw.py'

data_root = 'data/ade/ADEChallengeData2016'
img_scale = (2048, 512)
crop_size = (512, 512)
data = dict(
    train=dict(times=10, dataset=dict(type='ADE20K', split='training')),
    val=dict(type='ADE20K', split='validation'),
    test=dict(type='ADE20K', split='validation'))
