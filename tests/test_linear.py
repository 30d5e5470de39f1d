"""The linear layer equals torch's, whichever library it goes to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmseg.models import linear as module
from mmseg.models.decode_heads.mask2former.pixel_decoder import msdeformattn
from mmseg.models.linear import Linear, linear


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of the tokens that went to a convolution."""
    shapes = []
    convolve = F.conv2d

    def record(x, *args):
        shapes.append(tuple(x.shape))
        return convolve(x, *args)

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
    assert convolutions == [(1, 64, 1024, 1)]


def test_the_encoder_layer_in_pieces_equals_the_whole(monkeypatch):
    monkeypatch.setattr(msdeformattn, '_FFN_TOKENS', 16)
    torch.manual_seed(0)
    shapes = [(4, 6), (2, 3)]
    layer = msdeformattn.MSDeformAttnEncoderLayer(32, 64, 0.0, 2, 4)
    tokens, position = torch.randn(2, 30, 32), torch.randn(1, 30, 32)
    points = torch.rand(1, 30, 2, 2)
    whole = layer(tokens, position, points, shapes)
    pieces = []
    layer.linear1.register_forward_hook(lambda _, inputs, __: pieces.append(inputs[0].shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens, position, points, shapes), whole, rtol=1e-5, atol=1e-5)
    assert pieces == [16, 14]
