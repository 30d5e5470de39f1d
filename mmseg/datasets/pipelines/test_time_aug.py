"""Views of a clip for testing: scales and flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from mmseg.registry import PIPELINES
from mmseg.utils.arguments import Factor
from mmseg.utils.errors import ConfigError

from .compose import Compose
from .geometry import Scales, scale_list, scaled
from .transform import Direction, Results, Transform


def flips_of(metas: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """How each view is flipped, for the segmentor, which turns its scores back."""
    return [meta['flip_direction'] if meta['flip'] else None for meta in metas]


@PIPELINES.register_module()
class MultiScaleFlipAug(Transform):
    """Runs its steps once for every scale and flip, and gathers what comes out in lists.

    Args:
        transforms: the steps; a resize and a flip among them follow the view's ``scale`` and ``flip``.
        img_scale: (width, height), or several of them; ``None`` with ``img_ratios`` takes the frame's own size.
        img_ratios: factors on the one ``img_scale``.
        flip: add the flipped views.
        flip_direction: ``'horizontal'``, ``'vertical'``, or a list of both.
    """

    def __init__(
            self, transforms: Sequence[Annotated[Mapping, PIPELINES]], img_scale: Scales = None,
            img_ratios: Factor | Sequence[Factor] | None = None, flip: bool = False,
            flip_direction: Direction | Sequence[Direction] = 'horizontal'):
        self.transforms = Compose(transforms)
        self.img_scales = scale_list(img_scale)
        self.img_ratios = None
        if img_ratios is not None:
            self.img_ratios = list(img_ratios) if isinstance(img_ratios, Sequence) else [float(img_ratios)]
            if len(self.img_scales) > 1:
                raise ConfigError('MultiScaleFlipAug: img_ratios goes with one img_scale, not with several')
        elif not self.img_scales:
            raise ConfigError('MultiScaleFlipAug: give img_scale, img_ratios or both')
        directions = [flip_direction] if isinstance(flip_direction, str) else list(flip_direction)
        if not directions:
            raise ConfigError('MultiScaleFlipAug: flip_direction: expected one direction or more, got an empty list')
        self.flips = [(False, directions[0])] + [(True, direction) for direction in directions if flip]

    def _view_scales(self, results: Results) -> list[tuple[int, int]]:
        if self.img_ratios is None:
            return self.img_scales
        return [scaled(self.img_scales, ratio, results) for ratio in self.img_ratios]

    def apply(self, results: Results) -> Results:
        """A dict of lists, one entry a view: for every scale the clip as it is, then its flips."""
        views = [
            self.transforms({**results, 'scale': scale, 'flip': flip, 'flip_direction': direction})
            for scale in self._view_scales(results) for flip, direction in self.flips
        ]
        return {key: [view[key] for view in views] for key in views[0]}
