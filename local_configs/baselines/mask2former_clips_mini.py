"""Mask2Former for clips on the mini data set, as long as mini_1f.py."""

_base_ = '../themask/mini_1f.py'

model = dict(decode_head=dict(
    transformer_decoder_cfg=dict(num_frames=2),
    loss_cfg=dict(
        _delete_=True, train_num_points=1024,
        rounds=[dict(name='', cost='full', losses=dict(mask=5.0, dice=5.0), labels='target')])))
data = dict(train=dict(dataset=dict(dilation=[-3])), val=dict(test_size=2), test=dict(test_size=2))
