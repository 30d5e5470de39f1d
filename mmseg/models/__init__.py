"""Backbones, decode heads, losses and the segmentor; importing this fills their registries."""

from . import backbones, decode_heads
from .builder import build_segmentor
from .segmentors import EncoderDecoder

__all__ = ['EncoderDecoder', 'backbones', 'build_segmentor', 'decode_heads']
