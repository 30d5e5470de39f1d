"""A model section small enough for tests: hidden 32, two decoder layers, eight queries."""

TINY_BACKBONE = dict(type='mit_b0', embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))


def tiny_model(stage, **changes):
    """``stage`` is '1f' or 'video'; ``changes`` replace keys of the section."""
    video = stage == 'video'
    head = dict(
        type='THEMaskHead' if video else 'THEMask1fHead',
        num_classes=5,
        loss_cfg=dict(warmup_iters=10, train_num_points=64),
        pixel_decoder_cfg=dict(
            type='MSDeformAttnPixelDecoder', conv_dim=32, mask_dim=32, transformer_nheads=4,
            transformer_dim_feedforward=40, transformer_enc_layers=2),
        transformer_decoder_cfg=dict(
            type=('Video' if video else '') + 'MultiScaleMaskedTransformerDecoder',
            hidden_dim=32, num_queries=8, nheads=4, dim_feedforward=40, dec_layers=2, num_frames=2 if video else 1))
    model = dict(
        type='EncoderDecoder_clips', pretrained=None, backbone=dict(TINY_BACKBONE), decode_head=head,
        train_cfg=dict(), test_cfg=dict(mode='whole'))
    return {**model, **changes}
