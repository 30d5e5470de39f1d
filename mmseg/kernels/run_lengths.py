"""The native form of the window counts: run lengths of all pixels in one pass of compiled code over each frame.

``run_lengths.cpp`` is compiled on first use and kept in the cache of :mod:`mmseg.kernels.native`, whose environment
variables it follows.  :func:`native` says why there is none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmseg.kernels.native import BuildError, Library, Unit, loaded
from mmseg.utils.images import as_label_map

SOURCE = Path(__file__).with_name('csrc') / 'run_lengths.cpp'
FLAGS = ('-std=c++17', '-O3', '-fPIC', '-fvisibility=hidden', '-Wno-psabi')


def made_of() -> Library:
    """What the compiler is given."""
    unit = Unit(SOURCE, FLAGS, 'run_lengths')
    return Library('run_lengths', (SOURCE,), (unit,))


def load(path: Path) -> ctypes.CDLL:
    """A built library.

    Raises:
        OSError, AttributeError: it does not load, or lacks a function.
    """
    library = ctypes.CDLL(str(path))
    number, address = ctypes.c_int, ctypes.c_void_p
    library.themask_widest_vector.restype = number
    library.themask_extend_runs.restype = None
    library.themask_extend_runs.argtypes = [
        number, *[address] * 4, ctypes.c_int64, address, number, address, number, address]
    return library


@functools.cache
def native() -> ctypes.CDLL | BuildError:
    """The library, built and loaded on the first call; what went wrong where that fails."""
    return loaded(made_of, load)


def _library() -> ctypes.CDLL:
    library = native()
    if isinstance(library, BuildError):
        raise BuildError(str(library))  # a new one: an exception that is raised twice keeps the frames of both
    return library


def longest_run(lengths: Sequence[int]) -> int:
    """Comparisons with the frame before in the longest of some windows.

    Raises:
        ValueError: a window of fewer than 2 frames.
    """
    if any(n < 2 for n in lengths):
        raise ValueError(f'windows need at least 2 frames, got lengths {list(lengths)}')
    return max(lengths, default=2) - 1


class RunLengths:
    """For each pixel, for how long the ground truth, and both maps, have stayed the same; counts of what follows.

    Memory is two bits per pixel for every binary digit of the longest window, whatever the length of the video.

    Args:
        lengths: the window lengths n that will be asked for, each at least 2.
        width: bytes of the vectors, 16, 32 or 64 and at most what the processor has; None takes the widest.

    Raises:
        BuildError: there is no native library.
    """

    def __init__(self, lengths: Sequence[int], width: int | None = None) -> None:
        self.frames = 0
        self.lengths = tuple(lengths)
        self._planes = longest_run(lengths).bit_length()
        self._width = width or _library().themask_widest_vector()
        self._runs = np.zeros(0, np.uint8)
        self._previous: tuple[np.ndarray, np.ndarray] | None = None
        self._counts: dict[int, tuple[int, int]] = {}

    def push(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Takes the next frame of the video; both maps are uint8 [H, W] and are kept, not copied.

        Raises:
            ValueError: the maps are of another size than each other or the frame before.
        """
        gt, pred = as_label_map(gt, 'ground truth'), as_label_map(pred, 'prediction')
        before = self._previous or (gt, pred)
        if not gt.shape == pred.shape == before[0].shape:
            raise ValueError(f'expected maps of one size, got {gt.shape} and {pred.shape} after {before[0].shape}')
        if self._previous is None:
            self._runs = np.zeros(-(-gt.size // 512) * 128 * self._planes, np.uint8)
        else:
            number = len(self.lengths)
            runs = (ctypes.c_int64 * number)(*(n - 1 for n in self.lengths))
            counts = (ctypes.c_int64 * (2 * number))()
            _library().themask_extend_runs(
                self._width, gt.ctypes.data, before[0].ctypes.data, pred.ctypes.data, before[1].ctypes.data, gt.size,
                self._runs.ctypes.data, self._planes, runs, number, counts)
            self._counts = {n: (counts[2 * i], counts[2 * i + 1]) for i, n in enumerate(self.lengths)}
        self._previous = gt, pred
        self.frames += 1

    def count(self, n: int) -> tuple[int, int] | None:
        """Pixels constant in both maps, and in the ground truth, over the window of n frames that ends here.

        None while fewer than n frames have come.
        """
        return self._counts[n] if self.frames >= n else None
