"""Attention written out in tiles: the numbers of torch's own."""

import pytest
import torch
import torch.nn.functional as F

from mmseg.models import attention as module
from mmseg.models.attention import attention


def inputs(dtype=torch.float32, samples=2, heads=2, queries=300, keys=17, width=8):
    """As the backbone makes them: heads are slices of the channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, keys, keys)
    return [torch.randn(samples, n, heads, width, generator=generator).to(dtype).transpose(1, 2) for n in shapes]


@pytest.fixture
def written_out(monkeypatch):
    """Small tiles for small inputs, and no way back to torch's function."""
    monkeypatch.setattr(module, '_TILE', 64)
    monkeypatch.setattr(module, '_WORTHWHILE', 0)
    expected = F.scaled_dot_product_attention

    def never(*args):
        raise AssertionError('scaled_dot_product_attention was called')

    monkeypatch.setattr(module.F, 'scaled_dot_product_attention', never)
    return expected


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_tiles_give_the_numbers_of_torch(written_out, dtype, tolerance):
    query, key, value = inputs(dtype)
    with torch.no_grad():
        out = attention(query, key, value)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, written_out(query, key, value), rtol=tolerance, atol=tolerance)


def test_autocast_keeps_the_dtype(written_out):
    query, key, value = inputs(torch.bfloat16)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert attention(query, key, value).dtype == torch.bfloat16


def test_gradients_and_few_scores_go_to_torch(written_out, monkeypatch):
    with pytest.raises(AssertionError, match='was called'):
        attention(*inputs())
    monkeypatch.setattr(module, '_WORTHWHILE', 300 * 17 + 1)
    with torch.no_grad(), pytest.raises(AssertionError, match='was called'):
        attention(*inputs())
