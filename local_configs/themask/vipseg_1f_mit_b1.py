"""THE-Mask, one frame, MiT-b1, VIPSeg."""

_base_ = [
    '../_base_/models/themask_1f.py', '../_base_/datasets/vipseg.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(pretrained='pretrained/mit_b1.pth', backbone=dict(type='mit_b1'))
