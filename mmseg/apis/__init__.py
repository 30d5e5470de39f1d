"""What tools and users call: inference here; training in :mod:`mmseg.apis.train`, testing in :mod:`mmseg.apis.test`.

``segment_video`` lives in :mod:`mmseg.apps.video` and is imported when it is first used.
"""

from typing import Any

from .inference import inference_segmentor, init_segmentor, show_result

__all__ = ['inference_segmentor', 'init_segmentor', 'segment_video', 'show_result']


def __getattr__(name: str) -> Any:
    if name != 'segment_video':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from mmseg.apps.video import segment_video

    return segment_video
