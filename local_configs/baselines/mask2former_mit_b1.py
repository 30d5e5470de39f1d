"""Mask2Former (arXiv 2112.01527) on VSPW, each frame by itself: one round of matching, no self-labels."""

_base_ = '../themask/1f_themask_mit_b1.py'

model = dict(decode_head=dict(loss_cfg=dict(
    _delete_=True, rounds=[dict(name='', cost='full', losses=dict(mask=5.0, dice=5.0), labels='target')])))
