"""MSDeformAttn: parity with the reference, properties, torch.library contracts."""

from __future__ import annotations

import numpy as np
import torch

from mmseg.models.decode_heads.mask2former.pixel_decoder.ops import ms_deform_attn
from tests.reference import recipe

LEVELS = [(3, 5), (6, 10), (12, 20)]


def test_core_equals_the_reference(reference):
    rng = np.random.default_rng(21)
    pixels = sum(h * w for h, w in LEVELS)
    value = torch.from_numpy(rng.standard_normal((2, pixels, 8, 32))).float()
    locations = torch.from_numpy(rng.uniform(-0.3, 1.3, (2, 50, 8, 3, 4, 2))).float()
    weights = rng.random((2, 50, 8, 12))
    weights = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float().view(2, 50, 8, 3, 4)
    out = ms_deform_attn(value, torch.tensor(LEVELS), locations, weights)
    difference, _ = recipe.check(reference('msdeform.npz'), 'core', out.numpy())
    assert difference < 1e-6
