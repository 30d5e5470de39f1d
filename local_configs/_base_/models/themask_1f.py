"""THE-Mask on single frames (stage 1): the mask decoder without its temporal part."""

model = dict(
    type='EncoderDecoder_clips',
    pretrained=None,
    backbone=dict(type='mit_b1'),
    decode_head=dict(
        type='THEMask1fHead',
        num_classes=124,
        loss_cfg=dict(
            matcher_cfg=dict(
                class_weight=2.0, mask_weight=5.0, dice_weight=5.0,
                class_weight_unmatched=1.0, mask_weight_unmatched=0.5, dice_weight_unmatched=0.5),
            warmup_iters=30000,
            round_weight=[1.0, 0.5],
            aux_weight=0.25,
            no_object_weight=0.1,
            train_num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75),
        pixel_decoder_cfg=dict(
            type='MSDeformAttnPixelDecoder',
            conv_dim=256, mask_dim=256, transformer_nheads=8, transformer_dim_feedforward=1024,
            transformer_enc_layers=6, transformer_dropout=0.0),
        transformer_decoder_cfg=dict(
            type='MultiScaleMaskedTransformerDecoder',
            hidden_dim=256, mask_dim=256, num_queries=100, nheads=8, dim_feedforward=2048, dec_layers=9,
            num_frames=1)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
