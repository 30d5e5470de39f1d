"""Control of the demo: the one-frame model trains on for the time that ``mini_video.py`` takes, with the same freeze."""

_base_ = './mini_1f.py'

finetune = dict(frozen_eval=True)
model = dict(decode_head=dict(loss_cfg=dict(warmup_iters=0)))
runner = dict(max_iters=600)
