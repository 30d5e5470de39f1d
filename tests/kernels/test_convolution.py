"""The convolution of training equals torch's, forward and backward, on any processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmseg.kernels import convolution
from mmseg.kernels.convolution import convolve
from mmseg.kernels.layers import Conv2d


@pytest.fixture
def own_backward(monkeypatch):
    """A processor without AVX-512; counts the calls that get the backward pass of this module."""
    calls = []
    apply = convolution._Convolution.apply
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    monkeypatch.setattr(convolution._Convolution, 'apply', lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('side', [1, 3, 5])
@pytest.mark.parametrize('shape', [(2, 3, 5, 7), (1, 3, 1, 1), (3, 3, 9, 1), (0, 3, 4, 4)])
def test_equals_torch(own_backward, shape, side, layout, bias):
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=layout)
    inputs = [x, torch.randn(4, 3, side, side), *([torch.randn(4)] if bias else [])]
    results = []
    for function in (convolve, lambda *args: F.conv2d(*args, padding=side // 2)):
        leaves = [each.clone(memory_format=torch.preserve_format).requires_grad_() for each in inputs]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert own_backward


def test_expanded_gradients(own_backward):
    """``sum`` sends back one number for all pixels."""
    x, weight = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    ours = torch.autograd.grad(convolve(x, weight).sum(), (x, weight))
    theirs = torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), (x, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('learns', [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_made(own_backward, learns, monkeypatch):
    made = []
    for name in ('_input_gradient', '_weight_gradient'):
        own = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *args, own=own, name=name: made.append(name) or own(*args))
    leaves = [torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.randn(2)]
    for leaf, wanted in zip(leaves, learns):
        leaf.requires_grad_(wanted)
    convolve(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(learns)
    assert made == [name for name, wanted in zip(('_input_gradient', '_weight_gradient'), learns) if wanted]


def test_who_else_gets_torchs_own(own_backward, monkeypatch):
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3, requires_grad=True)
    with torch.no_grad():
        convolve(x, weight)
    convolve(x.double(), weight.double())
    with torch.autocast('cpu', torch.bfloat16):
        assert convolve(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    convolve(x, weight)
    assert not own_backward


FUSED = convolution._fused_types()  # what oneDNN can do on this processor


@pytest.fixture
def activations(monkeypatch):
    """The activations that were made behind a convolution, not by it."""
    made = []
    activate = convolution.activate
    monkeypatch.setattr(convolution, 'activate',
        lambda x, name: (made.append(name) if name else None) or activate(x, name))
    return made


def layers(activation, side, groups, dtype=torch.float32):
    """Our layer with an activation, and torch's without, with the same weights."""
    ours = Conv2d(16, 16, side, padding=side // 2, groups=groups, activation=activation).to(dtype)
    stock = torch.nn.Conv2d(16, 16, side, padding=side // 2, groups=groups).to(dtype)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize('options', [dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=3, padding=0),
                                     dict(kernel_size=3, padding=1, dilation=2), dict(kernel_size=2, padding=1),
                                     dict(kernel_size=3, padding=1, groups=4)])
def test_layers_of_other_shapes_are_torchs(own_backward, options):
    ours, stock = Conv2d(8, 8, activation='relu', **options), torch.nn.Conv2d(8, 8, **options)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(ours(x), F.relu(stock(x)))
    assert not own_backward


@pytest.mark.skipif(not FUSED, reason='no oneDNN here')
@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize('groups', [1, 16])
@pytest.mark.parametrize('side', [1, 3])
@pytest.mark.parametrize('dtype', FUSED)
def test_an_activation_is_made_by_the_convolution(activations, dtype, side, groups, activation):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 7, dtype=dtype).to(memory_format=torch.channels_last)
    layer, stock = layers(activation, side, groups, dtype)
    with torch.no_grad():
        out, plain = layer(x), getattr(F, activation)(stock(x))
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last) and not activations
    if activation == 'relu':
        assert torch.equal(out, plain)
    else:
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize('groups', [1, 16])
def test_elsewhere_an_activation_follows_the_convolution(activations, own_backward, groups, activation):
    """With gradients, in types that oneDNN does not know, and off the CPU."""
    torch.manual_seed(0)
    (layer, stock), x = layers(activation, 3, groups), torch.randn(2, 16, 9, 7).requires_grad_()
    for ours, theirs in zip(*(
        [out, *torch.autograd.grad(out.sin().sum(), [x, *one.parameters()])]
        for one, out in ((layer, layer(x)), (stock, getattr(F, activation)(stock(x))))
    )):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert layer.to('meta')(x.to('meta')).shape == x.shape
        layer, stock = layers(activation, 3, groups, torch.float64)
        assert torch.equal(layer(x.double()), getattr(F, activation)(stock(x.double())))
    assert activations == [activation] * 3


@pytest.mark.skipif(torch.bfloat16 not in FUSED, reason='no bfloat16 in oneDNN here')
def test_autocast_reaches_the_convolution_with_an_activation(activations):
    (layer, stock), x = layers('relu', 3, 1), torch.randn(2, 16, 9, 7)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
        assert torch.equal(out, F.relu(stock(x))) and out.dtype == torch.bfloat16 and not activations
