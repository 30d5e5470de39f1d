"""When to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from mmseg.core.hooks.hook import Hook
from mmseg.registry import HOOKS, retired
from mmseg.utils.arguments import Count
from mmseg.utils.checkpoint import prune_checkpoints
from mmseg.utils.errors import CheckpointError

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner


@HOOKS.register_module()
@retired(type=('CheckpointHook',), by_epoch=(False,), sync_buffer=(), create_symlink=(True,), out_dir=(None,))
class CheckpointHook(Hook):
    """Saves ``iter_<n>.pth`` in the work dir every ``interval`` iterations.

    A save that fails (a full disk) is reported and the training goes on: the state is in memory, and space may be there
    the next time.  At the end it is an error.

    Args:
        interval: iterations between two checkpoints.  Inside a group of accumulated gradients the save waits for the
            update, since half a group cannot be resumed.
        max_keep_ckpts: how many to keep; -1 keeps all.  The oldest goes only after the new one is whole.
        save_last: also save after the last iteration.
        save_optimizer: without it a checkpoint is a third of the size, and cannot be resumed.
        meta: what is saved with each checkpoint, beside what the training saves.
    """

    priority = 92  # after the loggers: what is saved is in the log

    def __init__(
        self,
        interval: Count,
        max_keep_ckpts: Literal[-1] | Count = -1,
        save_last: bool = True,
        save_optimizer: bool = True,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.interval = interval
        self.max_keep_ckpts = max_keep_ckpts
        self.save_last = save_last
        self.save_optimizer = save_optimizer
        self.meta = meta or {}

    def before_run(self, runner: IterBasedRunner) -> None:
        """Gives the runner what is saved with each checkpoint."""
        runner.meta.update(self.meta)

    def after_train_iter(self, runner: IterBasedRunner) -> None:
        """Saves where it is due."""
        if not self.has_updated(runner, self.interval) and not (self.is_last_iter(runner) and self.save_last):
            return
        try:
            path = runner.save_numbered(self.save_optimizer)
        except CheckpointError as error:
            if self.is_last_iter(runner):
                raise
            runner.logger.error('%s; the training goes on and will try again in %d iterations', error, self.interval)
            return
        if self.max_keep_ckpts > 0 and runner.rank == 0:
            prune_checkpoints(path.parent, self.max_keep_ckpts, runner.iters_done, runner.run_id)
