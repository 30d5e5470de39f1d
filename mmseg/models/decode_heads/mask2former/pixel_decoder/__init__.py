"""Pixel decoders: backbone maps to mask features and a pyramid of one width."""

from .msdeformattn import MSDeformAttn, MSDeformAttnPixelDecoder

__all__ = ['MSDeformAttn', 'MSDeformAttnPixelDecoder']
