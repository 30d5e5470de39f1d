"""Whatever a config or ``--options`` says, building from it works or ends with one line."""

from __future__ import annotations

import os
import random
import warnings

import pytest
import torch

from mmseg.apis.test import check_model
from mmseg.config import DataConfig, LogConfig, RunnerConfig, load_config, readers_of, required, top_level
from mmseg.core.finetune import FinetuneConfig
from mmseg.core.hooks import CheckpointHook, EvalHook
from mmseg.core.lr_schedule import LrSchedule
from mmseg.core.optimizer import build_optimizer
from mmseg.core.precision import Precision, set_backends
from mmseg.core.runner import UpdateConfig
from mmseg.datasets import build_dataset, build_test_loader, build_train_loader
from mmseg.models import build_segmentor
from mmseg.registry import HOOKS, build, check
from mmseg.utils.errors import ConfigError, DataError
from tests.fuzz import random_overrides
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw

EXTRA = """
    fp16 = dict(dtype='bfloat16', loss_scale=512.0)
    finetune = dict(train=['predictor'], fresh='x', copy=dict(a=['b', 'c']))
    custom_hooks = [dict(type='EMAHook', priority='NORMAL')]
    dist_params = dict(backend='gloo', port=29500)
    evaluation = dict(interval=2, metric=['mIoU'], save_best='mIoU', rule='greater', start=1)
    lr_config = dict(warmup='linear', warmup_iters=2, warmup_ratio=0.1)
    optimizer = dict(betas=(0.9, 0.999), eps=1e-8)
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    return write_tiny_config(folder / 'tiny.py', write_vspw(folder / 'data'), base='video_themask_mit_b0', extra=EXTRA)


def build_everything(path, options):
    """What a training builds before its first iteration, without the memory of the model."""
    cfg = load_config(path, options)
    top = top_level(cfg)
    check_model(cfg)
    max_iters = build(RunnerConfig, cfg.get('runner'), 'runner').max_iters
    build(LrSchedule, cfg.get('lr_config'), 'lr_config', max_iters)(1e-3, 1)
    build(UpdateConfig, cfg.get('optimizer_config'), 'optimizer_config')
    Precision.from_config(cfg, torch.device('cpu'))
    build(FinetuneConfig, cfg.get('finetune'), 'finetune')
    set_backends(cfg)
    with torch.device('meta'):
        model = build_segmentor(cfg.model, top.train_cfg, top.test_cfg)
    build_optimizer(model, required(cfg, 'optimizer'))
    build(CheckpointHook, cfg.get('checkpoint_config'), 'checkpoint_config')
    EvalHook(dict, **check(cfg.get('evaluation') or {}, 'evaluation', *readers_of('evaluation'))[0][1])
    for hook in build(LogConfig, cfg.get('log_config'), 'log_config').hooks or ():
        build(HOOKS, hook, 'log_config.hooks', interval=10)
    for hook in top.custom_hooks or ():
        build(HOOKS, {key: value for key, value in hook.items() if key != 'priority'}, 'custom_hooks')
    data = build(DataConfig, cfg.get('data'), 'data')
    train = build_dataset(data.train, where='data.train')
    build_train_loader(train, data.samples_per_gpu, data.workers_per_gpu, stall_seconds=data.stall_seconds).close()
    for part in (data.val, data.test):
        if part is not None:
            build_test_loader(build_dataset(part, where='data'))


def build_at_random(config, seed):
    base = load_config(config)
    options = random_overrides(base, random.Random(seed))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            build_everything(config, options)
        except (ConfigError, DataError) as error:
            assert len(str(error)) < 2000
        except BaseException as error:
            raise AssertionError(f'seed {seed}: {options}') from error


def test_random_overrides_work_or_are_refused(config):
    for seed in range(8):
        build_at_random(config, seed)


@pytest.mark.slow
def test_thousands_of_random_overrides_work_or_are_refused(config):
    for seed in range(100, 100 + int(os.environ.get('THEMASK_FUZZ', '2500'))):
        build_at_random(config, seed)
