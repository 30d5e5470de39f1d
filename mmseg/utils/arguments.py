"""Whether the value of a config fits the annotation of the argument that it is given to.

Checked are numbers, texts, lists and dicts; a list may stand for a tuple and a whole number for a float, as in config
files.  What an annotation says beyond that is not checked.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from mmseg.utils.errors import ConfigError

_NO_LIMIT = 10**9  # of a count: more is a slip, or does not fit into what torch counts with
_OPEN = (_NO_LIMIT, 1e30, math.inf)  # not worth a word in an error


@dataclass(frozen=True)
class Range:
    """Limits of a number, in ``Annotated[float, Range(0, 1)]``; both are allowed themselves, and NaN never is.

    Attributes:
        least: the smallest value.
        most: the largest value; infinity is only allowed where it stands here.
        above: ``least`` itself is too small.
    """

    least: float
    most: float = 1e30
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        least = f'{"above" if self.above else "at least"} {self.least}'
        return least if self.most in _OPEN else f'{least}, at most {self.most}'


Count = Annotated[int, Range(1, _NO_LIMIT)]
Index = Annotated[int, Range(0, _NO_LIMIT)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, above=True)]
Ratio = Annotated[float, Range(1)]
Label = Annotated[int, Range(0, 255)]
Port = Annotated[int, Range(1, 65535)]
Positive = Annotated[float, Range(0, math.inf, above=True)]

_UNIONS = (typing.Union, types.UnionType)
_PLAIN: dict[Any, Any] = {
    type(None): type(None), bool: (bool, np.bool_), int: numbers.Integral, float: numbers.Real, str: str}
_NAMED_ONLY = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LISTS = (tuple, list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def named_parameters(component: Callable[..., Any]) -> set[str]:
    """Names under which ``component`` takes arguments, those that fall into its ``**kwargs`` left out."""
    return {p.name for p in inspect.signature(component).parameters.values() if p.kind in _NAMED_ONLY}


def takes_any_name(component: Callable[..., Any]) -> bool:
    """Whether ``component`` has ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(component).parameters.values())


@functools.cache
def annotations_of(component: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each named parameter; of none where one of them cannot be resolved at run time."""
    function = inspect.unwrap(component)
    try:
        hints = typing.get_type_hints(
            function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except Exception:  # names that only a type checker imports
        return {}
    return {name: hints[name] for name in named_parameters(component) if name in hints}


def check_value(value: Any, annotation: Any, where: str) -> None:
    """Raises where ``value`` does not fit.

    Raises:
        ConfigError: naming the innermost list entry or key that is wrong.
    """
    if fits(value, annotation):
        return
    others = [a for a in alternatives(annotation) if a is not type(None)]
    holding = [a for a in others if any(True for _ in entries(value, a))]
    if len(holding) == 1:
        for place, item, inner in entries(value, holding[0]):
            check_value(item, inner, where + place)
    words = [a for other in others if typing.get_origin(other) is Literal for a in typing.get_args(other)]
    close = difflib.get_close_matches(str(value), filter(lambda word: isinstance(word, str), words), 1, cutoff=0.5)
    raise ConfigError(
        f'{where}: expected {expected(annotation)}, got {reprlib.repr(value)} ({type(value).__name__})'
        + (f" (did you mean '{close[0]}'?)" if close else ''))


def expected(annotation: Any) -> str:
    """The annotation as an error shows it: ``int, at least 1``, ``list of str or None``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return ', '.join([expected(args[0]), *(str(limit) for limit in args[1:] if isinstance(limit, Range))])
    if origin in _UNIONS:
        return ' or '.join(map(expected, args))
    if origin is Literal:
        return ' or '.join(map(repr, args))
    if annotation is type(None):
        return 'None'
    if origin is tuple and args and args[-1] is not ...:
        parts = list(dict.fromkeys(map(expected, args)))
        return f'list of {len(args)} ({parts[0]} each)' if len(parts) == 1 else f'list of ({"; ".join(parts)})'
    if (origin or annotation) in _LISTS:
        return f'list of {expected(args[0])}' if args and args[0] is not Any else 'list'
    if (origin or annotation) in _DICTS:
        return f'dict of {expected(args[1])}' if args and args[1] is not Any else 'dict'
    if origin is collections.abc.Callable:
        return 'callable'
    if _is_path(annotation):
        return 'path'
    return getattr(annotation, '__name__', str(annotation))


def fits(value: Any, annotation: Any) -> bool:
    """Whether an argument that is annotated so may have this value."""
    kind, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        return fits(value, args[0]) and all(value in limit for limit in args[1:] if isinstance(limit, Range))
    if kind in _UNIONS:
        return any(fits(value, a) if _is_known(a) else _may_be(value, a) for a in args)
    if kind is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in args)
    if kind in _PLAIN:
        return isinstance(value, _PLAIN[kind]) and (kind is bool or not isinstance(value, bool))
    if kind is collections.abc.Callable:
        return callable(value)
    if _is_path(kind):
        return isinstance(value, (str, os.PathLike))
    if kind in _DICTS:
        alike = isinstance(value, collections.abc.Mapping)
    elif kind in _LISTS:
        alike = _is_list(value) and (kind is not tuple or not args or args[-1] is ... or len(value) == len(args))
    else:
        return True
    return alike and all(fits(item, inner) for _, item, inner in entries(value, annotation))


def entries(value: Any, annotation: Any) -> Iterator[tuple[str, Any, Any]]:
    """Place, item and annotation of each entry of a list or dict; nothing where value and annotation are neither."""
    kind, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in _DICTS and isinstance(value, collections.abc.Mapping) and args:
        for key, item in value.items():
            yield f' (key {key!r})', key, args[0]
            yield f'.{key}', item, args[1]
    elif kind in _LISTS and _is_list(value) and args:
        if kind is tuple and args[-1] is not ...:
            inner = args if len(args) == len(value) else ()
        else:
            inner = (args[0],) * len(value)
        for i, (item, own) in enumerate(zip(value, inner)):
            yield f'[{i}]', item, own


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation itself where it is none."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)


def _is_known(annotation: Any) -> bool:
    """Whether the annotation is one that is checked; any other class may be something that a config stands for."""
    kind = typing.get_origin(annotation) or annotation
    known = (*_PLAIN, *_UNIONS, *_LISTS, *_DICTS, collections.abc.Callable, Annotated, Literal)
    return kind in known or _is_path(kind)


def _is_path(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, os.PathLike)


def _may_be(value: Any, unknown: Any) -> bool:
    """Whether ``value`` may be of another class than those that are known here; numbers, texts and lists are none."""
    plain = value is None or isinstance(value, (numbers.Number, str, bytes)) or _is_list(value)
    return not plain or (inspect.isclass(unknown) and isinstance(value, unknown))


def _is_list(value: Any) -> bool:
    """A text is no list, though Python calls it a sequence."""
    return isinstance(value, (collections.abc.Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
