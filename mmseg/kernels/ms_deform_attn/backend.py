"""Which form of the op serves a device, and loading the native ones.

Environment: ``THEMASK_OPS_BACKEND`` = ``auto`` (the fastest that works), ``cpu``, ``cuda`` (that native op or an
error), ``pytorch`` (the PyTorch form everywhere); ``THEMASK_OPS_BUILD=0`` never compiles, only loads what was built;
``THEMASK_OPS_INSTRUCTION_SET`` = ``avx512``, ``avx2`` or ``portable`` instead of the best the processor has.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mmseg.kernels.native import building_allowed, loading, warn_of_slower_form

from .build import BuildError, Kind, library

CHOICES = ('auto', 'cpu', 'cuda', 'pytorch')


class BackendError(RuntimeError):
    """The backend asked for cannot serve the call."""


@dataclass(frozen=True)
class Native:
    """A loaded library: its file, and its functions for ctypes."""

    path: Path
    functions: ctypes.CDLL


def requested() -> str:
    """The value of ``THEMASK_OPS_BACKEND``.

    Raises:
        BackendError: it is none of `CHOICES`.
    """
    choice = os.environ.get('THEMASK_OPS_BACKEND', 'auto').strip().lower() or 'auto'
    if choice not in CHOICES:
        raise BackendError(f'THEMASK_OPS_BACKEND={choice} is none of {", ".join(CHOICES)}')
    return choice


def load(kind: Kind, path: Path) -> Native:
    """Load a built library into torch, and check that it can run here.

    Raises:
        BuildError: it does not load, or has no code for this machine.
    """
    functions = loading(path, functools.partial(_declare, kind))
    native = Native(path, functions)
    if kind == 'cpu':
        wanted = os.environ.get('THEMASK_OPS_INSTRUCTION_SET')
        if wanted:
            choose_instruction_set(native, wanted)
    else:
        problem = functions.themask_cuda_problem().decode()
        if problem:
            raise BuildError(f'{path} cannot run on this GPU: {problem}; set TORCH_CUDA_ARCH_LIST to its architecture')
    return native


def _declare(kind: Kind, path: Path) -> ctypes.CDLL:
    torch.ops.load_library(path)
    functions = ctypes.CDLL(str(path))
    if kind == 'cpu':
        functions.themask_instruction_set.restype = ctypes.c_char_p
        functions.themask_choose_instruction_set.restype = ctypes.c_bool
        functions.themask_choose_instruction_set.argtypes = [ctypes.c_char_p]
    else:
        functions.themask_cuda_problem.restype = ctypes.c_char_p
    return functions


def instruction_set(native: Native) -> str:
    """The instruction set that the CPU library uses."""
    return native.functions.themask_instruction_set().decode()


def choose_instruction_set(native: Native, name: str) -> None:
    """Use another instruction set from now on (for tests and benchmarks).

    Raises:
        BackendError: the processor lacks it, or the name is none.
    """
    if not native.functions.themask_choose_instruction_set(name.encode()):
        raise BackendError(f'the CPU library has no instruction set {name!r} that this processor can run')


@functools.cache
def native(kind: Kind) -> Native | BuildError:
    """The library of a device type, built and loaded on the first call; what went wrong where that fails."""
    try:
        return load(kind, library(kind, allow_build=building_allowed()))
    except BuildError as error:
        return error


@functools.cache
def _warn_once(kind: Kind, reason: str) -> None:
    warn_of_slower_form(f'MSDeformAttn runs in its slower PyTorch form on {kind}', reason, stacklevel=4)


@torch.compiler.assume_constant_result
def uses_native(device_type: str) -> bool:
    """Whether tensors of this device type go to a native op; otherwise they take the PyTorch form.

    Raises:
        BackendError: ``THEMASK_OPS_BACKEND`` names a backend that cannot serve this device.
    """
    choice = requested()
    if choice == 'pytorch':
        return False
    if choice not in ('auto', device_type):
        raise BackendError(f'THEMASK_OPS_BACKEND={choice}, but value is on {device_type}; use auto')
    if device_type not in ('cpu', 'cuda'):
        return False
    kind: Kind = 'cpu' if device_type == 'cpu' else 'cuda'
    loaded = native(kind)
    if isinstance(loaded, Native):
        return True
    if choice != 'auto':
        raise BackendError(f'THEMASK_OPS_BACKEND={choice}, but {loaded}') from loaded
    _warn_once(kind, str(loaded))
    return False
