"""Half precision: what products are computed in, and copies of their weights while an evaluation lasts.

Autocast casts the float32 inputs of every product.  In training that is what gradients need.  In an evaluation the
weights do not change, so each is cast once: a copy in the low type lies beside the parameter, which stays as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which computes the products, takes ``dtype`` on this processor; PyTorch's own form is slow."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    name = 'bf16' if dtype == torch.bfloat16 else 'fp16'
    return bool(getattr(torch.ops.mkldnn, f'_is_mkldnn_{name}_supported')())


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in: autocast casts float32."""
    device = x.device.type
    cast = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def without_autocast(of: Tensor | str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off for the device of a tensor, or a type of devices, where it is on; none need have it."""
    device = of if isinstance(of, str) else of.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocasts(device_type: str) -> bool:
    """Whether the device has autocast and it is on."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    """A constant for the compiler, which could not trace the question in torch 2.11."""
    return torch.amp.is_autocast_available(device_type)


class _Copy(NamedTuple):
    """A weight in a low type, and the version of the weight that it was made from."""

    tensor: Tensor
    version: int


class ProductLayer(nn.Module):
    """A layer whose weights enter products; :func:`low_copies` keeps copies of them.

    Copies live outside the layer, so that nothing which looks into it (state dict, deepcopy, optimizer, DDP) sees them.
    """

    product_weights: tuple[str, ...] = ('weight', 'bias')

    def weights_for(self, x: Tensor) -> list[Tensor | None]:
        """The layer's weights for a product with ``x``: copies where autocast would cast, else the parameters."""
        weights = [getattr(self, name) for name in self.product_weights]
        if not _copies or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return weights
        held = _copies.get(self, {})
        device = x.device.type
        if not held or not autocasts(device):
            return weights
        dtype = torch.get_autocast_dtype(device)
        if dtype not in held or product_dtype(x) != dtype:
            return weights
        copies = held[dtype].tensors
        return [_current(copies, name, weight, dtype) for name, weight in zip(self.product_weights, weights)]


class _Held:
    """Copies of one layer in one type, and how many evaluations use them."""

    def __init__(self) -> None:
        self.users = 0
        self.tensors: dict[str, _Copy] = {}


_copies: WeakKeyDictionary[nn.Module, dict[torch.dtype, _Held]] = WeakKeyDictionary()
_lock = threading.Lock()


def _current(copies: dict[str, _Copy], name: str, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The copy of a weight, made at its first use, and anew where the weight has changed since."""
    if weight is None or weight.dtype != torch.float32 or weight.is_inference():
        return weight
    copy = copies.get(name)
    if copy is None or copy.version != weight._version or copy.tensor.device != weight.device:
        copy = copies[name] = _Copy(weight.detach().to(dtype), weight._version)
    return copy.tensor


@contextlib.contextmanager
def low_copies(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While this lasts, evaluations of ``model`` under autocast to ``dtype`` read copies of its weights.

    Several threads and generators may be inside at once; the last to leave frees the copies.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, ProductLayer)]
    with _lock:
        for layer in layers:
            _copies.setdefault(layer, {}).setdefault(dtype, _Held()).users += 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                held = _copies.get(layer)
                if held is None:  # the layer is being freed together with a generator that is inside
                    continue
                held[dtype].users -= 1
                if not held[dtype].users:
                    del held[dtype]
                if not held:
                    del _copies[layer]
