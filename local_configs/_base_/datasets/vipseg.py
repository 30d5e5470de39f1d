"""VIPSeg: the classes of VSPW, made from panoptic masks; single frames."""

_base_ = './vspw.py'

data_root = 'data/VIPSeg'
data = dict(
    train=dict(dataset=dict(type='VIPSeg')),
    val=dict(type='VIPSeg'),
    test=dict(type='VIPSeg'))
