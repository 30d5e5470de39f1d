"""The learning rate as a function of the iteration.

A pure function has no state, so there is nothing to save and a resumed run cannot drift.  (Torch's ``PolynomialLR``
multiplies the current rate step by step and knows neither ``min_lr`` nor warm-up.)
"""

from __future__ import annotations

from typing import Literal

import torch

from mmseg.registry import retired
from mmseg.utils.arguments import Count, Index, Share, Weight


@retired(by_epoch=(False,), warmup_by_epoch=(False,))
class LrSchedule:
    """Polynomial decay with optional warm-up, as the ``poly`` policy of mmcv 1.x.

    Args:
        max_iters: length of the training; the rate reaches ``min_lr`` there.
        policy: ``poly``, or ``fixed`` for a constant rate.
        power: exponent of the decay.
        min_lr: lowest rate, the same for all parameter groups.
        warmup: how the rate rises at the start; None: it does not.
        warmup_iters: length of the warm-up.
        warmup_ratio: share of the regular rate at which the warm-up starts.
    """

    def __init__(
        self,
        max_iters: Count,
        /,
        policy: Literal['poly', 'fixed'] = 'poly',
        power: Weight = 1.0,
        min_lr: Weight = 0.0,
        warmup: Literal['constant', 'linear', 'exp'] | None = None,
        warmup_iters: Index = 0,
        warmup_ratio: Share = 0.1,
    ) -> None:
        self.max_iters = max_iters
        self.policy = policy
        self.power = power
        self.min_lr = min_lr
        self.warmup = warmup if warmup_iters > 0 else None
        self.warmup_iters = warmup_iters
        self.warmup_ratio = warmup_ratio

    def __call__(self, base_lr: float, iteration: int) -> float:
        """The rate of iteration ``iteration`` (0-based) for a parameter group whose full rate is ``base_lr``."""
        lr = base_lr
        if self.policy == 'poly':
            remaining = max(0.0, 1 - iteration / self.max_iters) ** self.power
            lr = (base_lr - self.min_lr) * remaining + self.min_lr
        if self.warmup is None or iteration >= self.warmup_iters:
            return lr
        progress = iteration / self.warmup_iters
        if self.warmup == 'constant':
            return lr * self.warmup_ratio
        if self.warmup == 'linear':
            return lr * (1 - (1 - progress) * (1 - self.warmup_ratio))
        return lr * self.warmup_ratio ** (1 - progress)

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Sets the rate of every parameter group from its ``initial_lr``."""
        for group in optimizer.param_groups:
            group['lr'] = self(group.setdefault('initial_lr', group['lr']), iteration)
