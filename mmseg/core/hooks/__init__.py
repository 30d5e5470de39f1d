"""Registered hooks of the training loop."""

from .checkpoint import CheckpointHook
from .ema import EMAHook
from .evaluation import EvalHook
from .hook import POINTS, PRIORITIES, Hook
from .loggers import JsonLoggerHook, LoggerHook, TensorboardLoggerHook, TextLoggerHook

__all__ = [
    'POINTS',
    'PRIORITIES',
    'CheckpointHook',
    'EMAHook',
    'EvalHook',
    'Hook',
    'JsonLoggerHook',
    'LoggerHook',
    'TensorboardLoggerHook',
    'TextLoggerHook',
]
