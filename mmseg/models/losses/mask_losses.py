"""Mask losses as pure functions: at points against the target, and on the cells of a map against self-labels.

Formulas: Mask2Former (arXiv 2112.01527) for the points; THE-Mask (arXiv 2309.08020) for the self-labels.  A loss in the
registry ``LOSSES`` maps logits and targets ``[..., N]`` at N points to one value ``[...]`` for each mask.  It may take
``known`` (bool ``[..., N]``), without which it is called for each mask anew where labels are unknown.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg.registry import LOSSES


@LOSSES.register_module(name='mask')
def bce_loss(logits: Tensor, targets: Tensor, /, known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the last axis: ``[..., N]`` logits and targets in [0, 1] -> ``[...]``."""
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')
    return each.mean(-1) if known is None else (each * known).sum(-1) / known.sum(-1).clamp(min=1)


@LOSSES.register_module(name='dice')
def dice_loss(logits: Tensor, targets: Tensor, /, known: Tensor | None = None) -> Tensor:
    """Dice loss with 1 added to numerator and denominator over the last axis: ``[..., N]`` -> ``[...]``, in [0, 1]."""
    probability = logits.sigmoid()
    if known is not None:
        probability, targets = probability * known, targets * known
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def loss_of_known(
    loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, known: Tensor | None
) -> Tensor:
    """``loss`` of each mask over the points whose label is known, ``[..., N]`` -> ``[...]``; 0 where none is.

    Args:
        loss: of the registry ``LOSSES``.
        logits: float ``[..., N]``.
        targets: float ``[..., N]``.
        known: bool ``[..., N]``; None: all are known.
    """
    if known is None:
        return loss(logits, targets)
    if 'known' in inspect.signature(loss).parameters:
        return loss(logits, targets, known=known)
    rows = zip(logits.flatten(0, -2), targets.flatten(0, -2), known.flatten(0, -2))
    values = [loss(x[k][None], t[k][None])[0] if k.any() else x.sum() * 0 for x, t, k in rows]
    return torch.stack(values).view(logits.shape[:-1])


def nearest_source(size: int, source: int, device: torch.device | str | None = None) -> Tensor:
    """Which source index each of ``size`` positions reads in a nearest resize from ``source``: int64 ``[size]``.

    Asked of ``F.interpolate`` itself, whose rounding differs from the textbook formula for some sizes.
    """
    indices = torch.arange(source, dtype=torch.float32, device=device)
    return F.interpolate(indices[None, None], size=size, mode='nearest')[0, 0].long()


def count_labels(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How many pixels of each mask, and how many at all, read each cell of a coarse map resized to the mask (nearest).

    Args:
        masks: float ``[R, H, W]`` of zeros and ones.
        size: (h, w) of the coarse map.

    Returns:
        counts ``[R, h, w]`` and area ``[h, w]``, both float with integer values.
    """
    height, width = masks.shape[-2:]
    rows = nearest_source(height, size[0], masks.device)
    columns = nearest_source(width, size[1], masks.device)
    narrow = masks.new_zeros(len(masks), height, size[1]).index_add_(2, columns, masks)
    counts = masks.new_zeros(len(masks), *size).index_add_(1, rows, narrow)
    row_sizes = masks.new_zeros(size[0]).index_add_(0, rows, masks.new_ones(height))
    column_sizes = masks.new_zeros(size[1]).index_add_(0, columns, masks.new_ones(width))
    return counts, row_sizes[:, None] * column_sizes


def self_labelled_losses(logits: Tensor, counts: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice, on every pixel of the label, of masks that learn only where they already agree with their target.

    The loss is defined on logits resized (nearest) to the label size, with label = target AND sigmoid > 0.5.  Nearest
    resizing repeats a logit over the pixels of its cell, so the label is the target where the sigmoid of the cell is
    above 0.5, and zero elsewhere; a sum over pixels is therefore a sum over cells weighted with the number of
    (target) pixels, exactly, at 1/16 of the work for masks at stride 4.

    Args:
        logits: float ``[..., h, w]``.
        counts: pixels of the target in each cell, float ``[..., h, w]`` (:func:`count_labels`).
        area: pixels of each cell, float ``[h, w]``, or known pixels of each mask's cells, ``[..., h, w]``.

    Returns:
        (bce, dice), each ``[...]``: mean over pixels, and dice with 1 in numerator and denominator.
    """
    logits, counts, area = logits.flatten(-2), counts.flatten(-2), area.flatten(-2)

    def total(values: Tensor) -> Tensor:
        return values @ area if area.dim() == 1 else (values * area).sum(-1)

    probability = logits.sigmoid()
    positives = counts * (probability.detach() > 0.5)
    bce = (total(F.softplus(logits)) - (logits * positives).sum(-1)) / area.sum(-1).clamp(min=1)
    overlap = (probability * positives).sum(-1)
    dice = 1 - (2 * overlap + 1) / (total(probability) + positives.sum(-1) + 1)
    return bce, dice
