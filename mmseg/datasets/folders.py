"""Layouts that many data sets share."""

from mmseg.registry import DATASETS

from .layout import Layout
from .video_dataset import VideoDataset


@DATASETS.register_module()
class DAVISLike(VideoDataset):
    """The folders of DAVIS 2017 (Pont-Tuset et al., 2017), and two classes: 0 is background, all other ids objects.

    ``JPEGImages/480p/<video>/*.jpg``, ``Annotations/480p/<video>/*.png``, ``ImageSets/2017/{train,val}.txt``.  Videos
    of one's own in these folders have their classes, palette and ``label_map`` in the config.
    """

    CLASSES = ('background', 'object')
    PALETTE = ((0, 0, 0), (128, 0, 0))
    layout = Layout(
        split_file='ImageSets/2017/{split}.txt', frames='JPEGImages/480p/{video}', masks='Annotations/480p/{video}')
    label_map = {0: 'background', 'other': 'object'}


@DATASETS.register_module()
class ImageFolder(VideoDataset):
    """Images ``<split>/NAME.jpg`` with masks ``<split>/NAME.png`` beside them, at any depth; the config names classes.

    Split ``'.'`` is the root itself.
    """

    layout = Layout(split_file=None, frames='{split}', masks='{split}')
