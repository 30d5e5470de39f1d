"""THE-Mask on clips of two frames, from the one-frame model of stage 1 (``--finetune-from``).

Only the mask decoder trains; its new twins start as copies of the one-frame parts.
"""

_base_ = './themask_video.py'

model = dict(decode_head=dict(transformer_decoder_cfg=dict(num_frames=2)))
finetune = dict(
    copy=dict(
        decoder_norm=['decoder_norm1', 'decoder_norm2'], class_embed=['class_embed_aux'],
        mask_embed=['mask_embed_aux']),
    frozen_eval=True)
