"""THE-Mask on clips (stage 2): the one-frame model with temporal aggregation and two output levels."""

_base_ = './themask_1f.py'

model = dict(
    decode_head=dict(
        type='THEMaskHead',
        transformer_decoder_cfg=dict(type='VideoMultiScaleMaskedTransformerDecoder')))
