"""Control of the demo: the one-frame model trains on, with the same freeze, for the time of ``mini_video.py``."""

_base_ = './mini_1f.py'

finetune = dict(frozen_eval=True)
model = dict(decode_head=dict(loss_cfg=dict(warmup_iters=0)))
runner = dict(max_iters=480)
