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
from mmseg.config import (
    DataConfig,
    LogConfig,
    MetricsConfig,
    RunnerConfig,
    TopLevel,
    as_text,
    config_files,
    readers_of,
    required,
    top_level,
)
from mmseg.core.finetune import FinetuneConfig, freeze, freeze_named, load_for_finetune, warn_of_unused
from mmseg.core.hooks import CheckpointHook, EvalHook, JsonLoggerHook
from mmseg.core.lr_schedule import LrSchedule
from mmseg.core.optimizer import build_optimizer
from mmseg.core.precision import Precision, set_backends
from mmseg.core.runner import IterBasedRunner, UpdateConfig
from mmseg.datasets import build_dataset, build_test_loader, build_train_loader
from mmseg.datasets.dataset_wrappers import video_datasets
from mmseg.models import build_segmentor
from mmseg.registry import HOOKS, build, check
from mmseg.utils.checkpoint import (
    RUN,
    checkpoint_files,
    checkpoint_iteration,
    open_checkpoint,
    read_checkpoint,
    remove_leftovers,
    run_of,
)
from mmseg.utils.dist import barrier, broadcast_buffers, describe, get_dist_info, on_rank_0
from mmseg.utils.errors import CheckpointError, ConfigError, DataError, nearest
from mmseg.utils.files import write_atomically
from mmseg.utils.lock import FolderLock
from mmseg.utils.logger import get_logger, setup_logger
from mmseg.utils.names import order_changed, some
from mmseg.utils.seed import draw_seed, set_random_seed
from mmseg.version import __version__


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
    for key in ('data', 'model', 'optimizer', 'lr_config', 'runner', 'checkpoint_config', 'work_dir'):
        required(cfg, key)
    top, data, config_text = top_level(cfg), build(DataConfig, cfg.data, 'data'), as_text(cfg)
    max_iters = build(RunnerConfig, cfg.runner, 'runner').max_iters
    steps = {
        'max_iters': max_iters,
        'schedule': build(LrSchedule, cfg.lr_config, 'lr_config', max_iters),
        'update': build(UpdateConfig, cfg.get('optimizer_config'), 'optimizer_config'),
        'precision': Precision.from_config(cfg, device),
        'nan_loss': top.nan_loss,
    }
    check_model(cfg)
    check(cfg.optimizer, 'optimizer', *readers_of('optimizer'))
    with _work_dir(cfg, top, config_text) as (work_dir, timestamp):
        return _train(cfg, top, data, device, validate, config_text, work_dir=work_dir, timestamp=timestamp, **steps)


def _train(
    cfg: Config, top: TopLevel, data: DataConfig, device: torch.device, validate: bool, config_text: str, **steps: Any
) -> IterBasedRunner:
    """Trains in a work dir that is ready; ``steps`` are arguments of the runner."""
    rank, world_size = get_dist_info()
    work_dir = steps['work_dir']
    logger = get_logger()

    source, checkpoint = _resumed_checkpoint(top.resume_from, work_dir)
    seed = _choose_seed(top.seed, checkpoint)
    set_random_seed(seed + rank, top.deterministic)
    set_backends(cfg)

    dataset = build_dataset(data.train, where='data.train')
    model = build_segmentor(cfg.model, top.train_cfg, top.test_cfg)
    check_classes(model, dataset, 'data.train')
    for part in video_datasets(dataset):
        if part.short_videos:
            logger.info("split '%s': %d videos are left out, too short for a clip or without labels: %s", part.split,
                        len(part.short_videos), some(part.short_videos))
    finetune = _initialise(model, top, cfg.get('finetune'), checkpoint)
    frozen = freeze_named(model, top.freeze)
    if frozen:
        logger.info('freeze: %d parameters are not trained', len(frozen))
    model.to(device)

    runner = IterBasedRunner(
        model=_distribute(model, device, top.find_unused_parameters),
        optimizer=build_optimizer(model, cfg.optimizer),
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
        run_id=_run_id(checkpoint, work_dir),
        **steps,
    )
    _register_hooks(runner, cfg)
    if validate:
        _register_evaluation(runner, cfg.get('evaluation'), data)
    if checkpoint is not None:
        runner.resume(checkpoint, source)
        if checkpoint['meta'].get('frame_order') != 'natural' and any(
                order_changed(video.frames) for part in video_datasets(dataset) for video in part.videos):
            logger.warning(
                'the frames of this data set are in natural order now (frame_2 before frame_10), which they were not '
                'when the resumed run began: its clips are of other frames from here on')
        checkpoint.clear()

    loader = build_train_loader(
        dataset, data.samples_per_gpu, data.workers_per_gpu, seed, rank, world_size, runner.samples_done // world_size,
        device.type == 'cuda' if data.pin_memory is None else data.pin_memory, data.stall_seconds)
    _describe(runner, data.samples_per_gpu, len(dataset))
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


_WRITTEN_BY_US = '# The config of a training as it ran: bases and overrides resolved.\n'


@contextlib.contextmanager
def _work_dir(cfg: Config, top: TopLevel, config_text: str) -> Iterator[tuple[Path, str]]:
    """Makes the folder and holds it; writes the final config; starts the log, whose timestamp is yielded as well."""
    work_dir = Path(cfg.work_dir)
    locks = contextlib.ExitStack()

    def prepare() -> str:
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            locks.callback(FolderLock(work_dir).release)
            remove_leftovers(work_dir)
            text = _WRITTEN_BY_US + config_text
            write_atomically(_config_file(cfg, work_dir, text), text, sync=False)
            timestamp = _new_timestamp(work_dir)
            (work_dir / f'{timestamp}.log').touch()
        except OSError as error:
            raise ConfigError(f"--work-dir: cannot write to '{work_dir}': {describe(error)}") from None
        return timestamp

    with locks:
        timestamp = on_rank_0(prepare)
        logger = setup_logger(work_dir / f'{timestamp}.log', top.log_level)
        logger.info('config:\n%s', config_text)
        barrier()
        yield work_dir, timestamp


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


def _run_id(resumed: Mapping[str, Any] | None, work_dir: Path) -> str | None:
    """The id of the resumed run where it goes on in its newest checkpoint, else a new one, the same on every rank.

    A run that is resumed from an earlier checkpoint than its newest begins to differ from what it was.
    """

    def choose() -> str | None:
        if resumed is not None:
            former, done = resumed['meta'].get(RUN), resumed['meta'].get('iter', 0)
            later = (path for path in checkpoint_files(work_dir) if checkpoint_iteration(path) > done)
            if not any(run_of(path) == former for path in later):
                return former
        return uuid.uuid4().hex

    return on_rank_0(choose)


def _resumed_checkpoint(source: str | None, work_dir: Path) -> tuple[str | Path, dict[str, Any] | None]:
    """Path and content of the checkpoint to go on from, if any; the same one on every rank."""
    there = checkpoint_files(work_dir)
    if source == 'auto':
        source = str(work_dir) if there else None
    elif source is None and there:
        get_logger().warning(
            "'%s' holds checkpoints of an earlier run (%s); this run starts anew beside them. To go on from them: "
            '--resume-from auto',
            *(work_dir, there[0].name),
        )
    return ('', None) if source is None else _open_on_all_ranks(source)


def _open_on_all_ranks(source: str) -> tuple[Path, dict[str, Any]]:
    """Rank 0 chooses the file, so that all ranks read the same one."""
    content = None

    def choose() -> Path:
        nonlocal content
        path, content = open_checkpoint(source)
        return path

    path = on_rank_0(choose)
    return path, content if content is not None else read_checkpoint(path)


def _choose_seed(seed: int | None, resumed: Mapping[str, Any] | None) -> int:
    """The config's seed; else that of the resumed run, whose order of the data goes on; else a new one."""
    former = resumed['meta'].get('seed') if resumed else None
    if seed is None:
        seed = draw_seed() if former is None else former
    elif former is not None and former != seed:
        get_logger().warning('seed %s differs from %s of the resumed run: the data come in another order', seed, former)
    get_logger().info('seed: %d', seed)
    return seed


def _initialise(
    model: nn.Module, top: TopLevel, section: Mapping[str, Any] | None, resumed: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Gives the model its start weights and freezes parts; returns what was frozen, for the checkpoints' ``meta``."""
    logger = get_logger()
    if resumed is not None:
        former = resumed['meta'].get('finetune')
        if top.finetune_from and not former:
            raise ConfigError('--finetune-from: the resumed run trained all parts; give one of the two options')
        if former:
            frozen, _ = freeze(model, former['train'])
            logger.info('resumed fine-tuning: %d parameters stay frozen', len(frozen))
        return former
    start = FinetuneConfig(train='', fresh=top.load_from_fresh)
    config = build(FinetuneConfig, section, 'finetune') if top.finetune_from else start
    if not top.finetune_from:
        warn_of_unused(section)
    source = top.finetune_from or top.load_from
    if not source or any('backbone' in pattern for pattern in config.fresh):
        model.init_weights()  # type: ignore[operator]
    if not source:
        return None
    path, checkpoint = _open_on_all_ranks(source)
    report = load_for_finetune(model, checkpoint['state_dict'], config)
    what = 'fine-tuning' if top.finetune_from else 'weights'
    logger.info('%s from %s\n  %s', what, path, '\n  '.join(report.lines()))
    if top.finetune_from:
        return {'train': list(config.train), 'frozen_eval': config.frozen_eval}
    lost = report.lost(report.trained)
    if lost:
        raise CheckpointError(
            f"'{path}' is of another model: {len(lost)} tensors do not fit: {some(lost)}; parts that may keep their "
            "start values are named in load_from_fresh, as load_from_fresh=['class_embed']")
    return None


def has_running_statistics(model: nn.Module) -> bool:
    """Whether batch norms learn statistics, which ranks must share."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) and (
        layer.weight is None or layer.weight.requires_grad) for layer in model.modules())


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
    # statistics of batch norms are shared, other buffers are constants; recent torch renamed the switch
    shared = has_running_statistics(model)
    if shared and device.type == 'cuda':
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    shared_buffers: dict[str, Any] = {'forward_sync_buffers' if renamed else 'broadcast_buffers': shared}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == 'cuda' else None,
        **shared_buffers,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
    )


def _register_hooks(runner: IterBasedRunner, cfg: Config) -> None:
    runner.register_hook(build(CheckpointHook, cfg.checkpoint_config, 'checkpoint_config'), where='checkpoint_config')
    logs = build(LogConfig, cfg.get('log_config'), 'log_config')
    interval = {'interval': logs.interval}
    hooks = [(entry, f'log_config.hooks[{i}]', interval) for i, entry in enumerate(logs.hooks or ())]
    hooks += [(entry, f'custom_hooks[{i}]', {}) for i, entry in enumerate(cfg.get('custom_hooks') or ())]
    for entry, where, defaults in hooks:
        arguments = {key: value for key, value in entry.items() if key != 'priority'}
        runner.register_hook(build(HOOKS, arguments, where, **defaults), entry.get('priority'), where)
    if not any(isinstance(hook, JsonLoggerHook) for hook in runner.hooks):
        runner.register_hook(JsonLoggerHook(**interval))


def _register_evaluation(runner: IterBasedRunner, section: Mapping[str, Any] | None, data: DataConfig) -> None:
    (_, options), (_, counting) = check(section or {}, 'evaluation', *readers_of('evaluation'))
    never = options.get('interval', 1) > runner.max_iters and options.get('start') is None
    if not section or never:
        runner.logger.info('no evaluation during training (evaluation.interval is beyond runner.max_iters)')
        return
    if not data.val:
        raise ConfigError('data.val: missing, but the evaluation section asks for it; train with --no-validate')
    dataset = build_dataset(data.val, where='data.val')
    check_classes(runner.module, dataset, 'data.val')
    if not dataset.has_masks:
        raise DataError(
            f"data.val: split '{dataset.split}' of {dataset.data_root} has no masks to evaluate against; choose "
            'another split, or train with --no-validate')
    loader = build_test_loader(dataset, data.workers_per_gpu, runner.rank, runner.world_size, data.stall_seconds)
    config = MetricsConfig(**counting)
    gather = gather_by(config.tmpdir, config.gpu_collect, runner.device)
    figures = metrics_for(dataset, config.metric).results().summary  # a wrong name is known before the first evaluation
    best = options.get('save_best')
    if isinstance(best, str) and best != 'auto' and best not in figures:
        raise ConfigError(f"evaluation.save_best: no figure '{best}'{nearest(best, figures)}")
    evaluation = runner.precision.evaluation

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        if runner.world_size > 1 and has_running_statistics(model):
            broadcast_buffers(model)
        return run_test(
            model, dataset, loader, device=runner.device, metrics=metrics_for(dataset, config.metric),
            autocast=lambda: evaluation(model), gather=gather, interruption=runner.interruption,
            interrupted_together=True)

    runner.register_hook(EvalHook(evaluate, **options), where='evaluation')


def _describe(runner: IterBasedRunner, batch: int, items: int) -> None:
    parameters = list(runner.module.parameters())
    runner.logger.info(
        'mmseg %s, Python %s, torch %s, %s, %d processes with %d threads; %d of %d parameters are trained; %d items, '
        'batch %d a process; iterations %d to %d; work dir %s',
        *(__version__, platform.python_version(), torch.__version__),
        torch.cuda.get_device_name(runner.device) if runner.device.type == 'cuda' else 'CPU',
        *(runner.world_size, torch.get_num_threads()),
        *(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)),
        *(items, batch, runner.iter + 1, runner.max_iters, runner.work_dir),
    )
