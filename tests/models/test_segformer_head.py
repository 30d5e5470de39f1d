"""SegFormer's head: a plain formulation, names of released weights, training, testing, several processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmseg.apis import init_segmentor
from mmseg.apis.test import run_test
from mmseg.apis.train import has_running_statistics, train_segmentor
from mmseg.config import load_config
from mmseg.datasets import build_dataset, build_test_loader
from mmseg.models import build_segmentor
from mmseg.models.decode_heads import SegformerHead
from mmseg.utils.errors import ConfigError
from tests.tiny import tiny_model
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, run_tool
from tests.vspw_fixture import write_vspw

CHANNELS = (8, 16, 20, 32)
SHAPE = {f'res{i + 2}': dict(channels=c, stride=4 * 2**i) for i, c in enumerate(CHANNELS)}


def maps(frames=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(frames, c, 16 >> i, 24 >> i, generator=generator) for i, c in enumerate(CHANNELS)]


def plain(features, state, training):
    """The head as SegFormer's paper draws it, with functions of torch and weights by their released names."""
    projected = []
    for i in (4, 3, 2, 1):
        x = features[i - 1]
        tokens = x.flatten(2).transpose(1, 2) @ state[f'linear_c{i}.proj.weight'].T + state[f'linear_c{i}.proj.bias']
        x = tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        projected.append(F.interpolate(x, features[0].shape[2:], mode='bilinear', align_corners=False))
    x = F.conv2d(torch.cat(projected, 1), state['linear_fuse.conv.weight'])
    norm = [state[f'linear_fuse.bn.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias')]
    x = F.relu(F.batch_norm(x, *(n.clone() if i < 2 else n for i, n in enumerate(norm)), training=training))
    return F.conv2d(x, state['linear_pred.weight'], state['linear_pred.bias'])


@pytest.mark.parametrize('training', [False, True])
def test_equals_the_plain_formulation(training):
    head = SegformerHead(7, 12, dropout_ratio=0.0, input_shape=SHAPE).train(training)
    torch.nn.init.normal_(head.linear_pred.weight)
    labels = torch.randint(0, 7, (1, 2, 50, 70), generator=torch.Generator().manual_seed(1))
    labels[0, 0, :9], labels[0, 1, :, :5] = 255, 254
    expected = plain(maps(), head.state_dict(), training)
    torch.testing.assert_close(head.encode(maps()), expected, rtol=1e-5, atol=1e-5)
    resized = F.interpolate(expected, (50, 70), mode='bilinear', align_corners=False).movedim(1, -1)
    known = labels[0] < 254
    loss = F.cross_entropy(resized[known], labels[0][known])
    torch.testing.assert_close(head.loss(maps(), labels)['decode.loss_ce'], loss, rtol=1e-5, atol=1e-6)
    right, number = head.statistics()['acc_seg'].tolist()
    assert number == known.sum() and right == (resized[known].argmax(-1) == labels[0][known]).sum()


def test_names_are_those_of_released_checkpoints():
    """Those of segformer.b1.512x512.ade.160k.pth, without and with its unused conv_seg."""
    layers = [f'linear_c{i}.proj' for i in (1, 2, 3, 4)]
    names = {f'{layer}.{kind}' for layer in [*layers, 'linear_fuse.bn', 'linear_pred'] for kind in ('weight', 'bias')}
    names |= {f'linear_fuse.bn.{kind}' for kind in ('running_mean', 'running_var', 'num_batches_tracked')}
    head = SegformerHead(150, 256, input_shape=SHAPE)
    assert head.state_dict().keys() == names | {'linear_fuse.conv.weight'}
    unused = {'conv_seg.weight': torch.zeros(150, 128, 1, 1), 'conv_seg.bias': torch.zeros(150)}
    head.load_state_dict({**head.state_dict(), **unused})


def test_classes_may_weigh_differently_and_all_void_gives_zero():
    weighed = SegformerHead(3, 12, 0.0, SHAPE, class_weight=[1, 0, 2])
    assert 'class_weight' not in weighed.state_dict()
    labels = torch.full((1, 2, 20, 20), 1)
    assert weighed.loss(maps(), labels)['decode.loss_ce'] == 0
    loss = weighed.loss(maps(), torch.full_like(labels, 255))['decode.loss_ce']
    loss.backward()
    assert loss == 0 and torch.isfinite(weighed.linear_pred.weight.grad).all()
    wrong = dict(type='SegformerHead', num_classes=5, class_weight=[1])
    with pytest.raises(ConfigError, match=r'model.decode_head: SegformerHead: class_weight: expected 5 numbers, got 1'):
        build_segmentor({**tiny_model('1f'), 'decode_head': wrong})


def test_it_trains_is_tested_and_old_configs_build(tmp_path):
    root = write_vspw(tmp_path / 'vspw')
    head = dict(
        _delete_=True, type='SegFormerHead', num_classes=124, in_channels=list(CHANNELS), channels=128, embed_dim=12,
        feature_strides=[4, 8, 16, 32], norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=False)
    cfg = load_config(write_tiny_config(tmp_path / 'c.py', root, iters=3, extra=f"model['decode_head'] = {head}"))
    cfg.work_dir = str(tmp_path / 'w')
    train_segmentor(cfg, validate=False)
    model = init_segmentor(cfg, tmp_path / 'w')
    data = build_dataset(cfg.data.test, 'data.test')
    assert 0 <= run_test(model, data, build_test_loader(data, 0), progress=False)['mIoU'] <= 1
    assert has_running_statistics(model) and 'acc_seg' in next((tmp_path / 'w').glob('*.log.json')).read_text()


@pytest.mark.parametrize('config', sorted((ROOT / 'local_configs/baselines').glob('*.py')), ids=lambda path: path.stem)
def test_the_configs_of_baselines_build(config):
    cfg = load_config(config)
    with torch.device('meta'):
        model = build_segmentor(cfg.model)
    assert model.num_classes == cfg.model.decode_head.num_classes
    frames = len(cfg.data.train.dataset.dilation) + (0 not in cfg.data.train.dataset.dilation)
    assert cfg.data.test.test_size == frames == (2 if 'clips' in config.stem else 1)


@pytest.mark.slow
def test_two_processes_share_the_statistics_of_norms(tmp_path):
    """An evaluation over two ranks gives what a test of the saved checkpoint by one gives."""
    import json

    root = write_vspw(tmp_path / 'vspw')
    head = dict(_delete_=True, type='SegformerHead', num_classes=124, embed_dim=12)
    config = write_tiny_config(tmp_path / 'c.py', root, iters=4, extra=(
        f"model['decode_head'] = {head}\nevaluation = dict(interval=4, metric='mIoU')"))
    done = run_tool('train', config, '--work-dir', tmp_path / 'w', '--gpus', '2')
    assert done.returncode == 0, done.stderr
    log = next((tmp_path / 'w').glob('*.log.json')).read_text().splitlines()
    in_training = next(record for record in map(json.loads, log) if record.get('mode') == 'val')
    done = run_tool('test', config, tmp_path / 'w', '--work-dir', tmp_path / 't')
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / 't/metrics.json').read_text())
    assert in_training['aAcc'] == pytest.approx(alone['aAcc'], abs=1e-9)
