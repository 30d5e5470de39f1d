"""KITTI-STEP (Weber et al., NeurIPS 2021): the 19 classes of Cityscapes in the 21 training videos of KITTI tracking."""

from mmseg.registry import DATASETS

from .cityscapes import Cityscapes
from .layout import Layout
from .video_dataset import VideoDataset


@DATASETS.register_module()
class KITTISTEP(VideoDataset):
    """``training/image_02/<video>/*.png`` of KITTI, ``panoptic_maps/{train,val}/<video>/*.png``, which make the splits.

    Masks are RGB: red holds 0..18 for the classes and 255 for void, green and blue the number of the instance.
    """

    CLASSES = Cityscapes.CLASSES
    PALETTE = Cityscapes.PALETTE
    layout = Layout(
        split_file='panoptic_maps/{split}/*', frames='training/image_02/{video}', masks='panoptic_maps/{split}/{video}',
        frame_suffix='.png')
    decoder = 'red_channel'
