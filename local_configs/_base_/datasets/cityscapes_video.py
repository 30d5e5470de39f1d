"""Cityscapes: the snippets, in which one frame of thirty has a mask; clips of two frames for training."""

_base_ = './cityscapes.py'

data = dict(
    train=dict(dataset=dict(type='CityscapesVideo', dilation=[-3])),
    val=dict(type='CityscapesVideo', test_size=4),
    test=dict(type='CityscapesVideo', test_size=4))
