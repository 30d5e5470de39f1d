"""The linear layer equals torch's, whichever library it goes to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmseg.kernels import autocast, pieces
from mmseg.kernels import linear as module
from mmseg.kernels.autocast import cast_once
from mmseg.kernels.linear import Linear, linear
from mmseg.models.decode_heads import pixel_decoder as msdeformattn


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
    monkeypatch.setattr(module, '_WORTHWHILE', 1)
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
    monkeypatch.setattr(module, '_WORTHWHILE', 1)
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


def test_what_many_layers_read_is_cast_once():
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert cast_once(x) is x
        with torch.autocast('cpu', torch.bfloat16):
            assert cast_once(x).dtype == torch.bfloat16
            assert cast_once(x.double()).dtype == torch.float64
            assert cast_once(x.to('meta')).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert cast_once(x) is x, 'gradients are summed in float32'


@pytest.mark.parametrize('most, autocast', [(32, False), (64, True)], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('tokens', [(2, 30), (1, 5, 13), (64,), (1, 32), (0, 3)])
def test_pieces_equal_the_whole(monkeypatch, tokens, most, autocast):
    monkeypatch.setattr(pieces, '_BYTES', 32 * 4 * pieces._WIDTH)
    x, y, lengths = torch.randn(*tokens, 6), torch.randn(*tokens, 2), []

    def function(a, b):
        lengths.append(a.shape[:-1].numel())
        return a[..., :3] * b[..., :1]

    whole = function(x, y)
    count = lengths.pop()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert torch.equal(pieces.by_pieces(function, x, y), whole)
    assert sum(lengths) == count and max(lengths) <= most and len(lengths) == max(1, -(-count // most))


def test_an_encoder_layer_in_pieces_equals_the_whole(monkeypatch):
    """Also their gradients, whose sums over tokens go over the pieces."""
    part = msdeformattn.MSDeformAttnEncoderLayer(32, 64, 0.0, 2, 4)
    inputs = torch.randn(2, 30, 32), torch.randn(1, 30, 32), torch.rand(1, 30, 2, 2), [(4, 6), (2, 3)]
    lengths, results = [], []
    part.linear2.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[:-1].numel()))
    for most in (10**6, 32):
        monkeypatch.setattr(pieces, '_BYTES', most * 4 * pieces._WIDTH)
        out = part(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(part.parameters()))])
        with torch.no_grad():
            results[-1].append(part(*inputs))
    for whole, in_pieces in zip(*results):
        torch.testing.assert_close(in_pieces, whole, rtol=1e-5, atol=1e-5)
    assert lengths[0] == lengths[1] == sum(lengths[2:]) / 2 and len(lengths) > 4 and max(lengths[2:]) <= 32


def test_weights_are_cast_once_while_none_changes():
    layer, x = Linear(64, 32), torch.randn(5, 64)
    first, second = (layer.weight.clone() for _ in range(2))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = layer(x)
        with autocast.weights_cast_once():
            assert torch.equal(layer(x), expected)
            kept = autocast.cast_weight(layer.weight, x)
            assert kept.dtype == torch.bfloat16 and autocast.cast_weight(layer.weight, x.bfloat16()) is kept
            with autocast.weights_cast_once():
                assert autocast.cast_weight(layer.weight, x) is kept, 'the outer one keeps it'
            assert autocast.cast_weight(first, x) is not autocast.cast_weight(second, x)
            assert autocast.cast_weight(layer.weight, x.double()).dtype == torch.float32, 'autocast leaves float64'
            with torch.autocast('cpu', enabled=False):
                assert autocast.cast_weight(layer.weight, x) is layer.weight
            with torch.enable_grad():
                assert autocast.cast_weight(layer.weight, x) is layer.weight
        assert autocast.cast_weight(layer.weight, x) is layer.weight, 'nothing is kept behind'


def test_nothing_is_kept_after_an_error():
    with pytest.raises(KeyError), autocast.weights_cast_once():
        raise KeyError
    assert autocast._casts.get() is None
