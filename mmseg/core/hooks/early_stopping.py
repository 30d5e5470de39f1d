"""End a training whose evaluations no longer improve (mmengine's ``EarlyStoppingHook`` has these names)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmseg.core.hooks.evaluation import Rule, rule_of
from mmseg.core.hooks.hook import Hook
from mmseg.core.hooks.loggers import evaluations_of
from mmseg.registry import HOOKS
from mmseg.utils.arguments import Count, Weight
from mmseg.utils.dist import broadcast_object
from mmseg.utils.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner


@HOOKS.register_module()
class EarlyStoppingHook(Hook):
    """Ends the training cleanly when a figure has not improved in ``patience`` evaluations.

    A resumed run knows the evaluations before from its JSON log.

    Args:
        monitor: name of the figure.
        patience: evaluations without an improvement.
        min_delta: what counts as one.
        rule: ``greater`` or ``less``; None derives it from the name.
    """

    priority = 'LOWEST'  # after the loggers, which must have what it acts on

    def __init__(
        self, monitor: str = 'mIoU', patience: Count = 5, min_delta: Weight = 0.0, rule: Rule | None = None
    ) -> None:
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.sign = 1 if (rule or rule_of(monitor)) == 'greater' else -1
        self.best, self.since = -math.inf, 0

    def before_run(self, runner: IterBasedRunner) -> None:
        """Takes in the evaluations of a run that is resumed."""
        made = evaluations_of(runner.work_dir, runner.resumed_run_id) if runner.rank == 0 else None
        for record in broadcast_object(made) or ():
            if record['iter'] <= runner.iters_done and self.monitor in record:
                self._take(record[self.monitor])
        self._end_if_due(runner)

    def after_val_epoch(self, runner: IterBasedRunner) -> None:
        """Takes in an evaluation."""
        if self.monitor not in runner.val_results:
            raise ConfigError(f"EarlyStoppingHook.monitor: no figure '{self.monitor}'"
                              f'{nearest(self.monitor, runner.val_results)}')
        self._take(runner.val_results[self.monitor])
        self._end_if_due(runner)

    def _take(self, value: float | None) -> None:
        score = -math.inf if value is None or value != value else self.sign * value
        if score > self.best + self.min_delta:
            self.best, self.since = score, 0
        else:
            self.since += 1

    def _end_if_due(self, runner: IterBasedRunner) -> None:
        if self.since >= self.patience and runner.iters_run < runner.max_iters:
            runner.logger.info('%s has not improved in %d evaluations (best: %.4f): the training ends here',
                               self.monitor, self.since, self.sign * self.best)
            runner.end()
