"""Registered hooks of the training loop."""

from .checkpoint import CheckpointHook
from .early_stopping import EarlyStoppingHook
from .ema import EMAHook
from .evaluation import EvalHook
from .hook import POINTS, PRIORITIES, Hook
from .loggers import JsonLoggerHook, LoggerHook, TensorboardLoggerHook, TextLoggerHook
from .services import MlflowLoggerHook, WandbLoggerHook

__all__ = [
    'POINTS',
    'PRIORITIES',
    'CheckpointHook',
    'EMAHook',
    'EarlyStoppingHook',
    'EvalHook',
    'Hook',
    'JsonLoggerHook',
    'LoggerHook',
    'MlflowLoggerHook',
    'TensorboardLoggerHook',
    'TextLoggerHook',
    'WandbLoggerHook',
]
