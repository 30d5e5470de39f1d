"""THE-Mask, clips, MiT-b4, VSPW."""

_base_ = [
    '../_base_/models/themask_video.py', '../_base_/datasets/vspw.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(pretrained='pretrained/mit_b4.pth', backbone=dict(type='mit_b4'))
