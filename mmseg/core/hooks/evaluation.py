"""Evaluate during training, and keep the best checkpoint."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from mmseg.core.hooks.hook import Hook
from mmseg.core.hooks.loggers import was_evaluated
from mmseg.registry import HOOKS, config_path
from mmseg.utils.arguments import Count
from mmseg.utils.checkpoint import RUN, read_checkpoint
from mmseg.utils.dist import broadcast_object, fail_together
from mmseg.utils.errors import CheckpointError, ConfigError, nearest
from mmseg.utils.signals import Interrupted

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner

Rule = Literal['greater', 'less']
_RULES: dict[Rule, tuple[str, ...]] = {  # by words in the name of a figure
    'greater': ('iou', 'acc', 'dice', 'fscore', 'precision', 'recall', 'vc', 'vec', 'consistency'),
    'less': ('loss', 'error'),
}


@HOOKS.register_module()
class EvalHook(Hook):
    """Evaluates every ``interval`` iterations, logs the figures, and keeps the best checkpoint (mmcv 1.x's semantics).

    Args:
        evaluate: called with the bare model in eval mode on every rank; returns figures by name (rank 0's count).
        interval: iterations between two evaluations.
        start: first iteration at which to evaluate; None starts with the first multiple of ``interval``.
        save_best: name of the figure by which the best checkpoint is kept as ``best_<name>_iter_<n>.pth``; ``auto``
            takes the first figure; None keeps none.
        rule: ``greater`` or ``less``; None derives it from the name.
    """

    priority = 94  # after the checkpoint: an evaluation may take hours

    def __init__(
        self,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        /,
        interval: Count = 1,
        start: int | None = None,
        save_best: str | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.interval = interval
        self.start = start
        self.save_best = save_best
        self.rule = rule
        if save_best is not None and save_best != 'auto':
            self.rule = rule or rule_of(save_best)
        self.best_score: float | None = None
        self.best_path: Path | None = None

    def _due(self, done: int) -> bool:
        if self.start is None:
            return done % self.interval == 0
        return done >= self.start and (done - self.start) % self.interval == 0

    def before_run(self, runner: IterBasedRunner) -> None:
        """Makes the evaluation that the resumed run still owes: it was killed, stopped or failed in the midst of it."""
        if not runner.iters_done or not self._due(runner.iters_done):
            return
        made = was_evaluated(runner.work_dir, runner.resumed_run_id, runner.iters_done) if runner.rank == 0 else None
        if not broadcast_object(made):
            runner.logger.info('the evaluation after iteration %d is still to be made', runner.iters_done)
            self._evaluate(runner)

    def after_train_iter(self, runner: IterBasedRunner) -> None:
        """Evaluates where it is due."""
        if self._due(runner.iters_run):
            self._evaluate(runner)

    def _evaluate(self, runner: IterBasedRunner) -> None:
        runner.call_hook('before_val_epoch')
        try:
            with fail_together(interrupted_too=True), runner.evaluation_weights(), runner.interruptible():
                runner.module.eval()
                figures = dict(self.evaluate(runner.module))
        except Interrupted as stop:
            runner.logger.warning('the evaluation was interrupted; the resumed run will make it')
            runner.stopped_by = stop.number
            return
        finally:
            runner.train_mode()
        runner.val_results = broadcast_object(figures)
        if self.save_best is not None:
            self._keep_best(runner)
        runner.call_hook('after_val_epoch')  # logged last: what the log holds need not be done again

    def _keep_best(self, runner: IterBasedRunner) -> None:
        results = runner.val_results
        if self.save_best == 'auto':
            self.save_best = next(iter(results))
            self.rule = self.rule or rule_of(self.save_best)
        if self.save_best not in results:
            raise ConfigError(
                f"evaluation.save_best: no figure '{self.save_best}'{nearest(str(self.save_best), results)}"
            )
        score = results[self.save_best]
        if score != score or (self.best_score is not None and not self._better(score, self.best_score)):
            return
        path = Path(runner.work_dir) / f'best_{self.save_best}_iter_{runner.iters_done}.pth'
        former, former_score = self.best_path, self.best_score
        self.best_score, self.best_path = score, path
        try:
            runner.save_checkpoint(path)
        except CheckpointError as error:
            self.best_score, self.best_path = former_score, former
            runner.logger.error('%s; the training goes on without its best checkpoint', error)
            return
        if runner.rank == 0 and former is not None and former != path:
            former.unlink(missing_ok=True)
        runner.logger.info('best %s so far: %.4f, saved as %s', self.save_best, score, path)

    def _better(self, score: float, best: float) -> bool:
        return score > best if self.rule == 'greater' else score < best

    def before_save_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """Saves the best score so far."""
        if self.best_score is not None:
            checkpoint['best'] = {'key': self.save_best, 'score': self.best_score}

    def after_load_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """Takes the best score back; the best file knows it even where the resumed checkpoint is older than it."""
        if self.save_best is None:
            return
        best = broadcast_object(self._best_on_disk(runner) if runner.rank == 0 else None)
        own = checkpoint.get('best')
        if best is None and own is not None and self.save_best in (own['key'], 'auto'):
            best = own['key'], own['score'], None  # of a run from whose earlier checkpoint this one goes on
        if best is not None:
            self.save_best, self.best_score, self.best_path = best
            self.rule = self.rule or rule_of(str(self.save_best))

    def _best_on_disk(self, runner: IterBasedRunner) -> tuple[str, float, Path] | None:
        key = '*' if self.save_best == 'auto' else glob.escape(str(self.save_best))
        found = []
        for path in Path(runner.work_dir).glob(f'best_{key}_iter_*.pth'):
            with contextlib.suppress(CheckpointError):
                checkpoint = read_checkpoint(path)
                best = checkpoint.get('best')
                if best is not None and checkpoint['meta'].get(RUN) == runner.run_id:
                    found.append((best['key'], best['score'], path))
        if not found:
            return None
        choose = max if (self.rule or rule_of(found[0][0])) == 'greater' else min
        return choose(found, key=lambda best: best[1])


def rule_of(name: str) -> Rule:
    """Whether more or less is better, from the name of a figure."""
    lowered = name.lower()
    for rule, words in _RULES.items():
        if any(word in lowered for word in words):
            return rule
    raise ConfigError(
        f"{config_path('evaluation')}: is more of '{name}' better? Say so by rule='greater' or 'less'"
    )
