"""Losses of mask classification; they know predictions and targets, never heads."""

from mmseg.models.losses.criterion import LossWeights, Round, THEMaskCriterion

__all__ = ['LossWeights', 'Round', 'THEMaskCriterion']
