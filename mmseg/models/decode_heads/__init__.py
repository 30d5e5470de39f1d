"""Decode heads: from backbone maps to predictions, scores and losses."""

from mmseg.models.decode_heads.mask_decoder import MaskDecoder
from mmseg.models.decode_heads.pixel_decoder import MSDeformAttnPixelDecoder
from mmseg.models.decode_heads.segformer_head import SegformerHead
from mmseg.models.decode_heads.themask_head import THEMaskHead

__all__ = ['MSDeformAttnPixelDecoder', 'MaskDecoder', 'SegformerHead', 'THEMaskHead']
