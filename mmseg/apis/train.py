"""Training from a config: data, model, optimizer, hooks, start weights, and the run."""

from __future__ import annotations

import contextlib
import inspect
import platform
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmseg.apis.test import check_classes, check_model, gather_by, metrics_for, run_test
from mmseg.config import as_text, config_files
from mmseg.core.finetune import FinetuneConfig, freeze, load_for_finetune, warn_of_unused
from mmseg.core.hooks import CheckpointHook, EvalHook, JsonLoggerHook
from mmseg.core.lr_schedule import LrSchedule
from mmseg.core.optimizer import build_optimizer, check_optimizer
from mmseg.core.precision import Precision, set_backends
from mmseg.core.runner import IterBasedRunner, UpdateConfig
from mmseg.datasets import build_dataset, build_test_loader, build_train_loader
from mmseg.datasets.dataset_wrappers import video_datasets
from mmseg.datasets.loader import STALL_SECONDS
from mmseg.models import build_segmentor
from mmseg.registry import HOOKS, build, check_arguments
from mmseg.utils.checkpoint import (
    RUN,
    checkpoint_files,
    checkpoint_iteration,
    open_checkpoint,
    read_checkpoint,
    remove_leftovers,
    run_of,
)
from mmseg.utils.dist import barrier, broadcast_object, describe, get_dist_info
from mmseg.utils.errors import CheckpointError, ConfigError, DataError, nearest
from mmseg.utils.files import write_atomically
from mmseg.utils.lock import FolderLock
from mmseg.utils.logger import get_logger, setup_logger
from mmseg.utils.names import order_changed
from mmseg.utils.seed import draw_seed, set_random_seed
from mmseg.version import __version__

_PRIORITY = 'priority'
_SEEDS = 2**31  # numpy takes the seed plus the rank in 32 bits


def train_segmentor(cfg: Config, device: torch.device | None = None, validate: bool = True) -> IterBasedRunner:
    """Trains as ``cfg`` says and returns the finished runner.

    Every rank of a distributed training calls it.  The work dir receives the final config, a text log, a log of JSON
    lines and the checkpoints.

    Args:
        cfg: from :func:`mmseg.config.load_config`, with ``work_dir``.  Where weights come from: ``resume_from``
            (file, work dir, or ``auto`` for the work dir itself where it holds a checkpoint) goes before
            ``finetune_from``, ``load_from`` and ``model.pretrained``.
        device: where to train; None chooses the CPU.
        validate: whether to evaluate as ``cfg.evaluation`` says.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError: a checkpoint cannot be read, does not fit, or cannot be written.
        DataError: a file of the data set is bad.
        NonFiniteLossError: a loss became NaN.
    """
    device = device or torch.device('cpu')
    _check_plan(cfg)
    work_dir = Path(cfg.work_dir)
    config_text = as_text(cfg)
    steps = {
        'schedule': LrSchedule(cfg.runner.max_iters, **check_arguments(LrSchedule, cfg.lr_config, 'lr_config')),
        'update': UpdateConfig.from_config(cfg.get('optimizer_config'), cfg.get('nan_loss', 'stop')),
        'precision': Precision.from_config(cfg, device),
    }
    with _work_dir(cfg, work_dir, config_text) as timestamp:
        return _train(cfg, device, validate, config_text, work_dir=work_dir, timestamp=timestamp, **steps)


def _train(cfg: Config, device: torch.device, validate: bool, config_text: str, **steps: Any) -> IterBasedRunner:
    """Trains in a work dir that is ready; ``steps`` are arguments of the runner."""
    rank, world_size = get_dist_info()
    work_dir = steps['work_dir']
    logger = get_logger()

    resumed = _resumed_checkpoint(cfg, work_dir)
    seed = _choose_seed(cfg, resumed[1] if resumed else None)
    set_random_seed(seed + rank, cfg.get('deterministic', False))
    set_backends(cfg)

    dataset = build_dataset(cfg.data.train, where='data.train')
    model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.get('test_cfg'))
    check_classes(model, dataset, 'data.train')
    finetune = _initialise(model, cfg, resumed[1] if resumed else None)
    model.to(device)

    runner = IterBasedRunner(
        model=_distribute(model, device, cfg.get('find_unused_parameters', False)),
        optimizer=build_optimizer(model, cfg.optimizer),
        max_iters=cfg.runner.max_iters,
        device=device,
        frozen_eval=bool(finetune and finetune['frozen_eval']),
        meta={
            'config': config_text,
            'exp_name': Path(cfg.filename).stem if cfg.filename else None,
            'mmseg_version': __version__,
            'seed': seed,
            'frame_order': 'natural',
            'finetune': finetune,
            'CLASSES': list(dataset.CLASSES),
            'PALETTE': [list(map(int, colour)) for colour in dataset.PALETTE],
        },
        run_id=_run_id(resumed, work_dir),
        **steps,
    )
    _register_hooks(runner, cfg)
    if validate:
        _register_evaluation(runner, cfg)
    if resumed:
        runner.resume(resumed[1], resumed[0])
        if resumed[1]['meta'].get('frame_order') != 'natural' and any(
                order_changed(video.frames) for part in video_datasets(dataset) for video in part.videos):
            logger.warning(
                'the frames of this data set are in natural order now (frame_2 before frame_10), which they were not '
                'when the resumed run began: its clips are of other frames from here on')
        resumed[1].clear()

    data = {
        k: v for k, v in cfg.data.items()
        if k in ('samples_per_gpu', 'workers_per_gpu', 'pin_memory', 'stall_seconds')}  # fmt: skip
    data.setdefault('pin_memory', device.type == 'cuda')
    loader = build_train_loader(
        dataset, **data, seed=seed, rank=rank, world_size=world_size, start=runner.samples_done // world_size
    )
    _describe(runner, cfg, len(dataset))
    try:
        runner.run(loader)
    finally:
        loader.close()
    if runner.skipped:
        listed = ''.join(f'\n  {clip}' for clip in dict.fromkeys(runner.skipped))
        logger.warning('%d bad clips were skipped:%s', len(runner.skipped), listed)
    own = [path for path in checkpoint_files(work_dir) if run_of(path) == runner.run_id]
    if rank == 0 and own:
        logger.info('checkpoint: %s', own[0])
    return runner


def _check_plan(cfg: Config) -> None:
    """Refuses what the schema of mmcv 1.x allows and this loop does not do, and wrong keys of model and optimizer."""
    for key in ('data', 'model', 'optimizer', 'lr_config', 'runner', 'checkpoint_config'):
        if not cfg.get(key):
            raise ConfigError(f'{key}: missing in the config')
    for key in ('train', 'samples_per_gpu'):
        if key not in cfg.data:
            raise ConfigError(f'data.{key}: missing in the config')
    for key, least in (('samples_per_gpu', 1), ('workers_per_gpu', 0)):
        if cfg.data.get(key, least) < least:
            raise ConfigError(f'data.{key}: expected at least {least}, got {cfg.data[key]}')
    if cfg.runner.get('type', 'IterBasedRunner') != 'IterBasedRunner':
        raise ConfigError(f"runner.type: only 'IterBasedRunner' (training counts iterations), got '{cfg.runner.type}'")
    if cfg.runner.get('max_iters', 0) < 1:
        raise ConfigError(f'runner.max_iters: expected at least 1, got {cfg.runner.get("max_iters")}')
    workflow = [tuple(step) for step in cfg.get('workflow', [('train', 1)])]
    if workflow != [('train', 1)]:
        raise ConfigError(f"workflow: only [('train', 1)], got {workflow}; the evaluation section evaluates")
    for key in ('checkpoint_config', 'evaluation'):
        if cfg.get(key, {}).get('by_epoch', False):
            raise ConfigError(f'{key}.by_epoch: training counts iterations; set it to False')
    check_model(cfg)
    check_optimizer(cfg.optimizer)


_WRITTEN_BY_US = '# The config of a training as it ran: bases and overrides resolved.\n'


@contextlib.contextmanager
def _work_dir(cfg: Config, work_dir: Path, config_text: str) -> Iterator[str]:
    """Makes the folder and holds it; writes the final config; starts the log, whose timestamp is yielded."""
    timestamp, lock, failure = '', None, None
    try:
        if get_dist_info()[0] == 0:
            try:
                work_dir.mkdir(parents=True, exist_ok=True)
                lock = FolderLock(work_dir)
                remove_leftovers(work_dir)
                text = _WRITTEN_BY_US + config_text
                write_atomically(_config_file(cfg, work_dir, text), text, sync=False)
                timestamp = _new_timestamp(work_dir)
                (work_dir / f'{timestamp}.log').touch()
            except ConfigError as error:
                failure = str(error)
            except OSError as error:
                failure = f"--work-dir: cannot write to '{work_dir}': {describe(error)}"
        timestamp, failure = broadcast_object((timestamp, failure))
        if failure:
            raise ConfigError(failure)
        logger = setup_logger(work_dir / f'{timestamp}.log', cfg.get('log_level', 'INFO'))
        logger.info('config:\n%s', config_text)
        barrier()
        yield timestamp
    finally:
        if lock is not None:
            lock.release()


def _config_file(cfg: Config, work_dir: Path, text: str) -> Path:
    """Where the final config goes: under its own name, unless a file of the user's stands there."""
    path = work_dir / (Path(cfg.filename).name if cfg.filename else 'config.py')
    sources = [source.resolve() for source in config_files(cfg.filename)] if cfg.filename else []
    while path.exists() and path.read_bytes() != text.encode():
        if path.resolve() not in sources and path.read_bytes().startswith(_WRITTEN_BY_US.encode()):
            break
        path = path.with_name(f'{path.stem}_merged{path.suffix}')
    return path


def _new_timestamp(work_dir: Path) -> str:
    """The time, for the names of log files; with a number where a run began in the same second."""
    now = timestamp = time.strftime('%Y%m%d_%H%M%S')
    number = 1
    while (work_dir / f'{timestamp}.log').exists() or (work_dir / f'{timestamp}.log.json').exists():
        number += 1
        timestamp = f'{now}_{number}'
    return timestamp


def _run_id(resumed: tuple[Path, Mapping[str, Any]] | None, work_dir: Path) -> str | None:
    """The id of the resumed run where it goes on in its newest checkpoint, else a new one, the same on every rank.

    A run that is resumed from an earlier checkpoint than its newest begins to differ from what it was.
    """
    new: str = broadcast_object(uuid.uuid4().hex)
    if resumed is None:
        return new
    former = resumed[1]['meta'].get(RUN)
    later = [
        path for path in checkpoint_files(work_dir)
        if checkpoint_iteration(path) > resumed[1]['meta'].get('iter', 0) and run_of(path) == former
    ]  # fmt: skip
    return broadcast_object(former if not later else new)


def _resumed_checkpoint(cfg: Config, work_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the checkpoint to go on from, if any; the same one on every rank."""
    source = cfg.get('resume_from')
    if source == 'auto':
        source = work_dir if checkpoint_files(work_dir) else None
    if source is None:
        stale = checkpoint_files(work_dir)
        if stale:
            get_logger().warning(
                "'%s' holds checkpoints of an earlier run (%s); this run starts anew beside them. To go on from them: "
                '--resume-from auto',
                *(work_dir, stale[0].name),
            )
        return None
    return _open_on_all_ranks(source)


def _open_on_all_ranks(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """Rank 0 chooses the file, so that all ranks read the same one."""
    rank, _ = get_dist_info()
    path, content, failure = Path(source), None, None
    if rank == 0:
        try:
            path, content = open_checkpoint(source)
        except CheckpointError as error:
            failure = str(error)
    path, failure = broadcast_object((path, failure))
    if failure:
        raise CheckpointError(failure)
    return path, content if content is not None else read_checkpoint(path)


def _choose_seed(cfg: Config, resumed: Mapping[str, Any] | None) -> int:
    """The config's seed; else that of the resumed run, whose order of the data goes on; else a new one."""
    former = resumed['meta'].get('seed') if resumed else None
    seed = cfg.get('seed')
    if seed is not None and not 0 <= seed < _SEEDS:
        raise ConfigError(f'seed: expected 0 to {_SEEDS - 1}, got {seed}')
    if seed is None:
        seed = draw_seed() if former is None else former
    elif former is not None and former != seed:
        get_logger().warning('seed %s differs from %s of the resumed run: the data come in another order', seed, former)
    get_logger().info('seed: %d', seed)
    return seed


def _initialise(model: nn.Module, cfg: Config, resumed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Gives the model its start weights and freezes parts; returns what was frozen, for the checkpoints' ``meta``."""
    logger = get_logger()
    finetune_from, load_from = cfg.get('finetune_from'), cfg.get('load_from')
    config = FinetuneConfig.from_dict(cfg.get('finetune'))
    if resumed is not None:
        former = resumed['meta'].get('finetune')
        if finetune_from and not former:
            raise ConfigError('--finetune-from: the resumed run trained all parts; give one of the two options')
        if former:
            frozen, _ = freeze(model, former['train'])
            logger.info('resumed fine-tuning: %d parameters stay frozen', len(frozen))
        return former
    if finetune_from:
        if any('backbone' in pattern for pattern in config.fresh):
            model.init_weights()  # type: ignore[operator]
        path, checkpoint = _open_on_all_ranks(finetune_from)
        report = load_for_finetune(model, checkpoint['state_dict'], config)
        logger.info('fine-tuning from %s\n  %s', path, '\n  '.join(report.lines()))
        return {'train': list(config.train), 'frozen_eval': config.frozen_eval}
    warn_of_unused(cfg.get('finetune'))
    if load_from:
        path, checkpoint = _open_on_all_ranks(load_from)
        report = load_for_finetune(model, checkpoint['state_dict'], FinetuneConfig(train=('',)))
        logger.info('weights from %s\n  %s', path, '\n  '.join(report.lines()))
        lost = [name for name in (*report.missing, *report.mismatched) if name.startswith('backbone.')]
        if lost:
            raise CheckpointError(f"'{path}' is of another backbone: {len(lost)} tensors do not fit, such as {lost[0]}")
        return None
    model.init_weights()  # type: ignore[operator]
    return None


def _distribute(model: nn.Module, device: torch.device, find_unused_parameters: bool) -> nn.Module:
    """Wraps the model for several ranks; rank 0's weights go to all."""
    if get_dist_info()[1] == 1:
        return model
    if find_unused_parameters:
        get_logger().warning(
            'find_unused_parameters=True is honoured but costs time: every trainable parameter here gets a gradient'
        )
    # depthwise convolutions give channels-last gradients, whose layout differs in name only (one input channel)
    warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
    # buffers are constants; recent torch renamed the switch of their copy before each forward pass
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    constant_buffers: dict[str, Any] = {'forward_sync_buffers' if renamed else 'broadcast_buffers': False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == 'cuda' else None,
        **constant_buffers,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
    )


def _register_hooks(runner: IterBasedRunner, cfg: Config) -> None:
    saving = dict(cfg.checkpoint_config)
    runner.meta.update(saving.pop('meta', None) or {})
    if saving.pop('type', 'CheckpointHook') != 'CheckpointHook':
        raise ConfigError(
            f"checkpoint_config.type: only 'CheckpointHook', got '{cfg.checkpoint_config.type}'; other hooks go into "
            'custom_hooks'
        )
    saving = check_arguments(CheckpointHook, saving, 'checkpoint_config')
    if 'interval' not in saving:
        raise ConfigError('checkpoint_config.interval: missing')
    runner.register_hook(CheckpointHook(**saving), where='checkpoint_config')
    logs = cfg.get('log_config') or {}
    interval = {'interval': logs.get('interval', 50)}
    for i, entry in enumerate(logs.get('hooks', ())):
        where = f'log_config.hooks[{i}]'
        runner.register_hook(build(HOOKS, entry, where, **interval), where=where)
    if not any(isinstance(hook, JsonLoggerHook) for hook in runner.hooks):
        runner.register_hook(JsonLoggerHook(**interval))
    for i, entry in enumerate(cfg.get('custom_hooks') or ()):
        where = f'custom_hooks[{i}]'
        if not isinstance(entry, Mapping):
            runner.register_hook(entry, where=where)
            continue
        hook = build(HOOKS, {key: value for key, value in entry.items() if key != _PRIORITY}, where)
        runner.register_hook(hook, entry.get(_PRIORITY), where)


def _register_evaluation(runner: IterBasedRunner, cfg: Config) -> None:
    section = dict(cfg.get('evaluation') or {})
    options = {key: section[key] for key in ('interval', 'start', 'save_best', 'rule') if key in section}
    never = options.get('interval', 1) > runner.max_iters and options.get('start') is None
    if not section or never:
        runner.logger.info('no evaluation during training (evaluation.interval is beyond runner.max_iters)')
        return
    if not cfg.data.get('val'):
        raise ConfigError('data.val: missing, but the evaluation section asks for it; train with --no-validate')
    dataset = build_dataset(cfg.data.val, where='data.val')
    check_classes(runner.module, dataset, 'data.val')
    if not dataset.has_masks:
        raise DataError(
            f"data.val: split '{dataset.split}' of {dataset.data_root} has no masks to evaluate against; choose "
            'another split, or train with --no-validate')
    loader = build_test_loader(
        dataset, cfg.data.get('workers_per_gpu', 0), runner.rank, runner.world_size,
        cfg.data.get('stall_seconds', STALL_SECONDS))
    gather = gather_by(section.get('tmpdir'), section.get('gpu_collect', False), runner.device)
    names = section.get('metric', ())
    figures = metrics_for(dataset, names).results().summary  # a wrong name is known now, not at the first evaluation
    best = options.get('save_best')
    if isinstance(best, str) and best != 'auto' and best not in figures:
        raise ConfigError(f"evaluation.save_best: no figure '{best}'{nearest(best, figures)}")
    assert runner.precision is not None
    evaluation = runner.precision.evaluation

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        metrics = metrics_for(dataset, names)
        return run_test(
            model, dataset, loader, device=runner.device, metrics=metrics, gather=gather,
            autocast=lambda: evaluation(model), interruption=runner.interruption, interrupted_together=True)

    runner.register_hook(EvalHook(evaluate, **options), where='evaluation')


def _describe(runner: IterBasedRunner, cfg: Config, items: int) -> None:
    parameters = list(runner.module.parameters())
    runner.logger.info(
        'mmseg %s, Python %s, torch %s, %s, %d processes with %d threads; %d of %d parameters are trained; %d items, '
        'batch %d a process; iterations %d to %d; work dir %s',
        *(__version__, platform.python_version(), torch.__version__),
        torch.cuda.get_device_name(runner.device) if runner.device.type == 'cuda' else 'CPU',
        *(runner.world_size, torch.get_num_threads()),
        *(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)),
        *(items, cfg.data.samples_per_gpu, runner.iter + 1, runner.max_iters, runner.work_dir),
    )
