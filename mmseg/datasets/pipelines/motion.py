"""A clip out of one image: the same picture, moved a little from frame to frame.

Copy-and-move clips let image data sets take part in the training of video models; the idea is that of the static-image
stage of video object segmentation (STM, Oh et al., ICCV 2019).
"""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np

from mmseg.registry import PIPELINES
from mmseg.utils.arguments import Share, Weight

from .transform import Results, Transform, is_clip, last_frame, materialise


@PIPELINES.register_module()
class RandomMotion(Transform):
    """Moves the frames of a clip, and their label maps, as a camera in steady motion would; the last frame stays.

    Shift, angle and zoom from one frame to the next are drawn once a clip, uniformly, and add up.  What comes in from
    outside is mirrored at the border, in frames (bilinear) and labels (nearest) alike.

    Args:
        shift: largest move from frame to frame, as a share of height and width.
        angle: largest turn, in degrees.
        zoom: largest change of size: 0.05 for 5 %.
    """

    def __init__(self, shift: Share = 0.03, angle: Weight = 2.0, zoom: Share = 0.03):
        self.shift = shift
        self.angle = angle
        self.zoom = zoom

    def apply(self, results: Results) -> Results:
        """Moves all frames but the last."""
        if not is_clip(materialise(results)['img']):
            return results
        height, width = last_frame(results['img']).shape[:2]
        shift = np.random.uniform(-self.shift, self.shift, 2) * (width, height)
        angle = np.random.uniform(-self.angle, self.angle)
        zoom = 1 + np.random.uniform(-self.zoom, self.zoom)
        for key, mode in (('img', cv2.INTER_LINEAR), *((key, cv2.INTER_NEAREST) for key in results['seg_fields'])):
            frames = results[key]
            moved = []
            for step, frame in zip(range(len(frames) - 1, -1, -1), frames):
                matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), step * angle, zoom**step)
                matrix[:, 2] += step * shift
                warp = partial(cv2.warpAffine, M=matrix, dsize=(width, height), borderMode=cv2.BORDER_REFLECT_101)
                moved.append(warp(np.ascontiguousarray(frame), flags=mode) if step else frame)
            results[key] = moved
        return results
