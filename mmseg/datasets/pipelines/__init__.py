"""Steps from files to tensors; each class takes images and clips."""

from .compose import Compose
from .formatting import Collect, DefaultFormatBundle, ImageToTensor
from .geometry import AlignedResize, Pad, RandomCrop, RandomFlip, Resize
from .loading import LoadAnnotations, LoadImageFromFile
from .motion import RandomMotion
from .photometric import Normalize, PhotoMetricDistortion
from .test_time_aug import MultiScaleFlipAug
from .transform import Transform

__all__ = [
    'AlignedResize', 'Collect', 'Compose', 'DefaultFormatBundle', 'ImageToTensor', 'LoadAnnotations',
    'LoadImageFromFile', 'MultiScaleFlipAug', 'Normalize', 'Pad', 'PhotoMetricDistortion', 'RandomCrop', 'RandomFlip',
    'RandomMotion', 'Resize', 'Transform',
]
