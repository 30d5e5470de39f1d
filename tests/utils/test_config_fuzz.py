"""Whatever a config or ``--options`` says, building from it works or ends with one line."""

from __future__ import annotations

import contextlib
import os
import random
import warnings

import pytest
import torch

from mmseg.apis.test import check_model
from mmseg.apis.train import _check_plan
from mmseg.config import load_config
from mmseg.core.finetune import FinetuneConfig
from mmseg.core.hooks import CheckpointHook, EvalHook
from mmseg.core.lr_schedule import LrSchedule
from mmseg.core.optimizer import build_optimizer
from mmseg.core.precision import Precision, set_backends
from mmseg.core.runner import UpdateConfig
from mmseg.datasets import build_dataset, build_test_loader, build_train_loader
from mmseg.models import build_segmentor
from mmseg.registry import HOOKS, build, check_arguments
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
    _check_plan(cfg)
    check_model(cfg)
    LrSchedule(cfg.runner.max_iters, **check_arguments(LrSchedule, cfg.lr_config, 'lr_config'))(1e-3, 1)
    UpdateConfig.from_config(cfg.get('optimizer_config'), cfg.get('nan_loss', 'stop'))
    Precision.from_config(cfg, torch.device('cpu'))
    FinetuneConfig.from_dict(cfg.get('finetune'))
    set_backends(cfg)
    with torch.device('meta'):
        model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.get('test_cfg'))
    build_optimizer(model, cfg.optimizer)
    saving = {k: v for k, v in cfg.checkpoint_config.items() if k not in ('type', 'meta')}
    with contextlib.suppress(TypeError):  # interval is missing
        CheckpointHook(**check_arguments(CheckpointHook, saving, 'checkpoint_config'))
    section = cfg.get('evaluation') or {}
    EvalHook(dict, **{key: section[key] for key in ('interval', 'start', 'save_best', 'rule') if key in section})
    for hook in (cfg.get('log_config') or {}).get('hooks', []):
        build(HOOKS, hook, 'log_config.hooks', interval=10)
    for hook in cfg.get('custom_hooks') or []:
        build(HOOKS, {key: value for key, value in hook.items() if key != 'priority'}, 'custom_hooks')
    train = build_dataset(cfg.data.train, where='data.train')
    build_train_loader(train, cfg.data.samples_per_gpu, cfg.data.get('workers_per_gpu', 0)).close()
    for split in ('val', 'test'):
        build_test_loader(build_dataset(cfg.data[split], where=f'data.{split}'))


def check(config, seed):
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
        check(config, seed)


@pytest.mark.slow
def test_thousands_of_random_overrides_work_or_are_refused(config):
    for seed in range(100, 100 + int(os.environ.get('THEMASK_FUZZ', '2500'))):
        check(config, seed)
