"""Image encoders: ``[N, 3, H, W]`` to four maps of strides 4 to 32."""

from .efficientnet_lite import EfficientNetLite
from .hugging_face import HFBackbone
from .mit import VARIANTS, MixTransformer, mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5
from .normalisation import Normalisation
from .timm_models import TimmBackbone

__all__ = [
    'VARIANTS', 'EfficientNetLite', 'HFBackbone', 'MixTransformer', 'Normalisation', 'TimmBackbone', 'mit_b0', 'mit_b1',
    'mit_b2', 'mit_b3', 'mit_b4', 'mit_b5',
]
