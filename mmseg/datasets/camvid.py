"""CamVid (Brostow et al., 2009) with the 11 classes of SegNet's release, in VSPW's layout."""

from mmseg.registry import DATASETS

from .video_dataset import VideoDataset


@DATASETS.register_module()
class CamVidDataset(VideoDataset):
    """CamVid: driving videos; masks hold 0 for void and 1..11 for the classes."""

    CLASSES = (
        'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign_symbol', 'fence', 'car', 'pedestrian',
        'bicyclist',
    )
    PALETTE = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )
    reduce_zero_label = True
