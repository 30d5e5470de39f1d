"""Mask2Former for clips (arXiv 2112.10764) on VSPW: queries of a clip attend to all of its frames and mask them all."""

_base_ = './mask2former_mit_b1.py'

model = dict(decode_head=dict(transformer_decoder_cfg=dict(num_frames=2)))
data = dict(train=dict(dataset=dict(dilation=[-3])), val=dict(test_size=2), test=dict(test_size=2))
