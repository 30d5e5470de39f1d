"""Precision on CPU and GPU: which dtype the forward pass computes in, the scaling of the loss, torch's own switches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mmseg.kernels.half import cpu_computes_in, low_copies
from mmseg.registry import check_arguments
from mmseg.utils.arguments import Factor, fits
from mmseg.utils.errors import ConfigError, nearest

_FP16_HOOKS = ('Fp16OptimizerHook', 'GradientCumulativeFp16OptimizerHook')
_OPTIMIZER_HOOKS = ('OptimizerHook', 'GradientCumulativeOptimizerHook', *_FP16_HOOKS)
_MATMUL_PRECISIONS = ('highest', 'high', 'medium')
_DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def set_backends(cfg: Mapping[str, Any]) -> None:
    """Sets what a config says of torch's libraries, for the whole process.

    ``cudnn_benchmark`` (default false; not with ``deterministic``): try the convolutions of each size.
    ``float32_matmul_precision`` (default: as torch has it, ``'highest'``): ``'high'`` lets float32 products run in TF32
    on a GPU, faster and with ten bits of mantissa; see ``torch.set_float32_matmul_precision``.

    Raises:
        ConfigError: an unknown precision.
    """
    if not cfg.get('deterministic', False):
        torch.backends.cudnn.benchmark = cfg.get('cudnn_benchmark', False)
    wanted = cfg.get('float32_matmul_precision')
    if wanted is None:
        return
    if wanted not in _MATMUL_PRECISIONS:
        raise ConfigError(
            f"float32_matmul_precision: expected one of {', '.join(_MATMUL_PRECISIONS)}, got '{wanted}'"
            f'{nearest(str(wanted), _MATMUL_PRECISIONS)}')
    torch.set_float32_matmul_precision(wanted)


class Precision:
    """The ``fp16`` section of a config.

    Args:
        device: where the model runs.
        dtype: ``bfloat16`` (no loss scaling), ``float16``, or ``float32`` for full precision.
            A processor without instructions for it computes in float32, and a warning says so.
        loss_scale: for ``float16``: a number keeps the scale fixed, ``'dynamic'`` adapts it, a dict adapts it with
            these arguments of ``torch.amp.GradScaler`` (mmcv 1.x's three forms; 512 is its default).

    Attributes:
        dtype: what the forward pass computes in.

    Raises:
        ConfigError: unknown dtype or form of ``loss_scale``.
    """

    def __init__(self, device: torch.device, /, dtype: str = 'float16', loss_scale: Any = 512.0) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"fp16.dtype: expected one of {', '.join(_DTYPES)}, got '{dtype}'")
        self.device = device
        self.dtype = wanted = _DTYPES[dtype]
        if device.type == 'cpu' and not cpu_computes_in(wanted):
            self.dtype = torch.float32
            warnings.warn(
                f'this processor has no instructions for {dtype}, in which PyTorch would take ten times as long: '
                'everything is computed in float32', stacklevel=2)
        self.fixed_scale: float | None = None
        options: dict[str, Any] = {}
        if isinstance(loss_scale, Mapping):
            options = {k: v for k, v in loss_scale.items() if k != 'mode'}  # mmcv's own key; the others are torch's
            check_arguments(torch.amp.GradScaler, options, 'fp16.loss_scale')
        elif fits(loss_scale, Factor):
            self.fixed_scale = float(loss_scale)
            options = {'init_scale': self.fixed_scale}
        elif loss_scale != 'dynamic':
            raise ConfigError(f"fp16.loss_scale: expected a number above 0, 'dynamic' or a dict, got {loss_scale!r}")
        try:
            self.scaler = torch.amp.GradScaler(device.type, enabled=wanted == torch.float16, **options)
        except (TypeError, AssertionError) as error:  # device and enabled are given here; limits of torch
            raise ConfigError(f'fp16.loss_scale: {error}') from None

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], device: torch.device) -> Precision:
        """What a config asks for.

        Args:
            cfg: the whole config.  A section ``fp16`` holds this class's arguments, and may be empty; mmcv's other way
                to say it is ``optimizer_config`` with type ``Fp16OptimizerHook`` and maybe ``loss_scale``.
            device: where the model runs.

        Raises:
            ConfigError: see the class; also an unknown ``optimizer_config.type``.
        """
        update = dict(cfg.get('optimizer_config') or {})
        kind = update.get('type', 'OptimizerHook')
        if kind not in _OPTIMIZER_HOOKS:
            raise ConfigError(f"optimizer_config.type: unknown type '{kind}'{nearest(str(kind), _OPTIMIZER_HOOKS)}")
        section = cfg.get('fp16')
        if section is None and kind not in _FP16_HOOKS:
            if 'loss_scale' in update:
                raise ConfigError(
                    "optimizer_config.loss_scale: goes with type='Fp16OptimizerHook'; or set fp16.loss_scale")
            return cls(device, 'float32')
        scale = {'loss_scale': update['loss_scale']} if 'loss_scale' in update else {}
        return cls(device, **check_arguments(cls, scale | dict(section or {}), 'fp16'))

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled; then an overflow of the gradient skips a step instead of being an error."""
        return self.scaler.is_enabled()

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context for a forward pass."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype) if enabled else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluation(self, model: torch.nn.Module) -> Iterator[None]:
        """The context for forward passes without gradients: weights of products are cast once while it lasts."""
        if self.dtype == torch.float32:
            yield
            return
        with low_copies(model, self.dtype), self.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``, scaled where the dtype asks for it."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, skip: bool = False) -> None:
        """Updates the weights; leaves them if told to ``skip``, or where a scaled gradient overflowed."""
        if not skip:
            self.scaler.step(optimizer)
        self.scaler.update(self.fixed_scale)
