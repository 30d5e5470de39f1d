"""What tools and users call: inference here; training in :mod:`mmseg.apis.train`, testing in :mod:`mmseg.apis.test`."""

from .inference import inference_segmentor, init_segmentor, show_result

__all__ = ['inference_segmentor', 'init_segmentor', 'show_result']
