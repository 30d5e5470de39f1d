"""The engine: training loop, hooks, optimizer, checkpoints; and the metrics under ``evaluation``.

Names are imported when they are first used: the metrics need neither torch nor the engine.
"""

from importlib import import_module
from typing import Any

_HOME = {
    'CheckpointHook': 'hooks',
    'EMAHook': 'hooks',
    'EvalHook': 'hooks',
    'FinetuneConfig': 'finetune',
    'FinetuneReport': 'finetune',
    'Hook': 'hooks',
    'IterBasedRunner': 'runner',
    'JsonLoggerHook': 'hooks',
    'LrSchedule': 'lr_schedule',
    'NonFiniteLossError': 'runner',
    'OtherRankError': 'runner',
    'Precision': 'precision',
    'TensorboardLoggerHook': 'hooks',
    'TextLoggerHook': 'hooks',
    'UpdateConfig': 'runner',
    'build_optimizer': 'optimizer',
    'freeze': 'finetune',
    'load_checkpoint': 'checkpoint',
    'load_for_finetune': 'finetune',
    'load_weights': 'checkpoint',
    'newest_checkpoint': 'checkpoint',
    'open_checkpoint': 'checkpoint',
    'read_checkpoint': 'checkpoint',
    'save_checkpoint': 'checkpoint',
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_HOME[name]}', __name__), name)
