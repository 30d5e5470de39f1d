"""UAVid (Lyu et al., 2020): 8 classes in oblique views of streets from the air."""

from mmseg.registry import DATASETS

from .layout import Layout
from .video_dataset import VideoDataset


@DATASETS.register_module()
class UAVid(VideoDataset):
    """``uavid_{train,val,test}/<video>/{Images,Labels}/*.png``; masks hold the colours of the classes."""

    CLASSES = (
        'background clutter', 'building', 'road', 'tree', 'low vegetation', 'moving car', 'static car', 'human')
    PALETTE = (
        (0, 0, 0), (128, 0, 0), (128, 64, 128), (0, 128, 0), (128, 128, 0), (64, 0, 128), (192, 0, 192), (64, 64, 0))
    layout = Layout(
        split_file=None, frames='uavid_{split}/{video}/Images', masks='uavid_{split}/{video}/Labels',
        frame_suffix='.png')
    colours = True
