"""THE-Mask, one frame, MiT-b5, VSPW."""

_base_ = [
    '../_base_/models/themask_1f.py', '../_base_/datasets/vspw.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(pretrained='pretrained/mit_b5.pth', backbone=dict(type='mit_b5'))
