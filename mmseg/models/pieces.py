"""Functions of single tokens, piece by piece: what is between their steps needs the memory of a piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PIECE = 6144  # tokens: of 1024 float32 numbers 24 MiB; glibc gives those above 32 MiB back to the system at once


def by_pieces(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` for a function that makes each token of those at the same place alone, so pieces are exact.

    Without gradients on the CPU it is called for equal parts of the tokens, whose wide forms use the same memory in
    turn; everywhere else once for all.

    Args:
        function: takes and gives ``[L, C]``, for any L; on a GPU and with gradients it gets ``inputs`` as they are.
        inputs: ``[..., C]``, all axes but the last equal.

    Returns:
        ``[..., C']``.
    """
    tokens = inputs[0].shape[:-1]
    if (
        inputs[0].device.type != 'cpu'
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or tokens.numel() <= _PIECE
    ):
        return function(*inputs)
    count = -(-tokens.numel() // _PIECE)
    pieces = zip(*(x.flatten(0, -2).chunk(count) for x in inputs))
    return torch.cat([function(*piece) for piece in pieces]).unflatten(0, tokens)
