"""Stage 2 on the mini data set: clips of two frames, from the one-frame model of ``mini_1f.py``.

Only the mask decoder trains (``--finetune-from``); its new twins start as copies of the one-frame parts.
"""

_base_ = './mini_1f.py'

model = dict(
    decode_head=dict(
        type='THEMaskHead',
        transformer_decoder_cfg=dict(type='VideoMultiScaleMaskedTransformerDecoder', num_frames=2)))

finetune = dict(
    copy=dict(
        decoder_norm=['decoder_norm1', 'decoder_norm2'], class_embed=['class_embed_aux'],
        mask_embed=['mask_embed_aux']),
    frozen_eval=True)
data = dict(train=dict(dataset=dict(dilation=[-3])), val=dict(test_size=2), test=dict(test_size=2))
runner = dict(max_iters=400)
checkpoint_config = dict(interval=200)
