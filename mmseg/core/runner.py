"""The training loop: counts iterations, calls hooks, stops cleanly."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmseg.core.finetune import frozen_parts
from mmseg.core.hooks.hook import Hook, check_hook, priority_value
from mmseg.core.lr_schedule import LrSchedule
from mmseg.core.optimizer import load_optimizer_state
from mmseg.core.precision import Precision
from mmseg.registry import build
from mmseg.utils.arguments import Count, Positive
from mmseg.utils.checkpoint import RUN, load_weights, point_latest, save_checkpoint
from mmseg.utils.dist import (
    fail_together,
    gather_objects,
    get_dist_info,
    is_on_all_ranks,
    on_rank_0,
    reduce_mean,
    with_others,
)
from mmseg.utils.errors import CheckpointError, NonFiniteLossError, OtherRankError
from mmseg.utils.seed import get_rng_state, set_rng_state
from mmseg.utils.signals import Interrupted, Interruption
from mmseg.version import __version__


@dataclass(frozen=True)
class GradClip:
    """A limit of the gradient's norm.

    Attributes:
        max_norm: gradients are scaled down to this norm.
        norm_type: which norm (2 = Euclidean).
    """

    max_norm: Positive
    norm_type: Positive = 2.0


@dataclass
class UpdateConfig:
    """How a gradient becomes an update.

    Attributes:
        grad_clip: the limit of the gradient's norm; None leaves it.
        cumulative_iters: iterations whose mean gradient makes one update; each has half the batch for 2, and so on.
        type: ``Fp16OptimizerHook`` and ``GradientCumulativeFp16OptimizerHook`` are mmcv's way to ask for float16.
        loss_scale: goes with these; see the section ``fp16``.
    """

    grad_clip: Annotated[Mapping[str, Any] | None, GradClip] = None
    cumulative_iters: Count = 1
    type: Literal[
        'OptimizerHook', 'GradientCumulativeOptimizerHook', 'Fp16OptimizerHook', 'GradientCumulativeFp16OptimizerHook'
    ] = 'OptimizerHook'
    loss_scale: float | str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.clip: GradClip | None = build(GradClip, self.grad_clip, 'grad_clip') if self.grad_clip else None


@dataclass(eq=False)
class IterBasedRunner:
    """Trains ``model`` for ``max_iters`` iterations.

    The model is called as ``model(clip, label, iteration)`` and returns its losses by name; those whose name holds
    ``loss`` are summed, the others (accuracies and the like) are only logged.  Where it has a method ``statistics()``,
    this gives shares that describe the call, name -> tensor (count, of how many): logged over all ranks, and left out
    where they are shares of nothing.  An iteration is one batch of every rank; gradients are averaged by
    ``DistributedDataParallel`` around the model.

    Attributes:
        model: the network, maybe wrapped for several ranks; ``module`` is the bare one.
        optimizer: from :func:`mmseg.core.optimizer.build_optimizer`.
        schedule: rate of each iteration.
        max_iters: number of iterations of the whole training, those before a resume counted.
        work_dir: where checkpoints and logs go.
        update: clipping and accumulation.
        precision: dtype of the forward pass.
        device: where the batches are moved to.
        nan_loss: at a NaN or infinite loss, ``stop`` with an error, or ``skip`` the update with a warning.
        frozen_eval: parts without trainable parameters run in eval mode.
        meta: what is saved with each checkpoint (config text, seed, class names).
        timestamp: start of the run, in the names of its log files.
        run_id: names the run in its checkpoints, so that runs that share a work dir do not take each other's for their
            own; None for a run that began before there were names.
        iter: index of the current iteration; see :class:`mmseg.core.hooks.Hook`.
        iters_run: number of iterations that have run, the current one counted once its losses are there.
        iters_done: number of iterations whose work is in the weights: those of complete updates.
        samples_done: clips that all ranks together have drawn for them: the place in the data.
        outputs: losses of the current iteration on the device.
        log_buffer: numbers of the current iteration that are logged.
        val_results: figures of the last evaluation.
        skipped: bad clips that the loader passed over, in order.
        hooks: in the order in which they are called.
        stopped_by: number of the signal that ended the run, or its last evaluation, early; None where none has.
        evaluation_weights: context inside which the model holds the weights to evaluate.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LrSchedule
    max_iters: int
    work_dir: str | Path
    update: UpdateConfig = field(default_factory=UpdateConfig)
    precision: Precision = field(default_factory=lambda: Precision(torch.device('cpu'), 'float32'))
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    nan_loss: Literal['stop', 'skip'] = 'stop'
    frozen_eval: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    timestamp: str = field(default_factory=lambda: time.strftime('%Y%m%d_%H%M%S'))
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger('mmseg'))
    run_id: str | None = None

    iter: int = field(default=0, init=False)
    iters_run: int = field(default=0, init=False)
    iters_done: int = field(default=0, init=False)
    samples_done: int = field(default=0, init=False)
    hooks: list[Hook] = field(default_factory=list, init=False)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    log_buffer: dict[str, float] = field(default_factory=dict, init=False)
    val_results: dict[str, float] = field(default_factory=dict, init=False)
    skipped: list[str] = field(default_factory=list, init=False)
    stopped_by: int | None = field(default=None, init=False)
    evaluation_weights: Callable[[], contextlib.AbstractContextManager[None]] = field(
        default=contextlib.nullcontext, init=False
    )

    def __post_init__(self) -> None:
        self.rank, self.world_size = get_dist_info()
        self.module: nn.Module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        self.interruption = Interruption('stopping as soon as the iteration is complete', owner=self.rank == 0)
        self.resumed_run_id = self.run_id  # of the checkpoint that the run goes on from
        self.seconds_per_iter = 0.0
        self.group = 1  # iterations of the newest update
        self._samples = 0  # samples_done, with those of the update that is not complete
        self._generators: dict[str, Any] | None = None  # before the first draw for the update that is not complete
        self._saved_at = -1  # iters_done of the newest checkpoint that can be resumed
        self._poisoned = False  # a loss of the update that is not complete is not finite
        self._updating = False
        self._failed = False

    @property
    def resumable(self) -> bool:
        """Whether no batch has been drawn since the last update, so that what a checkpoint holds is all there is."""
        return self._generators is None

    # ------------------------------------------------------------------------------------------------------- hooks

    def register_hook(self, hook: Hook, priority: str | int | None = None, where: str = 'custom_hooks') -> None:
        """Adds a hook; at equal priority the order of registration counts.

        Raises:
            ConfigError: the hook would not be called, or the priority is unknown; ``where`` names its place.
        """
        check_hook(hook, where)
        hook.priority = priority_value(hook.priority if priority is None else priority, where)
        self.hooks.append(hook)
        self.hooks.sort(key=lambda hook: hook.priority)

    def call_hook(self, point: str, *args: Any) -> None:
        """Calls the method ``point`` of every hook."""
        for hook in self.hooks:
            getattr(hook, point)(self, *args)

    # --------------------------------------------------------------------------------------------------------- run

    def run(self, batches: Iterable[dict[str, Any]]) -> None:
        """Trains on ``batches`` until ``max_iters`` or a signal (SIGINT, SIGTERM, SIGHUP), which ends the run cleanly.

        Whatever ends the run, what has been trained is saved first.

        Args:
            batches: endless; each with ``img`` [B,T,3,H,W], ``gt_semantic_seg`` [B,T,H,W] and maybe ``skipped``.

        Raises:
            NonFiniteLossError: naming iteration and loss; a checkpoint of the state before it is saved.
            DataError: from the loader, after a checkpoint has been saved.
            CheckpointError: the last checkpoint cannot be written.
        """
        iterator = iter(batches)
        self.train_mode()
        self.optimizer.zero_grad()
        with self.interruption:
            try:
                with with_others():
                    self.call_hook('before_run')
                    self.call_hook('before_train_epoch')
                    self._iterate(iterator)
                    self.call_hook('after_train_epoch')
                    self.call_hook('after_run')
            except BaseException as error:
                self._rescue(alone=not is_on_all_ranks(error))
                raise

    def _iterate(self, iterator: Iterator[dict[str, Any]]) -> None:
        while self.iter < self.max_iters and self.stopped_by is None:
            start = time.perf_counter()
            try:
                batch = self._draw(iterator)
            except Interrupted as stop:
                self.stopped_by = stop.number
                break
            self._train_iter(batch, start)
            self.iter += 1
        if self.stopped_by is not None:  # perhaps in the evaluation after the last iteration
            self.optimizer.zero_grad()
            name, path = signal.Signals(self.stopped_by).name, self.save_numbered()
            self.logger.info('%s: stopped after iteration %d, saved %s', name, self.iters_done, path)

    def end(self) -> None:
        """Ends the training after this iteration; what has been trained is saved."""
        self.max_iters = self.iters_run
        self.save_numbered()

    def train_mode(self) -> None:
        """Puts the model in training mode, frozen parts in eval mode where so configured."""
        self.model.train()
        if self.frozen_eval:
            for part in frozen_parts(self.module):
                part.eval()

    def _draw(self, iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; where one rank gets an error or a signal, all do."""
        if self._generators is None:
            self._generators = get_rng_state()
        with fail_together(interrupted_too=True), self.interruption.raising():
            return next(iterator)

    def _train_iter(self, batch: dict[str, Any], start: float) -> None:
        data_time = time.perf_counter() - start
        for clip in batch.get('skipped', ()):
            self.logger.warning('skipped bad clip: %s', clip)
            self.skipped.append(clip)
        self.log_buffer = {}
        self.call_hook('before_train_iter')
        self.schedule.apply(self.optimizer, self.iter)
        self.group = min(self.update.cumulative_iters, self.max_iters - self.iters_done)
        updates = self.iter == self.iters_done + self.group - 1

        self._forward_backward(batch, synchronise=updates)
        norm = self._clip() if updates else None
        self._read_numbers(norm)
        self.iters_run = self.iter + 1
        self._samples += len(batch['img']) * self.world_size
        if updates:
            self._update()
        seconds = time.perf_counter() - start
        self.log_buffer |= {'time': seconds, 'data_time': data_time}
        weight = 0.02 if self.seconds_per_iter else 1.0
        self.seconds_per_iter += weight * (seconds - self.seconds_per_iter)
        self.call_hook('after_train_iter')

    def _forward_backward(self, batch: dict[str, Any], synchronise: bool) -> None:
        clip = batch['img'].to(self.device, non_blocking=True)
        label = batch['gt_semantic_seg'].to(self.device, non_blocking=True)
        local = not synchronise and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            with self.precision.autocast():
                losses = self.model(clip, label, self.iter)
            total = torch.stack([value for name, value in losses.items() if 'loss' in name]).sum()
            self.precision.backward(total / self.group)
        self.outputs = {name: value.detach() for name, value in losses.items()} | {'loss': total.detach()}

    def _clip(self) -> torch.Tensor:
        """Limits the gradient's norm; returns the norm before."""
        self.precision.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        clip = self.update.clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], clip.norm_type if clip else 2.0)
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip.max_norm, norm)
        return norm

    def _read_numbers(self, norm: torch.Tensor | None) -> None:
        """Brings losses and norm to the host, in one transfer, as means over the ranks; looks for NaN."""
        numbers = dict(self.outputs)
        if norm is not None:
            numbers['grad_norm'] = norm
        shares: dict[str, torch.Tensor] = getattr(self.module, 'statistics', dict)()
        columns = [value.float().view(1) for value in numbers.values()] + [share.float() for share in shares.values()]
        values = reduce_mean(torch.cat(columns)).tolist()
        self.log_buffer |= dict(zip(numbers, values))
        counts = values[len(numbers) :]
        self.log_buffer |= {name: part / whole for name, part, whole in zip(shares, counts[::2], counts[1::2]) if whole}
        if self.precision.scales:
            self.log_buffer['loss_scale'] = self.precision.scaler.get_scale()
        self._check_finite(dict(zip(numbers, values)))

    def _check_finite(self, numbers: dict[str, float]) -> None:
        bad = [f'{name} = {value}' for name, value in numbers.items() if not math.isfinite(value)
               and not (name == 'grad_norm' and self.precision.scales)]  # fmt: skip
        if not bad:
            return
        more = f' and {len(bad) - 3} more' if len(bad) > 3 else ''
        message = f'iteration {self.iter + 1}: {", ".join(bad[:3])}{more}'
        if self.nan_loss == 'skip':
            self.logger.warning('%s; this update is skipped', message)
            self._poisoned = True
            return
        with fail_together():
            raise NonFiniteLossError(
                f"{message}; the weights are those before it. Lower optimizer.lr, or set nan_loss='skip' to pass over "
                'such batches'
            )

    def _update(self) -> None:
        self._updating = True
        self.precision.step(self.optimizer, skip=self._poisoned)
        self.optimizer.zero_grad()
        self.iters_done, self.samples_done, self._generators = self.iters_run, self._samples, None
        self._updating = self._poisoned = False

    # -------------------------------------------------------------------------------------------------------- stop

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a signal raises ``KeyboardInterrupt``: for evaluations, which may take hours and can be redone.

        With several ranks nothing is raised, because ranks cannot leave their common calls one by one; the block may
        ask :attr:`interruption` where all can leave.
        """
        return self.interruption.raising() if self.world_size == 1 else contextlib.nullcontext()

    def _rescue(self, alone: bool) -> None:
        """Before an error ends the run: saves what has been trained so far."""
        self._failed = True
        self.optimizer.zero_grad()
        say = self.logger.error if self.rank == 0 else self.logger.debug  # rank 0 saves
        if not self.iters_done or self._updating:
            since = 'its first iteration' if not self.iters_done else 'an update of the weights was complete'
            say('the run ends before %s; nothing is saved', since)
            return
        try:
            try:
                path = self.save_numbered(alone=alone)
            except OtherRankError:
                path = self.save_numbered(alone=True)
            say('the run ends after iteration %d, saved as %s', self.iters_done, path)
        except Exception as error:
            say('the run ends after iteration %d, which cannot be saved: %s', self.iters_done, error)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save_numbered(self, save_optimizer: bool = True, alone: bool = False) -> Path:
        """Saves ``iter_<n>.pth``, unless that is done, and makes ``latest.pth`` point to it; returns its path.

        Arguments and errors are those of :meth:`save_checkpoint`.
        """
        path = Path(self.work_dir) / f'iter_{self.iters_done}.pth'
        if self._saved_at != self.iters_done:
            self.save_checkpoint(path, save_optimizer, alone)
            if self.rank == 0:
                point_latest(path, self.run_id)
            if save_optimizer:
                self._saved_at = self.iters_done
        return path

    def save_checkpoint(self, path: str | Path, save_optimizer: bool = True, alone: bool = False) -> None:
        """Saves the state of the run after its last update; every rank must call it, rank 0 writes.

        Args:
            path: the file.
            save_optimizer: without, the file can be tested and fine-tuned from, but not resumed.
            alone: rank 0 does not talk to the others, which may be gone; their random generators are not saved.

        Raises:
            CheckpointError: on every rank, where rank 0 cannot write.
        """
        own = get_rng_state() if self._generators is None else self._generators
        if not alone:
            on_rank_0(self._write, path, save_optimizer, gather_objects(own))
        elif self.rank == 0:
            self._write(path, save_optimizer, [own])

    def _write(self, path: str | Path, save_optimizer: bool, generators: list[dict[str, Any]]) -> None:
        place = {'iter': self.iters_done, 'epoch': 0, 'samples': self.samples_done, 'world_size': self.world_size}
        run = {RUN: self.run_id} if self.run_id else {}
        checkpoint: dict[str, Any] = {
            'meta': {**self.meta, **place, **run, 'mmseg_version': __version__, 'time': time.asctime()},
            'state_dict': {name: value.cpu() for name, value in self.module.state_dict().items()},
        }
        if save_optimizer:
            checkpoint |= {
                'optimizer': self.optimizer.state_dict(),
                'scaler': self.precision.scaler.state_dict(),
                'rng': generators,
            }
        self._let_hooks_add(checkpoint)
        save_checkpoint(checkpoint, path)

    def _let_hooks_add(self, checkpoint: dict[str, Any]) -> None:
        for hook in self.hooks:
            try:
                hook.before_save_checkpoint(self, checkpoint)
            except Exception as error:
                if not self._failed:
                    raise
                self.logger.error('%s adds nothing to the checkpoint: %s', type(hook).__name__, error)

    def resume(self, checkpoint: dict[str, Any], source: str | Path) -> None:
        """Takes over the state that :meth:`save_checkpoint`, or mmcv 1.x, saved; call it after hooks are registered.

        Raises:
            CheckpointError: the file holds weights only, or is of another model.
        """
        if 'optimizer' not in checkpoint or 'iter' not in checkpoint['meta']:
            raise CheckpointError(f"'{source}' holds weights only; use --load-from to start a new training from them")
        checkpoint = dict(checkpoint)
        self.resumed_run_id = checkpoint['meta'].get(RUN)
        self.call_hook('after_load_checkpoint', checkpoint)
        weights = checkpoint.get('trained_state_dict', checkpoint['state_dict'])
        load_weights(self.module, weights, source)
        buffers = {name for name, _ in self.module.named_buffers()}
        load_optimizer_state(self.optimizer, checkpoint['optimizer'], [name for name in weights if name not in buffers])
        if checkpoint.get('scaler'):
            self.precision.scaler.load_state_dict(checkpoint['scaler'])
        states = checkpoint.get('rng', [])
        if len(states) == self.world_size:
            set_rng_state(states[self.rank])
        else:
            self.logger.warning(
                "'%s' holds the random generators of %d ranks, now there are %d: training goes on, but not bit for bit",
                *(source, len(states), self.world_size),
            )
        self.iter = self.iters_run = self.iters_done = self._saved_at = checkpoint['meta']['iter']
        self._samples = self.samples_done = checkpoint['meta'].get('samples', 0)
        self.logger.info("resumed '%s' at iteration %d", source, self.iter)
