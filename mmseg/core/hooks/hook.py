"""Hooks: the training loop calls them at named points, whose names and order are those of mmcv 1.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmseg.utils.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner

PRIORITIES = {
    'HIGHEST': 0,
    'VERY_HIGH': 10,
    'HIGH': 30,
    'ABOVE_NORMAL': 40,
    'NORMAL': 50,
    'BELOW_NORMAL': 60,
    'LOW': 70,
    'VERY_LOW': 90,
    'LOWEST': 100,
}


class Hook:
    """Base class of hooks; override the methods of the points that you need.

    In ``after_train_iter`` the runner's ``iter`` is still the index of the iteration that has just run, as in mmcv 1.x:
    ``every_n_iters`` counts from one.  A run is one epoch.  ``runner.outputs`` holds the losses of the iteration on the
    device, ``runner.log_buffer`` its numbers on the host; what a hook adds to the latter is logged.
    """

    priority: str | int = 'NORMAL'

    def before_run(self, runner: IterBasedRunner) -> None:
        """Once, after a resumed state is in place."""

    def after_run(self, runner: IterBasedRunner) -> None:
        """Once, at the end of a run that was not stopped by an error."""

    def before_epoch(self, runner: IterBasedRunner) -> None:
        """Before training and before each validation."""

    def after_epoch(self, runner: IterBasedRunner) -> None:
        """After training and after each validation."""

    def before_iter(self, runner: IterBasedRunner) -> None:
        """Before each training iteration."""

    def after_iter(self, runner: IterBasedRunner) -> None:
        """After each training iteration."""

    def before_train_epoch(self, runner: IterBasedRunner) -> None:
        """Before the first iteration."""
        self.before_epoch(runner)

    def after_train_epoch(self, runner: IterBasedRunner) -> None:
        """After the last iteration."""
        self.after_epoch(runner)

    def before_val_epoch(self, runner: IterBasedRunner) -> None:
        """Before the model is evaluated."""
        self.before_epoch(runner)

    def after_val_epoch(self, runner: IterBasedRunner) -> None:
        """After the model was evaluated; the figures are in ``runner.val_results``."""
        self.after_epoch(runner)

    def before_train_iter(self, runner: IterBasedRunner) -> None:
        """Before the forward pass."""
        self.before_iter(runner)

    def after_train_iter(self, runner: IterBasedRunner) -> None:
        """After the update of the weights."""
        self.after_iter(runner)

    def before_save_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """May add to what is saved."""

    def after_load_checkpoint(self, runner: IterBasedRunner, checkpoint: dict[str, Any]) -> None:
        """May read what was saved, before the model does (only on resume)."""

    @staticmethod
    def every_n_iters(runner: IterBasedRunner, n: int) -> bool:
        """Whether the number of iterations so far, this one counted, is a multiple of ``n``; False for n <= 0."""
        return n > 0 and (runner.iter + 1) % n == 0

    @staticmethod
    def has_updated(runner: IterBasedRunner, n: int) -> bool:
        """Whether the weights have just been updated, in a group of iterations that one of every ``n`` belongs to."""
        return runner.resumable and runner.iters_done // n > (runner.iters_done - runner.group) // n

    @staticmethod
    def is_last_iter(runner: IterBasedRunner) -> bool:
        """Whether this is the last iteration of the training."""
        return runner.iter + 1 >= runner.max_iters


POINTS = tuple(name for name in vars(Hook) if name.startswith(('before_', 'after_')))


def check_hook(hook: Any, where: str) -> None:
    """Refuses what is no :class:`Hook`, and a method that looks like a point of the loop but would never be called."""
    if not isinstance(hook, Hook):
        raise ConfigError(f'{where}: {type(hook).__name__} is no hook; derive it from mmseg.core.hooks.Hook')
    for name in dir(hook):
        if name.startswith(('before_', 'after_')) and name not in POINTS and callable(getattr(hook, name)):
            raise ConfigError(f'{where}: {type(hook).__name__}.{name} would never be called{nearest(name, POINTS)}')


def priority_value(priority: str | int, where: str) -> int:
    """A priority's number: lower runs earlier.

    Raises:
        ConfigError: unknown name, or a number outside 0..100.
    """
    if isinstance(priority, str):
        if priority.upper() not in PRIORITIES:
            raise ConfigError(f"{where}.priority: unknown priority '{priority}'{nearest(priority.upper(), PRIORITIES)}")
        return PRIORITIES[priority.upper()]
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 100:
        raise ConfigError(f'{where}.priority: expected 0..100 or a name such as NORMAL, got {priority!r}')
    return priority
