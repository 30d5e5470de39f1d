"""SegFormer's head on CamVid in VSPW layout, as long as camvid_1f.py."""

_base_ = '../themask/camvid_1f.py'

model = dict(decode_head=dict(_delete_=True, type='SegformerHead', num_classes=11, embed_dim=64))
