"""The convolution of training equals torch's, forward and backward, on any processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmseg.models import convolution
from mmseg.models.convolution import convolve


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
