"""What tools and users call: inference here; training in :mod:`mmseg.apis.train`, testing in :mod:`mmseg.apis.test`."""

from .inference import inference_segmentor, init_segmentor, show_result
from .video import segment_video

__all__ = ['inference_segmentor', 'init_segmentor', 'segment_video', 'show_result']
