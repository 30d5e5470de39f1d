"""Colours for data sets that have none of their own."""

from __future__ import annotations


def voc_palette(classes: int) -> tuple[tuple[int, int, int], ...]:
    """The colour map of PASCAL VOC, without the black of its class 0.

    Bit by bit, lowest first, the number of a class goes to red, green and blue in turn, from their highest bit down.

    >>> voc_palette(3)
    ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    return tuple(_colour(number) for number in range(1, classes + 1))


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = (
        sum((number >> 3 * place + channel & 1) << 7 - place for place in range(8)) for channel in range(3))
    return red, green, blue
