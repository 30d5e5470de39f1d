"""Loggers that send records to a service: Weights & Biases, MLflow.  The packages are imported when a run begins."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmseg.core.hooks.loggers import LoggerHook, tag_of
from mmseg.registry import HOOKS, retired
from mmseg.utils.arguments import Count
from mmseg.utils.errors import ConfigError

if TYPE_CHECKING:
    from mmseg.core.runner import IterBasedRunner


class _ServiceHook(LoggerHook):
    """Sends numbers; a service that fails is said once and costs no training."""

    package = ''

    def __init__(self, interval: Count = 10) -> None:
        super().__init__(interval)
        try:
            self._service: Any = importlib.import_module(self.package)
        except ImportError:
            raise ConfigError(f'{type(self).__name__}: {self.package} is not installed (pip install {self.package})'
                              ) from None  # fmt: skip
        self._failed = False

    def write(self, runner: IterBasedRunner, mode: str, iteration: int, record: dict[str, Any]) -> None:
        """Sends the numbers."""
        numbers = {tag_of(mode, name): float(value) for name, value in record.items() if not isinstance(value, str)}
        try:
            self.send(numbers, iteration)
        except Exception as error:  # of a network, or of anything behind it
            if not self._failed:
                runner.logger.error('%s: %s: %s; training goes on', type(self).__name__, type(error).__name__, error)
            self._failed = True

    def send(self, numbers: dict[str, float], iteration: int) -> None:
        """Sends the numbers of a record."""
        raise NotImplementedError


@HOOKS.register_module()
@retired(by_epoch=(False,), ignore_last=(), reset_flag=(), commit=(True,), with_step=(True,))
class WandbLoggerHook(_ServiceHook):
    """Weights & Biases (extra ``wandb``): the names of TensorBoard's scalars; a resumed run goes on there, too.

    Args:
        init_kwargs: of ``wandb.init``, as ``dict(project='vspw')``.
        interval: iterations between two records.
    """

    package = 'wandb'

    def __init__(self, init_kwargs: Mapping[str, Any] | None = None, interval: Count = 10) -> None:
        super().__init__(interval)
        self.init_kwargs = dict(init_kwargs or {})

    def before_run(self, runner: IterBasedRunner) -> None:
        """Begins the run on rank 0."""
        if runner.rank == 0:
            about = {key: runner.meta.get(key) for key in ('config', 'seed', 'mmseg_version')}
            own = {'id': runner.run_id, 'resume': 'allow', 'dir': str(runner.work_dir), 'config': about,
                   'name': runner.meta.get('exp_name')}  # fmt: skip
            self._service.init(**{**own, **self.init_kwargs})

    def send(self, numbers: dict[str, float], iteration: int) -> None:
        """Sends the numbers of a record."""
        self._service.log(numbers, step=iteration)

    def after_run(self, runner: IterBasedRunner) -> None:
        """Ends the run."""
        if runner.rank == 0:
            self._service.finish()


@HOOKS.register_module()
@retired(by_epoch=(False,), ignore_last=(), reset_flag=(), log_model=(False,))
class MlflowLoggerHook(_ServiceHook):
    """MLflow (extra ``mlflow``): the names of TensorBoard's scalars.

    Args:
        exp_name: name of the experiment.
        tracking_uri: of the server or the folder; None: as the environment has it.
        tags: of the run.
        interval: iterations between two records.
    """

    package = 'mlflow'

    def __init__(
        self, exp_name: str | None = None, tracking_uri: str | None = None, tags: Mapping[str, Any] | None = None,
        interval: Count = 10,
    ) -> None:
        super().__init__(interval)
        self.exp_name = exp_name
        self.tracking_uri = tracking_uri
        self.tags = dict(tags or {})

    def before_run(self, runner: IterBasedRunner) -> None:
        """Begins the run on rank 0."""
        if runner.rank == 0:
            if self.tracking_uri is not None:
                self._service.set_tracking_uri(self.tracking_uri)
            if self.exp_name is not None:
                self._service.set_experiment(self.exp_name)
            self._service.start_run(run_name=runner.meta.get('exp_name'))
            self._service.set_tags({'run': runner.run_id, 'seed': runner.meta.get('seed'), **self.tags})

    def send(self, numbers: dict[str, float], iteration: int) -> None:
        """Sends the numbers of a record."""
        self._service.log_metrics(numbers, step=iteration)

    def after_run(self, runner: IterBasedRunner) -> None:
        """Ends the run."""
        if runner.rank == 0:
            self._service.end_run()
