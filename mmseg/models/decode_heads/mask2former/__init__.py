"""Parts of the mask classifier: position encoding, pixel decoder, mask decoder."""

from mmseg.models.decode_heads.mask2former.pixel_decoder import MSDeformAttnPixelDecoder
from mmseg.models.decode_heads.mask2former.transformer_decoder import MaskDecoder

__all__ = ['MSDeformAttnPixelDecoder', 'MaskDecoder']
