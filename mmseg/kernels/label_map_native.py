"""The native form of the label maps of one view: resize and argmax in one pass of compiled code, on the CPU.

``label_map.cpp`` is compiled on first use and kept in the cache of :mod:`mmseg.kernels.native`, whose environment
variables it follows.  :func:`native` says why there is none.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from mmseg.kernels.native import BuildError, Library, Unit, loaded, warn_of_slower_form

DRIVER, KERNEL, HEADER = (Path(__file__).with_name('csrc') / f'label_map{end}' for end in ('.cpp', '_kernel.cpp', '.h'))
FLAGS = ('-std=c++17', '-O3', '-fPIC', '-fvisibility=hidden', '-Wno-psabi', '-pthread')
# No traps, and a product and a sum in one step; NaN and infinity keep their meaning.
KERNEL_FLAGS = ('-fno-trapping-math', '-ffp-contract=fast')
X86_SETS = {
    32: ('-mavx2', '-mfma'),
    64: ('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def made_of() -> Library:
    """What the compiler is given: the driver, and the kernel once for each width of vectors (bytes)."""
    sets: dict[int, tuple[str, ...]] = {16: ()}
    if platform.machine().lower() in ('x86_64', 'amd64'):
        sets |= X86_SETS
    kernels = (
        Unit(KERNEL, (*FLAGS, *KERNEL_FLAGS, f'-DWIDTH={width}', *own), f'kernel_{width}')
        for width, own in sets.items()
    )
    units = (Unit(DRIVER, FLAGS, 'driver'), *kernels)
    return Library('label_map', (DRIVER, KERNEL, HEADER), units, link=('-pthread',))


def load(path: Path) -> ctypes.CDLL:
    """A built library.

    Raises:
        OSError, AttributeError: it does not load, or lacks a function.
    """
    library = ctypes.CDLL(str(path))
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.themask_widest_vector.restype = ctypes.c_int
    library.themask_label_map.restype = ctypes.c_bool
    library.themask_label_map.argtypes = [
        number, address, ctypes.c_int, *[number] * 4, address, address, number, address, number, address, number]
    return library


@functools.cache
def native() -> ctypes.CDLL | BuildError:
    """The library, built and loaded on the first call; what went wrong where that fails."""
    return loaded(made_of, load)


@functools.cache
def usable() -> bool:
    """Whether there is a library; says once why not."""
    library = native()
    if isinstance(library, BuildError):
        warn_of_slower_form('Label maps are made in their slower PyTorch form on the CPU', library, stacklevel=4)
        return False
    return True


def label_map(
    scores: Tensor, rows: Tensor, columns: Tensor, width: int | None = None, threads: int | None = None
) -> Tensor:
    """Most probable class of every pixel, the first of equal ones.

    Args:
        scores: ``[N, K, h, w]`` on the CPU, of any floating type and any strides; infinite ones, and those beyond
            1e38, count as 1e38 or -1e38, NaN as 1e38.
        rows: float32 ``[h, H]``: weight of each row of the scores in each row of the labels.
        columns: float32 ``[w, W]``.
        width: bytes of the vectors, 16, 32 or 64 and at most what the processor has; None takes the widest.
        threads: how many work; None: as many as torch takes.

    Returns:
        uint8 ``[N, H, W]``.

    Raises:
        BuildError: there is no native library.
        MemoryError: there is no memory for the threads.
    """
    library = native()
    if isinstance(library, BuildError):
        raise BuildError(str(library))  # a new one: an exception that is raised twice keeps the frames of both
    scores = scores if scores.dtype in TYPES else scores.float()
    rows, columns = rows.float().contiguous(), columns.float().contiguous()
    num, classes, *size = scores.shape
    labels = torch.empty(num, rows.shape[1], columns.shape[1], dtype=torch.uint8)
    if not labels.numel():
        return labels
    done = library.themask_label_map(
        width or library.themask_widest_vector(), scores.data_ptr(), TYPES[scores.dtype], num, classes, *size,
        (ctypes.c_int64 * 4)(*scores.stride()), rows.data_ptr(), rows.shape[1], columns.data_ptr(), columns.shape[1],
        labels.data_ptr(), threads or torch.get_num_threads())
    if not done:
        raise MemoryError('no memory for label maps')
    return labels
