"""Functions of single tokens, piece by piece: what is between their steps needs the memory of a piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmseg.kernels.autocast import product_dtype

# Of a piece whose tokens are 1024 numbers wide inside.  glibc gives what is above 32 MiB back to the system at once;
# far below, a piece finds the memory of the one before it also where other tensors have taken some of that meanwhile.
_BYTES = 8 * 2**20
_WIDTH = 1024


def by_pieces(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` for a function that makes each token of those at the same place alone, so pieces are exact.

    On the CPU it is called for equal parts of the tokens, whose wide forms use the same memory in turn (with gradients:
    memory that the process keeps); everywhere else once for all.

    Args:
        function: takes and gives ``[L, C]``, for any L; elsewhere it gets ``inputs`` as they are.
        inputs: ``[..., C]``, all axes but the last equal.

    Returns:
        ``[..., C']``.
    """
    tokens = inputs[0].shape[:-1]
    if inputs[0].device.type != 'cpu' or torch.compiler.is_compiling():
        return function(*inputs)
    count = -(-tokens.numel() * product_dtype(inputs[0]).itemsize * _WIDTH // _BYTES)
    if count <= 1:
        return function(*inputs)
    pieces = zip(*(x.flatten(0, -2).chunk(count) for x in inputs))
    return torch.cat([function(*piece) for piece in pieces]).unflatten(0, tokens)
