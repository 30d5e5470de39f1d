"""VIPSeg: clips of two frames for training."""

_base_ = './vipseg.py'

data = dict(train=dict(dataset=dict(dilation=[-3])), val=dict(test_size=4), test=dict(test_size=4))
