"""Mask decoder with an optional temporal part."""

from mmseg.models.decode_heads.mask2former.transformer_decoder.mask_decoder import MaskDecoder

__all__ = ['MaskDecoder']
