"""Shared fixtures: reference tensors, deterministic weights, the backends of the op.

A GPU is hidden from tests and from the processes that they start, so that they test the same on every machine; those in
``test_gpu.py`` want it, and ``make test-gpu`` lets them have it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

if not os.environ.get('THEMASK_TEST_GPU'):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import numpy as np
import pytest
import torch

from mmseg.kernels import library

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


@pytest.fixture(autouse=True)
def _no_settings_of_tools_left(monkeypatch):
    """A tool whose ``main`` runs in the process of a test sets the allocator's variable for what comes after it."""
    monkeypatch.setenv('THP_MEM_ALLOC_ENABLE', '0')  # remembers what was there, and puts it back after the test
    monkeypatch.delenv('THP_MEM_ALLOC_ENABLE')


def need_native() -> None:
    """Skips a test where there is no native library for the CPU."""
    loaded = library.native('cpu')
    if isinstance(loaded, library.BuildError):
        pytest.skip(f'no native library here: {loaded}')


def instruction_sets(wanted: str = '') -> Iterator[str]:
    """Makes the CPU library use each instruction set of this processor, or the wanted one; puts back what was there."""
    need_native()
    before = library.instruction_set()
    try:
        for name in library.instruction_sets():
            if wanted in ('', name):
                library.choose_instruction_set(name)
                yield name
    finally:
        library.choose_instruction_set(before)


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An empty cache, and no library loaded or warned of yet."""
    monkeypatch.setenv('THEMASK_OPS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('THEMASK_OPS_BACKEND', raising=False)
    for cached in (library.native, library.usable):
        cached.cache_clear()
    yield
    for cached in (library.native, library.usable):
        cached.cache_clear()


@pytest.fixture(params=['pytorch', 'avx512', 'avx2', 'portable'])
def backend(request, monkeypatch):
    """Runs a test with the PyTorch form and with each instruction set that this processor has."""
    if request.param == 'pytorch':
        monkeypatch.setenv('THEMASK_OPS_BACKEND', 'pytorch')
        yield request.param
        return
    monkeypatch.setenv('THEMASK_OPS_BACKEND', 'cpu')
    need_native()
    if request.param not in library.instruction_sets():
        pytest.skip(f'this processor has no {request.param}')
    yield from instruction_sets(request.param)
