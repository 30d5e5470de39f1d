"""Shared fixtures: reference tensors, deterministic weights, quiet threads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).parent / 'reference'
CAMVID = Path(__file__).parents[2] / 'shared' / 'camvid_vspw'


@pytest.fixture(scope='session')
def reference():
    """Loads a recorded file by name: ``reference('keys_1f_b0.json')`` or ``reference('msdeform.npz')``."""

    def load(name: str):
        path = REFERENCE / name
        return json.loads(path.read_text()) if path.suffix == '.json' else np.load(path)

    return load


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)
