"""What a backbone's weights expect of images."""

from __future__ import annotations

from typing import NamedTuple


class Normalisation(NamedTuple):
    """(x - mean) / std of each channel, for x in 0..255.

    Attributes:
        mean: of the three channels.
        std: of the three channels.
        to_rgb: channels are R, G, B; otherwise B, G, R.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: bool = True


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
