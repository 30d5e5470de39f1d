"""What autocast does to the inputs of products, for code that chooses kernels or casts early."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in: autocast casts float32."""
    device = x.device.type
    cast = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """``x`` as autocast casts it, for those whose several linear layers would each cast it anew; without gradients.

    With gradients ``x`` stays as it is, so that what comes back from the layers is summed in float32.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.amp.is_autocast_available(x.device.type):
        return x
    return x.to(product_dtype(x))
