"""Optimizer groups, learning rate, precision: the reference's numbers, mmcv's forms, errors that name the key."""

import copy
import logging
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from torch import nn

from mmseg.core import FinetuneConfig, LrSchedule, Precision, build_optimizer, load_for_finetune
from mmseg.core.optimizer import load_optimizer_state
from mmseg.core.precision import set_backends
from mmseg.models import build_segmentor
from mmseg.registry import build
from mmseg.utils.errors import CheckpointError, ConfigError
from tests.engine import OPTIMIZER, Model, batch

DEAD = ('conv_seg', 'reference_points')


def segmentor(stage):
    cfg = Config.fromfile(f'local_configs/themask/{stage}_themask_mit_b0.py')
    cfg.model.pretrained = None
    return build_segmentor(cfg.model), cfg


def by_name(optimizer):
    return {
        name: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for name in group['param_names']
    }


@pytest.mark.parametrize('stage', ['1f', 'video'])
def test_rate_and_decay_of_every_parameter_equal_the_reference(reference, stage):
    model, cfg = segmentor(stage)
    recorded = reference('optimizer.json')[stage]
    optimizer = build_optimizer(model, cfg.optimizer)
    expected = {
        group['name']: (group['lr'], group['weight_decay'])
        for group in recorded['groups']
        if not any(part in group['name'] for part in DEAD)
    }
    assert by_name(optimizer) == expected
    assert list(optimizer.param_groups[0]['betas']) == recorded['betas']
    assert optimizer.param_groups[0]['eps'] == recorded['eps']
    assert len(optimizer.param_groups) == 3, 'parameters with equal settings must share a group'

    trainable = set(reference(f'keys_{stage}_b0.json')['finetune_trainable'])
    load_for_finetune(model, model.state_dict(), FinetuneConfig())
    assert by_name(build_optimizer(model, cfg.optimizer)) == {
        name: values for name, values in expected.items() if name in trainable}


def test_the_longest_matching_key_wins():
    model = nn.ModuleDict({'head': nn.ModuleDict({'norm_out': nn.Linear(2, 2), 'other': nn.Linear(2, 2)})})
    keys = {'head': dict(lr_mult=0.5), 'norm_out': dict(lr_mult=3.0), 'out': dict(lr_mult=7.0)}
    cfg = dict(type='SGD', lr=1.0, paramwise_cfg=dict(custom_keys=keys))
    rates = {name: lr for name, (lr, _) in by_name(build_optimizer(model, cfg)).items()}
    assert rates == {
        'head.norm_out.weight': 3.0, 'head.norm_out.bias': 3.0, 'head.other.weight': 0.5, 'head.other.bias': 0.5}


def test_poly_equals_the_reference(reference):
    for key, expected in reference('optimizer.json')['poly'].items():
        max_iters, base_lr, iteration = key.split('/')
        schedule = LrSchedule(int(max_iters), policy='poly', power=0.9, min_lr=0.0, warmup_iters=0)
        assert schedule(float(base_lr), int(iteration)) == pytest.approx(expected, rel=1e-12)


@given(st.floats(1e-6, 1), st.integers(0, 999), st.sampled_from(['constant', 'linear', 'exp']), st.floats(0.01, 1))
def test_warm_up_starts_at_its_ratio_and_ends_in_the_regular_rate(base, iteration, warmup, ratio):
    plain = LrSchedule(1000, power=0.9, min_lr=1e-7)
    warm = LrSchedule(1000, power=0.9, min_lr=1e-7, warmup=warmup, warmup_iters=100, warmup_ratio=ratio)
    assert warm(base, 0) == pytest.approx(plain(base, 0) * ratio)
    assert warm(base, 99) <= plain(base, 99) * (1 + 1e-12)
    assert warm(base, max(iteration, 100)) == plain(base, max(iteration, 100))
    assert plain(base, 1000) == 1e-7


def by_mmcv(policy, lr, i, total, **o):
    """The formulas as mmcv's documentation has them, each written out by itself."""
    def cosine(start, end, share, weight=1.0):
        return end + weight * (start - end) * (1 + np.cos(np.pi * share)) / 2

    if policy == 'step':
        falls = i // o['step'] if isinstance(o['step'], int) else sum(i >= at for at in o['step'])
        return max(lr * o.get('gamma', 0.1) ** falls, o.get('min_lr', 0))
    if policy == 'exp':
        return lr * o['gamma'] ** i
    if policy == 'CosineAnnealing':
        return cosine(lr, o['min_lr'] if 'min_lr' in o else lr * o['min_lr_ratio'], i / total)
    if policy == 'CosineRestart':
        begin = 0
        for period, weight in zip(o['periods'], o['restart_weights']):
            if i < begin + period:
                return cosine(lr, lr * o['min_lr_ratio'], (i - begin) / period, weight)
            begin += period
    initial, part = o['max_lr'] / 25, 0.3 * total
    low = initial / 1e4
    shape = cosine if o.get('anneal_strategy', 'cos') == 'cos' else lambda a, b, share: a + (b - a) * share
    if i <= part - 1:
        return shape(initial, o['max_lr'], i / (part - 1))
    if not o.get('three_phase'):
        return shape(o['max_lr'], low, (i - part + 1) / (total - part))
    if i <= 2 * part - 2:
        return shape(o['max_lr'], initial, (i - part + 1) / (part - 1))
    return shape(initial, low, (i - 2 * part + 2) / (total + 1 - 2 * part))


@pytest.mark.parametrize('policy, options', [
    ('step', dict(step=30)), ('step', dict(step=[20, 70], gamma=0.3, min_lr=1e-4)), ('exp', dict(gamma=0.97)),
    ('CosineAnnealing', dict(min_lr=1e-5)), ('CosineAnnealing', dict(min_lr_ratio=0.01)),
    ('CosineRestart', dict(periods=[20, 50, 30], restart_weights=[1, 0.5, 0.25], min_lr_ratio=0.1)),
    ('OneCycle', dict(max_lr=1e-2)), ('OneCycle', dict(max_lr=1e-2, anneal_strategy='linear')),
    ('OneCycle', dict(max_lr=1e-2, three_phase=True)),
])
@pytest.mark.parametrize('warmup', [None, 'constant', 'linear', 'exp'])
def test_policies_equal_mmcv_s_formulas_at_every_iteration(policy, options, warmup):
    """A pure function of the iteration, so that a resumed run has the rates of an undisturbed one."""
    rise = {} if warmup is None else dict(warmup=warmup, warmup_iters=10, warmup_ratio=0.2)
    schedule = build(LrSchedule, dict(policy=policy, **options, **rise), 'lr_config', 100)
    shares = {None: lambda i: 1, 'constant': lambda i: 0.2, 'linear': lambda i: 0.2 + 0.8 * i / 10,
              'exp': lambda i: 0.2 ** (1 - i / 10)}
    for i in range(100):
        share = shares[warmup](i) if i < 10 else 1
        assert schedule(1e-2, i) == pytest.approx(share * by_mmcv(policy, 1e-2, i, 100, **options), rel=1e-9), i


def test_one_cycle_keeps_the_ratio_of_groups():
    optimizer = build_optimizer(Model(), OPTIMIZER)
    build(LrSchedule, dict(policy='OneCycle', max_lr=0.5), 'lr_config', 10).apply(optimizer, 2)
    assert {round(group['lr'], 9) for group in optimizer.param_groups} == {0.5, 0.05}


@pytest.mark.parametrize('options, message', [
    (dict(policy='step'), r"lr_config.step: missing for policy 'step'"),
    (dict(policy='CosineAnnealing'), 'expected min_lr or min_lr_ratio, one of them'),
    (dict(policy='CosineRestart', periods=[4, 5], min_lr=0), 'are 9 iterations together, but the training has 10'),
    (dict(policy='CosineRestart', periods=[10], restart_weights=[1, 1], min_lr=0), 'expected one for each of 1'),
    (dict(policy='OneCycle', max_lr=1, total_steps=9), 'the cycle is 9 iterations, but the training has 10'),
    (dict(policy='exp', gamma=0), 'lr_config.gamma: expected float, above 0'),
])
def test_wrong_arguments_of_a_policy_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(LrSchedule, options, 'lr_config', 10)


def test_arguments_of_a_base_s_policy_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger='mmseg'):
        logging.getLogger('mmseg').propagate = True
        assert build(LrSchedule, dict(policy='fixed', power=2), 'lr_config', 10)(0.5, 9) == 0.5
    assert "lr_config.power: has no effect with policy 'fixed', whose arguments are: none" in caplog.text


def test_rates_of_all_groups_follow_the_iteration_only():
    optimizer = build_optimizer(Model(), OPTIMIZER)
    schedule = LrSchedule(100, power=0.9)
    for iteration in (0, 70, 20):
        schedule.apply(optimizer, iteration)
        assert {group['lr'] for group in optimizer.param_groups} == {
            schedule(1e-2, iteration), schedule(1e-3, iteration)}


@pytest.mark.parametrize('change, message', [
    (dict(type='AdamV'), "optimizer.type: unknown optimizer 'AdamV' .did you mean 'Adam"),
    (dict(type='Rprop', weight_decay=0.1), "optimizer.weight_decay: Rprop takes no"),
    (dict(weight_decai=0.1), "'weight_decai' .did you mean 'weight_decay'"),
    (dict(lr=None), "optimizer: .*missing a required argument: 'lr'"),
    (dict(paramwise_cfg=dict(custom_key={})), 'paramwise_cfg.custom_key'),
    (dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(decay=0)))), 'custom_keys.norm.decay.*decay_mult'),
])
def test_wrong_settings_are_named(change, message):
    cfg = {key: value for key, value in (OPTIMIZER | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        build_optimizer(Model(), cfg)


@pytest.mark.parametrize('options', [
    dict(policy='steps'), dict(warmup='cubic', warmup_iters=3), dict(by_epoch=True), dict(warmup_by_epoch=True)])
def test_unknown_policies_are_refused(options):
    with pytest.raises(ConfigError, match=f'lr_config.{next(iter(options))}: '):
        build(LrSchedule, options, 'lr_config', 10)


def trained(model, cfg, steps=3):
    optimizer = build_optimizer(model, cfg)
    for position in range(steps):
        data = batch(position)
        model.eval()(data['img'], data['gt_semantic_seg'])['decode.loss_ce'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_states_find_their_parameters_by_name_in_another_order():
    model = Model()
    saved = trained(model, OPTIMIZER).state_dict()
    other = build_optimizer(model, dict(type='AdamW', lr=0.5))  # one group, in the order of the model
    load_optimizer_state(other, saved)
    assert other.param_groups[0]['lr'] == 0.5, 'rates are those of the config'
    own = other.state_dict()
    moments = {n: own['state'][i]['exp_avg'] for n, i in zip(own['param_groups'][0]['param_names'], range(6))}
    for group in saved['param_groups']:
        for name, index in zip(group['param_names'], group['params']):
            assert torch.equal(moments[name], saved['state'][index]['exp_avg'])


def test_an_old_state_without_names_is_taken_in_the_order_of_the_weights():
    """mmcv 1.x: one group a parameter, also for dead tensors that our model no longer has."""
    model = Model()
    names = ['dead.weight', *model.state_dict()]
    state = {
        i: {'step': 7, 'exp_avg': torch.full(tensor.shape, float(i)), 'exp_avg_sq': torch.ones(tensor.shape)}
        for i, tensor in enumerate([torch.zeros(2), *model.state_dict().values()])
    }
    del state[0]  # it never had a gradient
    saved = {'state': state, 'param_groups': [{'params': [i], 'lr': 1.0} for i in range(len(names))]}
    optimizer = build_optimizer(model, OPTIMIZER)
    load_optimizer_state(optimizer, saved, names)
    assert torch.equal(optimizer.state[model.backbone.weight]['exp_avg'], torch.ones(8, 3))
    assert float(optimizer.state[model.predictor.bias]['step']) == 7
    optimizer.step()


def test_a_state_of_another_model_is_refused():
    saved = trained(Model(8), OPTIMIZER).state_dict()
    with pytest.raises(CheckpointError, match='have another shape'):
        load_optimizer_state(build_optimizer(Model(16), OPTIMIZER), saved)
    stripped = copy.deepcopy(saved)
    for group in stripped['param_groups']:
        del group['param_names']
    with pytest.raises(CheckpointError, match='--load-from'):
        load_optimizer_state(build_optimizer(Model(8), OPTIMIZER), stripped, ['one'])


@pytest.fixture
def half_precision(monkeypatch):
    """A processor with instructions for all types."""
    monkeypatch.setattr('mmseg.core.precision.cpu_computes_in', lambda dtype: True)


@pytest.mark.parametrize('section, dtype, scale', [
    (dict(dtype='bfloat16'), torch.bfloat16, None),
    (dict(loss_scale=512.0), torch.float16, 512.0),
    (dict(loss_scale='dynamic'), torch.float16, 65536.0),
    (dict(loss_scale=dict(init_scale=64.0, mode='dynamic')), torch.float16, 64.0),
    ({}, torch.float16, 512.0),
])
def test_the_forms_of_fp16(half_precision, section, dtype, scale):
    precision = Precision(torch.device('cpu'), **section)
    linear = nn.Linear(4, 4)
    with precision.autocast():
        out = linear(torch.ones(2, 4))
    assert out.dtype == dtype
    assert precision.scales == (scale is not None)
    if scale:
        assert precision.scaler.get_scale() == scale


@pytest.mark.parametrize('cfg, dtype, scale', [
    ({}, torch.float32, None),
    ({'fp16': None, 'optimizer_config': {'grad_clip': None}}, torch.float32, None),
    ({'fp16': {}}, torch.float16, 512.0),
    ({'fp16': {'dtype': 'bfloat16'}}, torch.bfloat16, None),
    ({'optimizer_config': {'type': 'Fp16OptimizerHook', 'loss_scale': 64.0}}, torch.float16, 64.0),
    ({'fp16': {}, 'optimizer_config': {'type': 'Fp16OptimizerHook', 'loss_scale': 64.0}}, torch.float16, 64.0),
    ({'optimizer_config': {'type': 'GradientCumulativeOptimizerHook', 'cumulative_iters': 2}}, torch.float32, None),
])
def test_precision_as_configs_of_mmcv_ask_for_it(half_precision, cfg, dtype, scale):
    precision = Precision.from_config(cfg, torch.device('cpu'))
    assert precision.dtype == dtype and precision.scales == (scale is not None)
    if scale:
        assert precision.scaler.get_scale() == scale


@pytest.mark.parametrize('dtype, name', [('bfloat16', 'bf16'), ('float16', 'fp16')])
def test_a_processor_without_the_instructions_computes_in_float32(dtype, name, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, f'_is_mkldnn_{name}_supported', lambda: False)
    with pytest.warns(UserWarning, match=f'no instructions for {dtype}'):
        precision = Precision(torch.device('cpu'), dtype)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == precision.dtype == torch.float32
    assert precision.scales == (dtype == 'float16')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert Precision(torch.device('cpu'), 'float32').dtype == torch.float32
        assert Precision(torch.device('cuda'), 'bfloat16').dtype == torch.bfloat16


def test_a_loss_scale_without_half_precision_is_an_error():
    with pytest.raises(ConfigError, match=r'optimizer_config\.loss_scale'):
        Precision.from_config({'optimizer_config': {'loss_scale': 64.0}}, torch.device('cpu'))


def test_a_fixed_scale_stays_and_an_overflow_leaves_the_weights():
    linear = nn.Linear(4, 4)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    precision = Precision(torch.device('cpu'), loss_scale=512.0)
    precision.backward(linear(torch.full((1, 4), math.inf)).sum())
    precision.step(optimizer)
    assert torch.equal(linear.weight, before)
    assert precision.scaler.get_scale() == 512.0
    optimizer.zero_grad()
    precision.backward(linear(torch.ones(1, 4)).sum())
    precision.step(optimizer)
    assert torch.allclose(linear.weight, before - 1)
    assert precision.scaler.get_scale() == 512.0


@pytest.mark.parametrize('section', [
    dict(dtype='float8'), dict(loss_scale='static'), dict(loss_scale=dict(scale=1)),
    dict(loss_scale=True), dict(loss_scale=-1), dict(loss_scale=0.0), dict(loss_scale=float('nan')),
    dict(loss_scale=dict(init_scale='x')), dict(loss_scale=dict(growth_factor=0.5)),
    dict(loss_scale=dict(enabled=True))])
def test_unknown_precision_is_refused(section):
    with pytest.raises(ConfigError, match='fp16'):
        Precision(torch.device('cpu'), **section)


def test_switches_of_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    before = torch.get_float32_matmul_precision()
    try:
        set_backends(dict(cudnn_benchmark=True, float32_matmul_precision='high'))
        assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == 'high'
        set_backends({})
        assert not torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == 'high', 'left alone'
        set_backends(dict(cudnn_benchmark=True, deterministic=True))
        assert not torch.backends.cudnn.benchmark
        with pytest.raises(ConfigError, match=r"float32_matmul_precision: .*'hihg' \(did you mean 'high"):
            set_backends(dict(float32_matmul_precision='hihg'))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('name', ['AdamW', 'SGD'])
def test_the_fused_form_takes_the_steps_of_the_plain_one(name):
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    fused, plain = (
        build_optimizer(model, dict(type=name, lr=0.1, weight_decay=0.05, **more))
        for model, more in zip(models, ({}, {'foreach': False}))
    )
    assert fused.defaults['fused'] and not plain.defaults['fused']
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for pair in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = gradient.clone()
        fused.step()
        plain.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_optimizer_without_a_fused_form():
    assert 'fused' not in build_optimizer(Model(), dict(type='NAdam', lr=0.1)).defaults


@pytest.mark.parametrize('changes, said', [
    (dict(lr='fast'), 'optimizer.lr: expected float'),
    (dict(lr=float('nan')), 'optimizer.lr: expected float'),
    (dict(weight_decay=[0.1]), 'optimizer.weight_decay: expected float'),
    (dict(betas=0.9), 'optimizer.betas: expected list of 2'),
    (dict(betas=(0.9, 'x')), 'optimizer.betas[1]: expected float'),
    (dict(betas=(0.9, 1.5)), 'optimizer: Invalid beta'),
    (dict(amsgrad='yes'), 'optimizer.amsgrad: expected bool'),
    (dict(type=['AdamW']), 'optimizer.type'),
    (dict(params=3), 'optimizer.params: expected'),
    (dict(paramwise_cfg=[3]), 'optimizer.paramwise_cfg: expected dict'),
    (dict(paramwise_cfg=dict(custom_keys=dict(norm=3))), 'custom_keys.norm: expected dict'),
    (dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(lr_mult='x')))), 'custom_keys.norm.lr_mult: expected float'),
])
def test_values_of_a_wrong_type_are_refused(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_optimizer(nn.Linear(2, 2), {'type': 'AdamW', 'lr': 0.1, **changes})
