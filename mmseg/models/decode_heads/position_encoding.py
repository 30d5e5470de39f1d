"""Where pixels are: sine encodings of their position in a map and in a clip, and their centres.

The encoding is that of DETR (arXiv 2005.12872) in the normalised form; the third axis is that of VisTR (arXiv
2011.14503).  A position depends on the size alone, so it is computed once for each size and kept; it has no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmseg.kernels.layers import cached

_TEMPERATURE = 10000.0
_SCALE = 2 * math.pi
_EPS = 1e-6


def _sine(length: int, channels: int, device: torch.device) -> Tensor:
    """[length, channels]: normalised index 1..length, sine on even and cosine on odd channels."""
    index = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    angle = index / (index[-1] + _EPS) * _SCALE
    pair = torch.arange(channels, device=device) // 2
    phase = angle[:, None] / _TEMPERATURE ** (2 * pair.to(torch.float32) / channels)
    return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), dim=2).flatten(1)


@cached
def _plane(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[height, width, channels], stored in this order: the order of tokens."""
    rows = _sine(height, channels // 2, device)[:, None].expand(-1, width, -1)
    columns = _sine(width, channels // 2, device)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=2).to(dtype)


@cached
def _line(frames: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[frames, channels]."""
    return _sine(frames, channels, device).to(dtype)


def sine_position_2d(
    height: int, width: int, channels: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Position of every pixel of a map.

    Args:
        height: rows of the map.
        width: columns of the map.
        channels: width of the encoding, a multiple of 4: the first half encodes y, the second x.
        device: where the result is wanted.
        dtype: of the result; computed in float32.

    Returns:
        [channels, height, width], shared between calls: do not write to it.  Its memory is channels-last, so that
        ``.flatten(1).T`` (tokens) is a view.

    Raises:
        ValueError: ``channels`` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f'sine position needs a multiple of 4 channels, got {channels}')
    return _plane(int(height), int(width), channels, torch.device(device), dtype).permute(2, 0, 1)


def sine_position_3d(
    frames: int,
    height: int,
    width: int,
    channels: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Position of every pixel of a clip: the 2-D encoding plus that of the frame index on all channels.

    Args:
        frames: length of the clip.
        height: rows of the map.
        width: columns of the map.
        channels: width of the encoding, a multiple of 4.
        device: where the result is wanted.
        dtype: of the result.

    Returns:
        [frames, channels, height, width], channels-last in memory.
    """
    plane = sine_position_2d(height, width, channels, device, dtype)
    return plane + _line(int(frames), channels, torch.device(device), dtype)[:, :, None, None]


@cached
def pixel_centres(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres of the pixels of several maps.

    Args:
        shapes: (height, width) of each map.
        device: where the result is wanted.

    Returns:
        float32 ``[sum of height * width, 2]``, (x, y) in 0..1, shared between calls: do not write to it.
    """
    centres = [
        torch.cartesian_prod(*((torch.arange(size, device=device) + 0.5) / size for size in shape)) for shape in shapes
    ]
    return torch.cat(centres).flip(1)
