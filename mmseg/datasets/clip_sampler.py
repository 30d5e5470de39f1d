"""Which frames make a clip: random draws for training, a partition of the video for testing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmseg.utils.errors import ConfigError

_TEST_STRIDE = 3  # frames between neighbours of a test clip; also the number of clips a block gives


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


def sample_training_clip(num_frames: int, dilation: Sequence[int]) -> tuple[int, ...]:
    """Draws a training clip: frames at fixed offsets before a random current frame, with time reversed half the time.

    One ``random.random()`` and one ``np.random.choice`` are drawn, in this order, as the reference does.

    Args:
        num_frames: length of the video, at least :func:`frames_needed`.
        dilation: ascending offsets <= 0 to the current frame, the farthest first.

    Returns:
        Positions in file order; the current frame is the last one.
    """
    positions = list(range(num_frames))
    if random.random() < 0.5:
        positions.reverse()
    current = np.random.choice(np.arange(frames_needed(dilation) - 1, num_frames))
    offsets = [*dilation] if 0 in dilation else [*dilation, 0]
    return tuple(positions[current + offset] for offset in offsets)


def cut_test_clips(num_frames: int, size: int) -> list[tuple[int, ...]]:
    """Cuts a video into clips that hold every frame exactly once.

    Blocks of 3 * ``size`` frames give three clips of stride 3; what is left gives consecutive clips, the last of which
    may be shorter.  ``size`` 1 gives single frames in order.

    Args:
        num_frames: length of the video, any.
        size: frames of a clip, at least 1.

    Returns:
        Positions of every clip.
    """
    if size == 1:
        return [(position,) for position in range(num_frames)]
    block = _TEST_STRIDE * size
    left_over = num_frames - num_frames % block
    clips = [
        tuple(range(start + phase, start + block, _TEST_STRIDE))
        for start in range(0, left_over, block) for phase in range(_TEST_STRIDE)
    ]
    clips += [
        tuple(range(start, min(start + size, num_frames))) for start in range(left_over, num_frames, size)
    ]
    return clips
