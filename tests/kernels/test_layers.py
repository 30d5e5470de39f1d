"""Linear layers, norms, chunks and weights in half precision equal torch's, whichever form they take."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmseg.core import Precision, save_checkpoint
from mmseg.kernels import half, layers
from mmseg.kernels.layers import Conv2d, LayerNorm, Linear, chunked, linear
from mmseg.models.decode_heads.layers import MultiHeadAttention
from mmseg.models.decode_heads.pixel_decoder import MSDeformAttnEncoderLayer


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of the tokens that went to a convolution."""
    shapes = []
    convolve = F.conv2d

    def record(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(F, 'conv2d', record)
    return shapes


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1, 7), (2, 3, 5, 7), (1, 1, 7), (0, 7), (7,)])
def test_convolution_equals_linear(monkeypatch, convolutions, shape, bias):
    monkeypatch.setattr(layers, '_WORTHWHILE', 1)
    torch.manual_seed(0)
    inputs = [torch.randn(*shape), torch.randn(4, 7), *([torch.randn(4)] if bias else [])]
    results = []
    for function in (linear, F.linear):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(convolutions) == (0 not in shape)


def test_transposed_tokens(monkeypatch, convolutions):
    monkeypatch.setattr(layers, '_WORTHWHILE', 1)
    x, layer = torch.randn(2, 7, 5).transpose(1, 2), Linear(7, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert convolutions


def test_only_large_products_of_known_types_go_to_a_convolution(convolutions):
    layer = Linear(64, 1024)
    layer(torch.randn(16, 64))
    layer.double()(torch.randn(1024, 64).double())
    assert not convolutions
    with torch.inference_mode():
        layer.float()(torch.randn(1024, 64))
    assert convolutions == [(1, 64, 1, 1024)]


def test_few_tokens_of_bfloat16_stay_a_product(convolutions):
    """Also where autocast makes them bfloat16."""
    layer = Linear(2048, 256)
    with torch.inference_mode():
        layer(torch.randn(100, 2048))
        with torch.autocast('cpu', torch.bfloat16):
            layer(torch.randn(100, 2048))
            layer(torch.randn(1030, 2048))
        layer.bfloat16()(torch.randn(100, 2048).bfloat16())
    assert convolutions == [(1, 2048, 1, 100), (1, 2048, 1, 1030)]


@pytest.mark.parametrize('most, autocast', [(32, False), (64, True)], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('tokens', [(2, 30), (1, 5, 13), (64,), (1, 32), (0, 3)])
def test_chunks_equal_the_whole(monkeypatch, tokens, most, autocast):
    monkeypatch.setattr(layers, '_CHUNK', 32 * 4 * 9)
    x, y, lengths = torch.randn(*tokens, 6), torch.randn(*tokens, 2), []

    def function(a, b):
        lengths.append(a.shape[:-1].numel())
        return a[..., :3] * b[..., :1]

    whole = function(x, y)
    count = lengths.pop()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert torch.equal(chunked(function, x, y, width=9), whole)
    assert sum(lengths) == count and max(lengths) <= most and len(lengths) == max(1, -(-count // most))


def test_an_encoder_layer_in_chunks_equals_the_whole(monkeypatch):
    """Also their gradients, whose sums over tokens go over the chunks."""
    part = MSDeformAttnEncoderLayer(32, 64, 0.0, 2, 4)
    inputs = torch.randn(2, 30, 32), torch.randn(1, 30, 32), torch.rand(1, 30, 2, 2), [(4, 6), (2, 3)]
    lengths, results = [], []
    part.linear2.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[:-1].numel()))
    for most in (10**6, 32):
        monkeypatch.setattr(layers, '_CHUNK', most * 4 * 64)
        out = part(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(part.parameters()))])
        with torch.no_grad():
            results[-1].append(part(*inputs))
    for whole, in_chunks in zip(*results):
        torch.testing.assert_close(in_chunks, whole, rtol=1e-5, atol=1e-5)
    assert lengths[0] == lengths[1] == sum(lengths[2:]) / 2 and len(lengths) > 4 and max(lengths[2:]) <= 32


def test_an_activation_follows_the_layer():
    layer, x = Linear(7, 4, activation='relu'), torch.randn(3, 7)
    assert torch.equal(layer(x), F.relu(F.linear(x, layer.weight, layer.bias)))


def test_the_norm_of_a_sum():
    norm, x, branch = LayerNorm(8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    total, normed = norm.add(x, branch)
    assert torch.equal(total, x + branch) and torch.equal(normed, F.layer_norm(x + branch, (8,)))


class Products(nn.Module):
    """One layer of each kind, and a stock one."""

    def __init__(self):
        super().__init__()
        self.linear, self.stock, self.conv = Linear(8, 8), nn.Linear(8, 8), Conv2d(8, 8, 3, padding=1)
        self.attention = MultiHeadAttention(8, 2)

    def forward(self, x):
        x = self.stock(self.linear(x))
        x = self.conv(x.unflatten(1, (4, 4)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return self.attention(x, x, x)


@pytest.fixture
def low(monkeypatch):
    monkeypatch.setattr('mmseg.core.precision.cpu_computes_in', lambda dtype: True)
    return Precision(torch.device('cpu'), 'bfloat16')


@pytest.fixture
def casts(monkeypatch):
    """Names of the weights that were cast for a copy."""
    made = []
    own = half._current
    monkeypatch.setattr(half, '_current', lambda copies, name, weight, dtype: (
        made.extend([name] if name not in copies or copies[name].version != weight._version else [])
        or own(copies, name, weight, dtype)))
    return made


def test_an_evaluation_casts_each_weight_once_and_changes_nothing(low, casts, tmp_path):
    model, x = Products().eval(), torch.randn(2, 16, 8)
    before = pickle.dumps(model.state_dict())
    with torch.no_grad(), low.autocast():
        expected = model(x)
    assert not casts
    with torch.no_grad(), low.evaluation(model):
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        assert len(casts) == 8  # weight and bias of two layers and of both projections of the attention
        assert pickle.dumps(model.state_dict()) == before and len(list(model.parameters())) == 10
        assert torch.equal(copy.deepcopy(model)(x), expected)
        save_checkpoint({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'rescue.pth')
    saved = torch.load(tmp_path / 'rescue.pth', weights_only=True)['state_dict']
    assert {value.dtype for value in saved.values()} == {torch.float32} and not half._copies


def test_copies_follow_weights_and_leave_gradients_alone(low, casts):
    model, x = Products().eval(), torch.randn(2, 16, 8)
    with low.evaluation(model):
        with torch.no_grad():
            first = model(x)
            model.linear.weight.mul_(2)
            second = model(x)
        assert not torch.equal(first, second) and len(casts) == 9
        model(x).sum().backward()
        assert model.linear.weight.grad.dtype == torch.float32
        with torch.no_grad(), torch.autocast('cpu', enabled=False):
            assert model(x).dtype == torch.float32
    with torch.no_grad(), low.autocast():
        assert torch.equal(model(x), second) and len(casts) == 9


def test_evaluations_may_be_nested_suspended_and_in_threads(low, casts):
    model, x = Products().eval(), torch.randn(2, 16, 8)

    def labels():
        with low.evaluation(model):
            for _ in range(3):
                with torch.no_grad():
                    yield model(x)

    first, second = labels(), labels()
    expected = next(first)
    assert torch.equal(next(second), expected)
    second.close()
    assert torch.equal(next(first), expected)
    results = []
    thread = threading.Thread(target=lambda: results.extend(labels()))
    thread.start()
    thread.join()
    assert all(torch.equal(result, expected) for result in results) and len(casts) == 8
    first.close()
    assert not half._copies
    with pytest.raises(KeyError), low.evaluation(model):
        raise KeyError
    assert not half._copies


def test_a_model_may_be_freed_together_with_its_evaluation(low):
    """A cycle that holds both; the collector clears weak references first."""
    def forever(model):
        with low.evaluation(model):
            while True:
                yield

    model, broken = Products().eval(), []
    model.labels = forever(model)
    next(model.labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'unraisablehook', broken.append)
        del model
        gc.collect()
    assert not broken and not half._copies
