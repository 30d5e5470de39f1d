"""Data sets of labelled videos, pipelines and loaders."""

from . import pipelines
from .ade20k import ADE20K
from .camvid import CamVidDataset
from .cityscapes import Cityscapes, CityscapesVideo
from .coco_stuff import COCOStuff164k
from .dataset_wrappers import ConcatDataset, RepeatDataset
from .folders import DAVISLike, ImageFolder
from .kitti_step import KITTISTEP
from .layout import Layout
from .loader import build_dataset, build_test_loader, build_train_loader
from .split import Split
from .uavid import UAVid
from .video_dataset import Clip, Video, VideoDataset
from .vipseg import VIPSeg
from .vspw import VSPWDataset

__all__ = [
    'ADE20K', 'KITTISTEP', 'COCOStuff164k', 'CamVidDataset', 'Cityscapes', 'CityscapesVideo', 'Clip', 'ConcatDataset',
    'DAVISLike', 'ImageFolder', 'Layout', 'RepeatDataset', 'Split', 'UAVid', 'VIPSeg', 'VSPWDataset', 'Video',
    'VideoDataset', 'build_dataset', 'build_test_loader', 'build_train_loader', 'pipelines',
]
