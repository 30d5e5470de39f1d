"""What the steps of inference hand on: frames after backbone and head, and scores with their way to the pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmseg.kernels.label_map import resize_matrix, window_matrix, window_starts


class Head(Protocol):
    """What the segmentor asks of a decode head.

    Attributes:
        num_classes: K.
        score_kind: ``'mass'``: scores are sums of probabilities and not normalised over classes; ``'logits'``: their
            softmax is a distribution.  The argmax is the prediction in either case.
    """

    num_classes: int
    score_kind: Literal['mass', 'logits']

    def encode(self, features: Sequence[Tensor]) -> Any:
        """What does not depend on other frames: maps ``[N, ...]`` of the backbone -> nested lists of ``[N, ...]``."""

    def scores_of(self, encoded: Any, num_frames: int, state: Any = None) -> tuple[Tensor, Any]:
        """Scores ``[B, T, K, h, w]`` of ``B * T`` encoded frames, and the memory for the next clip (``None``: none)."""

    def loss(self, features: Sequence[Tensor], labels: Tensor, iteration: int = 0) -> dict[str, Tensor]:
        """Weighted losses, to be summed; labels ``[B, T, H, W]``."""

    def statistics(self) -> dict[str, Tensor]:
        """Shares that describe the last :meth:`loss`: name -> (count, of how many)."""

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The modules that ``compile_cfg`` compiles."""


class Axis(NamedTuple):
    """How one axis of a frame is seen: as a whole, or by windows of equal size whose overlaps are averaged.

    Attributes:
        pixels: of the frame.
        crop: of a window.
        starts: the first pixel of each window; one for the whole.
    """

    pixels: int
    crop: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, pixels: int, crop: int | None = None, step: int = 1) -> Axis:
        """The whole axis where there is no ``crop``."""
        if crop is None:
            return cls(pixels, pixels, (0,))
        return cls(pixels, min(crop, pixels), tuple(window_starts(pixels, crop, step)))

    @property
    def windows(self) -> list[slice]:
        """The pixels of each window."""
        return [slice(start, start + self.crop) for start in self.starts]

    def matrix(self, scores: int, *sizes: int) -> Tensor:
        """Weight of each of ``scores`` of the windows, side by side, in each pixel, resized over ``sizes`` in turn.

        Returns:
            float32 ``[scores, last size]`` on the CPU, shared between calls: do not write to it.
        """
        return _matrix(self, scores // len(self.starts), sizes)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def _matrix(axis: Axis, length: int, sizes: tuple[int, ...]) -> Tensor:
    if len(axis.starts) == 1:
        return resize_matrix(length, axis.pixels, *sizes)
    return window_matrix(axis.pixels, axis.crop, axis.starts, length) @ resize_matrix(axis.pixels, *sizes)


class Encoded:
    """Frames after backbone and pixel decoder; can be indexed (``encoded[2:4]``) and joined by frame.

    Attributes:
        windows: for each window of the frames, row by row, what the head's ``encode`` gave; one for whole frames.
        rows: the windows of the vertical axis.
        columns: those of the horizontal one.
    """

    def __init__(self, windows: Sequence[Any], rows: Axis, columns: Axis) -> None:
        self.windows, self.rows, self.columns = windows, rows, columns

    def __len__(self) -> int:
        first = self.windows[0]
        while not isinstance(first, Tensor):
            first = first[0]
        return len(first)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, frames: int | slice) -> Encoded:
        own = slice(frames, frames + 1) if isinstance(frames, int) else frames
        return Encoded([_each(lambda x: x[own], window) for window in self.windows], self.rows, self.columns)

    @classmethod
    def join(cls, parts: Sequence[Encoded]) -> Encoded:
        """The frames of all parts, which are of one size."""
        if len(parts) == 1:
            return parts[0]
        windows = [_each(lambda *x: torch.cat(x), *same) for same in zip(*(part.windows for part in parts))]
        return cls(windows, parts[0].rows, parts[0].columns)

    def clone(self) -> Encoded:
        """A copy with memory of its own."""
        return Encoded([_each(torch.clone, window) for window in self.windows], self.rows, self.columns)


def _each(function: Callable[..., Tensor], *trees: Any) -> Any:
    """``function`` of the tensors at each place of nested lists and tuples."""
    if isinstance(trees[0], Tensor):
        return function(*trees)
    return [_each(function, *same) for same in zip(*trees)]


class Scores(NamedTuple):
    """Scores of a batch of clips, and how they reach the size of the frames.

    Attributes:
        maps: ``[B, T, K, rows of windows * h, columns of windows * w]``.
        rows: the windows of the vertical axis.
        columns: those of the horizontal one.
    """

    maps: Tensor
    rows: Axis
    columns: Axis

    def matrices(self, *size: int) -> tuple[Tensor, Tensor]:
        """Matrices that bring rows and columns of the maps to the frames' size, and from there to ``size``, if any."""
        height, width = self.maps.shape[3:]
        return self.rows.matrix(height, *size[:1]), self.columns.matrix(width, *size[1:])
