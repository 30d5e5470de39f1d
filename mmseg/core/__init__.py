"""The engine: training loop, hooks, optimizer, checkpoints; and the metrics under ``evaluation``.

Names are imported when they are first used: the metrics need neither torch nor the engine.
"""

from importlib import import_module
from typing import Any

_HOME = {
    'CheckpointHook': 'core.hooks',
    'EMAHook': 'core.hooks',
    'EvalHook': 'core.hooks',
    'FinetuneConfig': 'core.finetune',
    'FinetuneReport': 'core.finetune',
    'Hook': 'core.hooks',
    'IterBasedRunner': 'core.runner',
    'JsonLoggerHook': 'core.hooks',
    'LrSchedule': 'core.lr_schedule',
    'NonFiniteLossError': 'core.runner',
    'OtherRankError': 'core.runner',
    'Precision': 'core.precision',
    'TensorboardLoggerHook': 'core.hooks',
    'TextLoggerHook': 'core.hooks',
    'UpdateConfig': 'core.runner',
    'build_optimizer': 'core.optimizer',
    'freeze': 'core.finetune',
    'load_checkpoint': 'utils.checkpoint',
    'load_for_finetune': 'core.finetune',
    'load_weights': 'utils.checkpoint',
    'newest_checkpoint': 'utils.checkpoint',
    'open_checkpoint': 'utils.checkpoint',
    'read_checkpoint': 'utils.checkpoint',
    'save_checkpoint': 'utils.checkpoint',
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'mmseg.{_HOME[name]}'), name)
