"""Metrics of video semantic segmentation, streamed over frames in any order."""

from .confusion import class_scores, joint_histogram, mean_scores
from .metrics import ConsistencyOptions, StreamingMetrics
from .results import Results

__all__ = ['ConsistencyOptions', 'Results', 'StreamingMetrics', 'class_scores', 'joint_histogram', 'mean_scores']
