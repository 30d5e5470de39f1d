"""Stand-ins for what a pickle makes numpy arrays and numbers with, that are safe whatever the pickle asks for.

numpy's own constructors trust the file: a dtype takes flags from it that make numpy follow bytes of the file as if they
were pointers.  These build numbers, truth values and strings only, and take nothing from the file but kind, size, byte
order, shape and bytes.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = re.compile(r'[biuf]\d{1,2}|[SU]\d{1,9}')
_MAX_AXES = 32
_ORDERS = ('<', '>', '=', '|')


class _Dtype:
    """Stands for a dtype until an array or a number is made with it."""

    def __init__(self, kind: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(kind, str) or not _KINDS.fullmatch(kind):
            raise pickle.UnpicklingError(f'it asks for the type {kind!r}, and only numbers and strings are read')
        self.real = np.dtype(kind)

    def __setstate__(self, state: tuple) -> None:
        _, order, *parts = state  # the rest are sizes and flags, which follow from the kind
        if order not in _ORDERS or any(part is not None for part in parts[:3]):
            raise pickle.UnpicklingError('it asks for structured arrays, and only numbers and strings are read')
        self.real = self.real.newbyteorder(order)


class _Array(np.ndarray):
    """An array that a pickle fills once: filled again, it would free memory that others may still use."""

    _filled = False

    def __new__(cls) -> _Array:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, column_major, content = state
        if self._filled or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError('it holds an array that is not plain numbers or strings')
        content = _checked_content(content, dtype, shape)
        self._filled = True
        super().__setstate__((1, shape, dtype.real, bool(column_major), content))  # type: ignore[arg-type]
        if dtype.real.kind == 'U':
            self.tolist()  # raises ValueError for what is no text

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()  # a plain array for whoever reads it


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return np.ndarray((), dtype.real, _checked_content(content, dtype))[()]


def _checked_content(content: bytes | str, dtype: _Dtype, shape: tuple[int, ...] = ()) -> bytes:
    if isinstance(content, str):  # written by Python 2
        content = content.encode('latin1')
    if len(shape) > _MAX_AXES or any(size < 0 for size in shape):
        raise pickle.UnpicklingError(f'it holds an array of the shape {shape}')
    expected = math.prod(shape) * dtype.real.itemsize
    if not isinstance(content, bytes) or len(content) != expected:
        raise pickle.UnpicklingError(f'it holds an array whose content is not the {expected} bytes that it takes')
    return content


def _empty_bytes() -> bytes:
    return b''


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **{f'{module}.bytes': _empty_bytes for module in ('builtins', '__builtin__')},
    'numpy.ndarray': _Array,
    'numpy.dtype': _Dtype,
    **{f'numpy.{core}.multiarray._reconstruct': _reconstruct for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
}
