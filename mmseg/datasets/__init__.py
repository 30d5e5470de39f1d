"""Data sets of labelled videos, pipelines and loaders."""

from . import pipelines
from .camvid import CamVidDataset
from .dataset_wrappers import ConcatDataset, RepeatDataset
from .loader import build_dataset, build_test_loader, build_train_loader
from .split import Layout, Split
from .video_dataset import Clip, Video, VideoDataset
from .vspw import VSPWDataset

__all__ = [
    'CamVidDataset', 'Clip', 'ConcatDataset', 'Layout', 'RepeatDataset', 'Split', 'VSPWDataset', 'Video',
    'VideoDataset', 'build_dataset', 'build_test_loader', 'build_train_loader', 'pipelines',
]
