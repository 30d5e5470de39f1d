"""Image encoders: ``[N, 3, H, W]`` to four maps of strides 4 to 32."""

from .mit import VARIANTS, MixTransformer, mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5

__all__ = ['VARIANTS', 'MixTransformer', 'mit_b0', 'mit_b1', 'mit_b2', 'mit_b3', 'mit_b4', 'mit_b5']
