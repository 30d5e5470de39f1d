"""Shared fixtures: reference tensors, deterministic weights, the backends of the op.

A GPU is hidden from tests and from the processes that they start, so that they test the same on every machine; those in
``test_gpu.py`` want it, and ``make test-gpu`` lets them have it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

if not os.environ.get('THEMASK_TEST_GPU'):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import numpy as np
import pytest
import torch

from mmseg.kernels.ms_deform_attn import backend as backends
from mmseg.kernels.ms_deform_attn.backend import Native, native

REFERENCE = Path(__file__).parent / 'reference'
CAMVID = Path(__file__).parents[2] / 'shared' / 'camvid_vspw'
INSTRUCTION_SETS = ('avx512', 'avx2', 'portable')


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


@pytest.fixture(autouse=True)
def _no_settings_of_tools_left(monkeypatch):
    """A tool whose ``main`` runs in the process of a test sets the allocator's variable for what comes after it."""
    monkeypatch.setenv('THP_MEM_ALLOC_ENABLE', '0')  # remembers what was there, and puts it back after the test
    monkeypatch.delenv('THP_MEM_ALLOC_ENABLE')


def cpu_library() -> Native:
    loaded = native('cpu')
    if not isinstance(loaded, Native):
        pytest.skip(f'no native op here: {loaded}')
    return loaded


@pytest.fixture(params=['pytorch', *INSTRUCTION_SETS])
def backend(request, monkeypatch):
    """Runs a test with the PyTorch form and with each instruction set that this processor has."""
    if request.param == 'pytorch':
        monkeypatch.setenv('THEMASK_OPS_BACKEND', 'pytorch')
        yield request.param
        return
    library = cpu_library()
    before = backends.instruction_set(library)
    monkeypatch.setenv('THEMASK_OPS_BACKEND', 'cpu')
    try:
        backends.choose_instruction_set(library, request.param)
    except backends.BackendError as error:
        pytest.skip(str(error))
    yield request.param
    backends.choose_instruction_set(library, before)
