"""Positions, deformable attention module and pixel decoder."""

import pytest
import torch

from mmseg.models.decode_heads.mask2former.position_encoding import sine_position_2d, sine_position_3d
from tests.reference import recipe


def assert_close(gold, name, array, tolerance):
    difference, _ = recipe.check(gold, name, array.detach().numpy())
    assert difference <= tolerance, f'{name}: {difference}'


def test_positions_equal_the_reference(reference):
    gold = reference('position.npz')
    assert_close(gold, 'pe2d_6x10', sine_position_2d(6, 10, 256, 'cpu').expand(2, -1, -1, -1), 1e-5)
    assert_close(gold, 'pe2d_7x5', sine_position_2d(7, 5, 256, 'cpu')[None], 1e-5)
    for frames in (1, 2, 4):
        assert_close(gold, f'pe3d_t{frames}_4x6', sine_position_3d(frames, 4, 6, 256, 'cpu')[None], 1e-5)
    assert_close(gold, 'pe3d_b2_t2_4x6', sine_position_3d(2, 4, 6, 256, 'cpu').expand(2, -1, -1, -1, -1), 1e-5)


def test_positions_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        sine_position_2d(3, 9, 8, 'cpu')
    weight = torch.ones(8, 3, 9, requires_grad=True)
    (weight * sine_position_2d(3, 9, 8, 'cpu')).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_position_rejects_odd_channels():
    with pytest.raises(ValueError, match='multiple of 4'):
        sine_position_2d(3, 3, 6, 'cpu')
