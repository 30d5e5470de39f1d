"""Random generators: seed them, read them, put them back, and draw many numbers on the CPU."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmseg.utils.dist import broadcast_object


def draw_seed() -> int:
    """A seed from the operating system, the same on every rank."""
    return broadcast_object(int.from_bytes(os.urandom(4), 'little') >> 1)


def set_random_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, numpy and torch (CPU and every GPU).

    Args:
        seed: any int in [0, 2^32).
        deterministic: choose reproducible algorithms, slower on a GPU; an operation that has none warns.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)


def uniform(*shape: int, device: torch.device | str = 'cpu') -> Tensor:
    """Uniform numbers on the CPU, by a generator of NumPy's: in two thirds of the time of ``torch.rand``.

    Torch's generator draws its seed, and so decides all of them.

    Returns:
        float32 in [0, 1), multiples of 2^-24 as those of ``torch.rand``.
    """
    if torch.device(device).type != 'cpu' or torch.compiler.is_compiling():
        return torch.rand(shape, device=device)
    seed = torch.randint(2**63 - 1, (1,)).numpy()  # no item(): this waits for no device
    return torch.from_numpy(np.random.Generator(np.random.SFC64(seed)).random(shape, np.float32))


def get_rng_state() -> dict[str, Any]:
    """State of this process's generators, made of tensors and plain Python values (safe to load)."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`get_rng_state` returned."""
    version, keys, gauss_next = state['python']
    random.setstate((version, tuple(keys), gauss_next))
    name, numpy_keys, position, has_gauss, gauss = state['numpy']
    np.random.set_state((name, numpy_keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
