"""THE-Mask, one frame, MiT-b1, COCO-Stuff: weights from which VSPW may start (docs/data.md)."""

_base_ = [
    '../_base_/models/themask_1f.py', '../_base_/datasets/coco_stuff164k.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(pretrained='pretrained/mit_b1.pth', backbone=dict(type='mit_b1'), decode_head=dict(num_classes=171))
