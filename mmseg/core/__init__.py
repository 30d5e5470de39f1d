"""The engine: training loop, hooks, optimizer, checkpoints; and the metrics under ``evaluation``."""

from .checkpoint import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from .finetune import FinetuneConfig, FinetuneReport, freeze, load_for_finetune
from .hooks import CheckpointHook, EMAHook, EvalHook, Hook, JsonLoggerHook, TensorboardLoggerHook, TextLoggerHook
from .lr_schedule import LrSchedule
from .optimizer import build_optimizer
from .precision import Precision
from .runner import IterBasedRunner, NonFiniteLossError, OtherRankError, UpdateConfig

__all__ = [
    'CheckpointHook',
    'EMAHook',
    'EvalHook',
    'FinetuneConfig',
    'FinetuneReport',
    'Hook',
    'IterBasedRunner',
    'JsonLoggerHook',
    'LrSchedule',
    'NonFiniteLossError',
    'OtherRankError',
    'Precision',
    'TensorboardLoggerHook',
    'TextLoggerHook',
    'UpdateConfig',
    'build_optimizer',
    'freeze',
    'load_checkpoint',
    'load_for_finetune',
    'load_weights',
    'newest_checkpoint',
    'open_checkpoint',
    'read_checkpoint',
    'save_checkpoint',
]
