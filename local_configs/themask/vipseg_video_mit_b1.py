"""THE-Mask, clips, MiT-b1, VIPSeg; from ``vipseg_1f_mit_b1.py`` (``--finetune-from``)."""

_base_ = [
    '../_base_/models/themask_two_frames.py', '../_base_/datasets/vipseg_video.py',
    '../_base_/schedules/adamw_160k.py', '../_base_/default_runtime.py',
]

model = dict(pretrained='pretrained/mit_b1.pth', backbone=dict(type='mit_b1'))
runner = dict(max_iters=12000)
checkpoint_config = dict(interval=1000)
