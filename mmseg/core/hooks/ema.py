"""An exponential moving average of the weights: noise of single updates averages out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mmseg.core.hooks.hook import Hook
from mmseg.registry import HOOKS, retired
from mmseg.utils.arguments import Count, Factor
from mmseg.utils.checkpoint import load_weights
from mmseg.utils.errors import ConfigError

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner


@HOOKS.register_module()
@retired(resume_from=(None,))
class EMAHook(Hook):
    """Keeps an average of the trained weights, evaluates with it, and saves it as the checkpoint's ``state_dict``.

    So every tool that opens the checkpoint gets the averaged weights; those that training goes on with are saved beside
    them as ``trained_state_dict``.  After update n the average is decay * average + (1 - decay) * weights with
    decay = min(1 - momentum, (1 + n) / (warm_up + n)).

    Args:
        momentum: share of the new weights in each update, in (0, 1).
        interval: iterations between two updates of the average; inside a group of accumulated gradients one waits for
            the update of the weights.
        warm_up: the larger, the longer the average follows the weights closely at the start.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, momentum: Factor = 0.0002, interval: Count = 1, warm_up: Count = 100) -> None:
        if momentum >= 1:
            raise ConfigError(f'EMAHook: expected momentum < 1, got {momentum}')
        self.momentum = momentum
        self.interval = interval
        self.warm_up = warm_up
        self.updates = 0
        self._average: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def before_run(self, runner: IterBasedRunner) -> None:
        """Starts the average at the current weights, unless it was resumed."""
        self._weights = [p for p in runner.module.parameters() if p.requires_grad]
        if not self._average:
            self._average = [p.detach().clone() for p in self._weights]
        runner.evaluation_weights = self.averaged

    @torch.no_grad()
    def after_train_iter(self, runner: IterBasedRunner) -> None:
        """Updates the average."""
        if self.has_updated(runner, self.interval):
            decay = min(1 - self.momentum, (1 + self.updates) / (self.warm_up + self.updates))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._weights], 1 - decay)
            self.updates += 1

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the context the model holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def before_save_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """Saves the average as the weights, and the weights beside it."""
        checkpoint['trained_state_dict'] = checkpoint['state_dict']
        with self.averaged():
            checkpoint['state_dict'] = {name: value.cpu().clone() for name, value in runner.module.state_dict().items()}
        checkpoint['ema'] = {'updates': self.updates}

    def after_load_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """Takes the average back, and gives the model the weights that training goes on with."""
        if 'ema' not in checkpoint:
            runner.logger.warning('EMAHook: the checkpoint holds no average; it starts anew at the loaded weights')
            return
        load_weights(runner.module, checkpoint['state_dict'], 'average of the checkpoint')
        self._average = [p.detach().clone() for p in runner.module.parameters() if p.requires_grad]
        self.updates = checkpoint['ema']['updates']
