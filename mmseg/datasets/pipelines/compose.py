"""Pipelines from configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmseg.registry import PIPELINES, build

from .transform import Results, Transform, materialise


class Compose:
    """Steps run one after the other.

    Label geometry is put off from step to step (:class:`~mmseg.datasets.pipelines.transform.LabelView`) until a step
    that is not ours, or the last one, needs arrays.

    Args:
        transforms: dicts with ``type`` and arguments, or callables from dict to dict.
    """

    def __init__(self, transforms: Sequence[Mapping | Callable[[Results], Results]]):
        self.transforms = [
            step if not isinstance(step, Mapping) and callable(step) else build(PIPELINES, step, f'[{index}]')
            for index, step in enumerate(transforms)
        ]

    def __call__(self, results: Results) -> Results:
        """Runs all steps on a shallow copy of ``results``."""
        results = dict(results)
        results.setdefault('seg_fields', ['gt_semantic_seg'] if 'gt_semantic_seg' in results else [])
        for step in self.transforms:
            results = step.apply(results) if isinstance(step, Transform) else step(materialise(results))
        return materialise(results)
