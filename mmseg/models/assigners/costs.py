"""What it costs to give a query to a target: pure functions from predictions and targets to a cost matrix.

Formulas: Mask2Former (arXiv 2112.01527), mask costs on sampled points.
"""

from __future__ import annotations

from torch import Tensor

_PRODUCT_LENGTH = 64


def classification_cost(logits: Tensor, classes: Tensor) -> Tensor:
    """Minus the softmax probability of each target's class.

    Args:
        logits: float ``[Q, K + 1]``.
        classes: int64 ``[n]`` in 0..K-1.

    Returns:
        float ``[Q, n]`` in [-1, 0].
    """
    return -logits.softmax(-1)[:, classes]


def mask_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of every mask against every target.

    BCE(x, t) = softplus(x) - x t, so one sum over points for each mask and one matrix product are all there is to it.

    Args:
        logits: float ``[Q, P]``, masks at P points.
        targets: float ``[n, P]`` in [0, 1].

    Returns:
        float ``[Q, n]``.
    """
    return (_sum_of_softplus(logits)[:, None] - logits @ targets.t()) / logits.shape[1]


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss (1 in numerator and denominator) of every mask against every target.

    Args:
        logits: float ``[Q, P]``, masks at P points.
        targets: float ``[n, P]`` in [0, 1].

    Returns:
        float ``[Q, n]`` in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = probability @ targets.t()
    return 1 - (2 * overlap + 1) / (probability.sum(1)[:, None] + targets.sum(1) + 1)


def _sum_of_softplus(x: Tensor) -> Tensor:
    """Row sums of softplus(x) = relu(x) - log sigmoid(|x|), with one logarithm for every 64 elements.

    sigmoid(|x|) lies in [1/2, 1], so a product of 64 of them stays above 2^-64, well inside float32, and
    the sum of their logarithms is the logarithm of the product: a third of the time of softplus.
    """
    sigmoid = x.abs().sigmoid_()
    groups = x.shape[1] // _PRODUCT_LENGTH
    whole = groups * _PRODUCT_LENGTH
    logs = sigmoid[:, :whole].unflatten(1, (groups, _PRODUCT_LENGTH)).prod(2).log().sum(1)
    return x.relu().sum(1) - logs - sigmoid[:, whole:].log().sum(1)
