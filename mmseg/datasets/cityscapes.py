"""Cityscapes (Cordts et al., CVPR 2016): 19 classes in street scenes of 50 cities, as images and as video.

Of each snippet of 30 frames the twentieth is annotated.
"""

from mmseg.registry import DATASETS

from .layout import Layout
from .video_dataset import VideoDataset

_TRAINED = {
    7: 'road', 8: 'sidewalk', 11: 'building', 12: 'wall', 13: 'fence', 17: 'pole', 19: 'traffic light',
    20: 'traffic sign', 21: 'vegetation', 22: 'terrain', 23: 'sky', 24: 'person', 25: 'rider', 26: 'car', 27: 'truck',
    28: 'bus', 31: 'train', 32: 'motorcycle', 33: 'bicycle',
}


@DATASETS.register_module()
class Cityscapes(VideoDataset):
    """The annotated images: ``leftImg8bit/{train,val,test}/<city>/*.png`` and ``gtFine`` likewise.

    Masks (``*_gtFine_labelIds.png``) hold 0..33, of which 19 are classes and the others void.
    """

    CLASSES = tuple(_TRAINED.values())
    PALETTE = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )
    layout = Layout(
        split_file=None, frames='leftImg8bit/{split}', masks='gtFine/{split}',
        frame_suffix='_leftImg8bit.png', mask_suffix='_gtFine_labelIds.png')
    label_map = {raw: _TRAINED.get(raw) for raw in range(34)}


@DATASETS.register_module()
class CityscapesVideo(Cityscapes):
    """The snippets: ``leftImg8bit_sequence/{train,val,test}/<city>/<city>_<sequence>_<frame>_leftImg8bit.png``.

    A video is a sequence, cut where frames are missing between its snippets.
    """

    layout = Layout(
        split_file=None, frames='leftImg8bit_sequence/{split}', masks='gtFine/{split}', max_gap=1,
        frame_pattern=r'[^/]+/(?P<video>[^/]+)_(?P<frame>\d+)_leftImg8bit\.png',
        mask_pattern=r'[^/]+/(?P<video>[^/]+)_(?P<frame>\d+)_gtFine_labelIds\.png')
    unlabelled = 'ignore'
