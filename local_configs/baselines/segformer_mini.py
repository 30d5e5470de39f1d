"""SegFormer's head on the mini data set, as long as mini_1f.py."""

_base_ = '../themask/mini_1f.py'

model = dict(decode_head=dict(_delete_=True, type='SegformerHead', num_classes=124, embed_dim=64))
