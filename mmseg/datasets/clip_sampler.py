"""Which frames make a clip: random draws for training, a partition of the video for testing."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from mmseg.utils.errors import ConfigError

Frame = TypeVar('Frame')

TEST_STRIDE = 3  # frames between neighbours of a test clip; also the number of clips a block gives


def check_clips(dilation: Any, test_size: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """``dilation`` (always as a tuple) and ``test_size``, exactly one of which is not None, from a config's values."""
    if (dilation is None) == (test_size is None):
        raise ConfigError('a data set takes either dilation (training clips, [0] for single frames) or test_size '
                          f'(test clips), got dilation={dilation!r} and test_size={test_size!r}')
    if test_size is not None:
        if type(test_size) is not int or test_size < 1:
            raise ConfigError(f'test_size: expected a whole number of frames >= 1, got {test_size!r}')
        return None, test_size
    offsets = tuple(dilation) if isinstance(dilation, Sequence) else (dilation,)
    whole = bool(offsets) and all(type(offset) is int for offset in offsets)
    if not whole or not all(a < b for a, b in pairwise(offsets)) or offsets[-1] > 0:
        raise ConfigError('dilation: expected ascending offsets <= 0 to the current frame, the farthest first, '
                          f'as [-9, -6, -3] or [0], got {dilation!r}')
    return offsets, None


def frames_needed(dilation: Sequence[int]) -> int:
    """Number of frames a video must have for a clip with these offsets."""
    return 1 - dilation[0]


def can_draw(num_frames: int, needed: int, labelled: Sequence[int] | None = None) -> bool:
    """Whether a video has a current frame, one with labels that is far enough from the first or the last frame."""
    return num_frames >= needed and (
        labelled is None or any(max(i, num_frames - 1 - i) >= needed - 1 for i in labelled))


def sample_training_clip(
    num_frames: int, dilation: Sequence[int], labelled: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Draws a training clip: frames at fixed offsets before a random current frame, with time reversed half the time.

    One ``random.random()`` and one ``np.random.choice`` are drawn, in this order, as the reference does.

    Args:
        num_frames: length of the video, at least :func:`frames_needed`.
        dilation: ascending offsets <= 0 to the current frame, the farthest first.
        labelled: positions of frames with labels, ascending, of which the current frame is one; None: all have them.
            Where none is far enough from the end at which the clip would begin, time runs the other way.

    Returns:
        Positions in file order; the current frame is the last one.
    """
    positions = list(range(num_frames))
    backwards = random.random() < 0.5
    first = frames_needed(dilation) - 1
    candidates = np.arange(first, num_frames)
    if labelled is not None:
        ends = np.asarray(labelled), num_frames - 1 - np.asarray(labelled)[::-1]
        candidates, others = (each[each >= first] for each in (ends[backwards], ends[not backwards]))
        if not len(candidates):
            candidates, backwards = others, not backwards
    if backwards:
        positions.reverse()
    current = np.random.choice(candidates)
    offsets = [*dilation] if 0 in dilation else [*dilation, 0]
    return tuple(positions[current + offset] for offset in offsets)


def cut_clips(
    frames: Iterable[Frame], size: int, stride: int = TEST_STRIDE, overlap: int = 0
) -> Iterator[tuple[list[list[Frame]], list[Frame]]]:
    """Cuts a stream of frames into clips, which hold every frame exactly once where they do not overlap.

    Blocks of ``stride * size`` frames give ``stride`` clips whose frames are ``stride`` apart; what is left at the end
    gives consecutive clips, the last of which may be shorter.  ``size`` 1 gives single frames in order.

    Args:
        frames: of any kind.
        size: frames of a clip, at least 1.
        stride: frames from one frame of a clip to the next.
        overlap: how many of its frames a clip shares with the next, less than ``size``.

    Yields:
        Clips, and the frames that no later clip holds.
    """
    stride = stride if size > 1 else 1
    waiting: list[Frame] = []
    held = 0  # of the waiting frames, those that an earlier clip holds
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == size * stride:
            held = overlap * stride
            done = len(waiting) - held
            yield [waiting[phase::stride] for phase in range(stride)], waiting[:done]
            del waiting[:done]
    yield [waiting[start : start + size] for start in range(held, len(waiting), size)], waiting


def cut_test_clips(num_frames: int, size: int) -> list[tuple[int, ...]]:
    """Positions of the frames of every test clip of a video; see :func:`cut_clips`."""
    return [tuple(clip) for clips, _ in cut_clips(range(num_frames), size) for clip in clips]
