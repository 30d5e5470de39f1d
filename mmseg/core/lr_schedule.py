"""The learning rate as a function of the iteration.

A pure function has no state, so there is nothing to save and a resumed run cannot drift.  Policies have the names, the
arguments and the formulas of mmcv 1.x, by iteration.  (Torch's schedulers multiply the current rate step by step and
know no ``min_lr``.)
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from mmseg.registry import config_path, retired
from mmseg.utils.arguments import Count, Factor, Index, Ratio, Share, Weight
from mmseg.utils.errors import ConfigError

logger = logging.getLogger('mmseg')


@retired(by_epoch=(False,), warmup_by_epoch=(False,))
class LrSchedule:
    """A policy of mmcv 1.x with optional warm-up.

    Args:
        max_iters: length of the training.
        policy: ``poly``: ``(1 - progress) ** power``; ``fixed``; ``step``: times ``gamma`` at each of ``step``;
            ``exp``: ``gamma ** iteration``; ``CosineAnnealing``: half a cosine down to the lowest rate;
            ``CosineRestart``: one for each of ``periods``; ``OneCycle``: up to the highest rate and down to nearly
            nothing (arXiv 1708.07120).
        power: poly: exponent of the decay, by default 1.
        min_lr: poly, step, CosineAnnealing, CosineRestart: lowest rate, the same for all parameter groups.
        min_lr_ratio: CosineAnnealing, CosineRestart: instead of ``min_lr``, as a share of the full rate.
        step: step: iterations at which the rate falls, or the number of iterations between falls.
        gamma: step (by default 0.1), exp: the factor.
        periods: CosineRestart: length of each cosine; together at least ``max_iters``.
        restart_weights: CosineRestart: factor of each cosine, by default 1.
        max_lr: OneCycle: highest rate of a parameter group without ``lr_mult``.
        total_steps: OneCycle: length of the cycle, by default ``max_iters``.
        pct_start: OneCycle: share of the cycle in which the rate rises, by default 0.3.
        anneal_strategy: OneCycle: ``cos`` (default) or ``linear``.
        div_factor: OneCycle: the highest rate over the first one, by default 25.
        final_div_factor: OneCycle: the first rate over the last one, by default 10,000.
        three_phase: OneCycle: come down to the first rate as slowly as up, and then to the last one.
        warmup: how the rate rises at the start; None: it does not.
        warmup_iters: length of the warm-up.
        warmup_ratio: share of the regular rate at which the warm-up starts.
    """

    def __init__(
        self,
        max_iters: Count,
        /,
        policy: Literal['poly', 'fixed', 'step', 'exp', 'CosineAnnealing', 'CosineRestart', 'OneCycle'] = 'poly',
        power: Weight | None = None,
        min_lr: Weight | None = None,
        min_lr_ratio: Share | None = None,
        step: Count | Sequence[Count] | None = None,
        gamma: Factor | None = None,
        periods: Sequence[Count] | None = None,
        restart_weights: Sequence[Weight] | None = None,
        max_lr: Factor | None = None,
        total_steps: Count | None = None,
        pct_start: Share | None = None,
        anneal_strategy: Literal['cos', 'linear'] | None = None,
        div_factor: Ratio | None = None,
        final_div_factor: Ratio | None = None,
        three_phase: bool | None = None,
        warmup: Literal['constant', 'linear', 'exp'] | None = None,
        warmup_iters: Index = 0,
        warmup_ratio: Share = 0.1,
    ) -> None:
        given = dict(
            power=power, min_lr=min_lr, min_lr_ratio=min_lr_ratio, step=step, gamma=gamma, periods=periods,
            restart_weights=restart_weights, max_lr=max_lr, total_steps=total_steps, pct_start=pct_start,
            anneal_strategy=anneal_strategy, div_factor=div_factor, final_div_factor=final_div_factor,
            three_phase=three_phase)
        self.max_iters = max_iters
        self._rate = _POLICIES[policy](max_iters, **_arguments_of(policy, given))
        self.warmup = warmup if warmup_iters > 0 else None
        self.warmup_iters = warmup_iters
        self.warmup_ratio = warmup_ratio

    def __call__(self, base_lr: float, iteration: int, share: float = 1.0) -> float:
        """The rate of an iteration.

        Args:
            base_lr: full rate of the parameter group.
            iteration: counted from 0.
            share: ``base_lr`` over the full rate of a group without ``lr_mult``; OneCycle has its own full rate.
        """
        lr = self._rate(base_lr, iteration, share)
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
        full = optimizer.defaults.get('lr') or 1.0
        for group in optimizer.param_groups:
            base_lr = group.setdefault('initial_lr', group['lr'])
            group['lr'] = self(base_lr, iteration, base_lr / full)


Rate = Callable[[float, int, float], float]
"""Full rate of a group, iteration, the group's share -> rate."""


def _poly(max_iters: int, power: float = 1.0, min_lr: float = 0.0) -> Rate:
    def rate(lr: float, iteration: int, share: float) -> float:
        return (lr - min_lr) * max(0.0, 1 - iteration / max_iters) ** power + min_lr

    return rate


def _fixed(max_iters: int) -> Rate:
    return lambda lr, iteration, share: lr


def _step(max_iters: int, step: int | Sequence[int], gamma: float = 0.1, min_lr: float = 0.0) -> Rate:
    def rate(lr: float, iteration: int, share: float) -> float:
        falls = iteration // step if isinstance(step, int) else bisect.bisect_right(sorted(step), iteration)
        return max(lr * gamma**falls, min_lr)

    return rate


def _exp(max_iters: int, gamma: float) -> Rate:
    return lambda lr, iteration, share: lr * gamma**iteration


def _cosine(start: float, end: float, progress: float, weight: float = 1.0) -> float:
    return end + 0.5 * weight * (start - end) * (math.cos(math.pi * progress) + 1)


def _cosine_annealing(max_iters: int, min_lr: float | None = None, min_lr_ratio: float | None = None) -> Rate:
    lowest = _lowest(min_lr, min_lr_ratio)
    return lambda lr, iteration, share: _cosine(lr, lowest(lr), min(iteration / max_iters, 1.0))


def _cosine_restart(
    max_iters: int, periods: Sequence[int], restart_weights: Sequence[float] | None = None,
    min_lr: float | None = None, min_lr_ratio: float | None = None,
) -> Rate:
    weights, ends = restart_weights or [1.0] * len(periods), [*itertools.accumulate(periods)]
    if len(weights) != len(periods):
        raise ValueError(f'restart_weights: expected one for each of {len(periods)} periods, got {len(weights)}')
    if ends[-1:] < [max_iters]:
        raise ValueError(f'periods: are {sum(periods)} iterations together, but the training has {max_iters}')
    lowest = _lowest(min_lr, min_lr_ratio)

    def rate(lr: float, iteration: int, share: float) -> float:
        now = min(bisect.bisect_right(ends, iteration), len(ends) - 1)
        progress = min((iteration - ends[now] + periods[now]) / periods[now], 1.0)
        return _cosine(lr, lowest(lr), progress, weights[now])

    return rate


def _lowest(min_lr: float | None, min_lr_ratio: float | None) -> Callable[[float], float]:
    if (min_lr is None) == (min_lr_ratio is None):
        raise ValueError('expected min_lr or min_lr_ratio, one of them')
    return (lambda lr: lr * min_lr_ratio) if min_lr_ratio is not None else (lambda lr: float(min_lr or 0))


def _one_cycle(
    max_iters: int, max_lr: float, total_steps: int | None = None, pct_start: float = 0.3, anneal_strategy: str = 'cos',
    div_factor: float = 25.0, final_div_factor: float = 1e4, three_phase: bool = False,
) -> Rate:
    total = total_steps or max_iters
    if total < max_iters:
        raise ValueError(f'total_steps: the cycle is {total} iterations, but the training has {max_iters}')
    top = pct_start * total - 1
    first, last = 1 / div_factor, 1 / div_factor / final_div_factor
    phases = [(top, first, 1.0), (total - 1, 1.0, last)]
    if three_phase:
        phases = [(top, first, 1.0), (2 * pct_start * total - 2, 1.0, first), (total - 1, first, last)]

    def rate(lr: float, iteration: int, share: float) -> float:
        begin = 0.0
        for end, start_lr, end_lr in phases:
            if iteration <= end or end == phases[-1][0]:
                progress = (iteration - begin) / (end - begin) if end > begin else 1.0
                if anneal_strategy == 'linear':
                    factor = start_lr + (end_lr - start_lr) * progress
                else:
                    factor = _cosine(start_lr, end_lr, progress)
                return max_lr * share * factor
            begin = end
        raise AssertionError

    return rate


_POLICIES: dict[str, Callable[..., Rate]] = {
    'poly': _poly, 'fixed': _fixed, 'step': _step, 'exp': _exp, 'CosineAnnealing': _cosine_annealing,
    'CosineRestart': _cosine_restart, 'OneCycle': _one_cycle,
}


def _arguments_of(policy: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a policy; one that it lacks is an error, one that it does not have (a base's) a warning."""
    own = [*inspect.signature(_POLICIES[policy]).parameters.values()][1:]
    names = [parameter.name for parameter in own]
    needed = [parameter.name for parameter in own if parameter.default is parameter.empty]
    where = config_path('lr_config')
    for key, value in given.items():
        if value is not None and key not in names:
            logger.warning("%s.%s: has no effect with policy '%s', whose arguments are: %s", where, key, policy,
                           ', '.join(names) or 'none')
        if value is None and key in needed:
            raise ConfigError(f"{where}.{key}: missing for policy '{policy}'")
    return {key: value for key, value in given.items() if value is not None and key in names}
