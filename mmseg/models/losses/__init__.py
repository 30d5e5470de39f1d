"""Losses of mask classification; they know predictions and targets, never heads."""

from mmseg.models.losses.criterion import THEMaskCriterion
from mmseg.models.losses.rounds import LossWeights, Round

__all__ = ['LossWeights', 'Round', 'THEMaskCriterion']
