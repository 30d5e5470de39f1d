"""Registries of named components, and the one function that builds from them.

A config names a component by ``type``; the other keys are its arguments.  The registries are those of mmengine;
building is our own, because an error must say which key is wrong, where it stands, and what was probably meant.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mmengine.registry import Registry

from mmseg.utils.arguments import annotations_of, check_value, named_parameters, takes_any_name
from mmseg.utils.errors import ConfigError, nearest

_MODELS = ['mmseg.models']
_DATASETS = ['mmseg.datasets']

BACKBONES = Registry('backbone', scope='mmseg', locations=_MODELS)
PIXEL_DECODERS = Registry('pixel decoder', scope='mmseg', locations=_MODELS)
TRANSFORMER_DECODERS = Registry('transformer decoder', scope='mmseg', locations=_MODELS)
HEADS = Registry('decode head', scope='mmseg', locations=_MODELS)
SEGMENTORS = Registry('segmentor', scope='mmseg', locations=_MODELS)
DATASETS = Registry('dataset', scope='mmseg', locations=_DATASETS)
PIPELINES = Registry('pipeline step', scope='mmseg', locations=_DATASETS)
HOOKS = Registry('hook', scope='mmseg', locations=['mmseg.core.hooks'])

_Component = TypeVar('_Component', bound=Callable[..., Any])
_where: contextvars.ContextVar[str] = contextvars.ContextVar('where', default='')


def retired(**accepted: tuple[Any, ...]) -> Callable[[_Component], _Component]:
    """Marks config keys of the 2023 reference that have no effect here.

    Each key maps to the values that may stand in a config; an empty tuple accepts any.  Another value is a
    :class:`ConfigError`, because ignoring it silently would change what the user asked for.
    """

    def mark(component: _Component) -> _Component:
        component.retired_arguments = accepted  # type: ignore[attr-defined]
        return component

    return mark


def register_variant(registry: Registry, name: str, component: _Component, **row: Any) -> _Component:
    """Registers ``component`` as ``name`` with other default arguments: a variant is a row of a table, not a subclass.

    The registered function shows the row's values as defaults in its signature; a config may still set any of them.
    """

    def variant(**overrides: Any) -> Any:
        return component(**{**row, **overrides})

    variant.__name__ = variant.__qualname__ = name
    variant.__doc__ = f':class:`{component.__name__}` with {row}.'
    variant.__wrapped__ = component  # type: ignore[attr-defined]
    variant.__signature__ = inspect.signature(functools.partial(component, **row))  # type: ignore[attr-defined]
    variant.retired_arguments = getattr(component, 'retired_arguments', {})  # type: ignore[attr-defined]
    return registry.register_module(module=variant)


def registered(registry: Registry, name: Any) -> Callable[..., Any] | None:
    """The component of that name, if there is one."""
    is_name = isinstance(name, str) and all(name.split('.'))  # mmengine has no answer to others
    return registry.get(name) if is_name else None


def find(registry: Registry, name: Any, where: str) -> Callable[..., Any]:
    """The component registered as ``name``; a :class:`ConfigError` naming the nearest one where there is none."""
    if callable(name):
        return name
    component = registered(registry, name)
    if component is None:
        raise ConfigError(f"{where}.type: unknown {registry.name} '{name}'{nearest(str(name), registry.module_dict)}")
    return component


def unknown_argument(component: Callable[..., Any], name: str) -> str | None:
    """None where a config may give ``name`` to ``component``; else the nearest names, for an error."""
    known = named_parameters(component) | set(getattr(component, 'retired_arguments', {}))
    return None if name in known or takes_any_name(component) else nearest(name, known)


def check_arguments(component: Callable[..., Any], args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``args`` without the retired ones.

    Raises:
        ConfigError: a name that ``component`` does not take, a value that does not fit its annotation (see
            :mod:`mmseg.utils.arguments`), or a retired one.
    """
    retired_here = getattr(component, 'retired_arguments', {})
    label = getattr(component, '__name__', str(component))
    annotations = annotations_of(component)
    kept = {}
    for key, value in args.items():
        near = unknown_argument(component, key)
        if near is not None:
            raise ConfigError(f"{where}.{key}: {label} takes no argument '{key}'{near}")
        if key not in retired_here:
            check_value(value, annotations.get(key, Any), f'{where}.{key}')
            kept[key] = value
        elif retired_here[key] and value not in retired_here[key]:
            allowed = ' or '.join(map(repr, retired_here[key]))
            raise ConfigError(f'{where}.{key}: {label} supports only {allowed}, got {value!r}; remove the key')
    return kept


@contextlib.contextmanager
def standing_at(where: str) -> Iterator[str]:
    """Adds ``where`` to the config path that error messages of nested :func:`build` calls show; yields that path."""
    outer = _where.get()
    path = f'{outer}.{where}' if outer and not where.startswith('[') else outer + where
    token = _where.set(path)
    try:
        yield path
    finally:
        _where.reset(token)


def config_path(otherwise: str) -> str:
    """Where the config that is being built stands, for an error message; ``otherwise`` outside of a config."""
    return _where.get() or otherwise


def build(registry: Registry, cfg: Any, where: str, **defaults: Any) -> Any:
    """Builds the component that ``cfg['type']`` names in ``registry``; ``cfg`` is left unchanged.

    Args:
        registry: where the name is looked up.
        cfg: mapping with ``type``; its other keys are keyword arguments and win over ``defaults``.
        where: the key under which ``cfg`` stands in its parent (``'decode_head'``, ``'[3]'``); used in errors.
        **defaults: arguments that the caller supplies.

    Raises:
        ConfigError: unknown ``type``, an argument that the component does not take, or a missing one.
    """
    with standing_at(where) as path:
        component, args = check_component(registry, cfg, path)
        return construct(component, {**defaults, **args}, path)


def check_component(registry: Registry, cfg: Any, where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The component that ``cfg`` names, and the arguments that it is given there.

    Raises:
        ConfigError: see :func:`build`.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ConfigError(f"{where}: expected a dict with a 'type' key for a {registry.name}, got {cfg!r}")
    component = find(registry, cfg['type'], where)
    return component, check_arguments(component, {k: v for k, v in cfg.items() if k != 'type'}, where)


def construct(component: Callable[..., Any], args: Mapping[str, Any], where: str) -> Any:
    """Calls ``component``; what it says against its arguments becomes an error that tells where they stand.

    Raises:
        ConfigError: an argument is missing, or the component refuses a value (it raises ``ValueError``).
    """
    label = getattr(component, '__name__', component)
    try:
        inspect.signature(component).bind(**args)
    except TypeError as error:
        raise ConfigError(f'{where}: {label}: {error}') from None
    try:
        return component(**args)
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:
        raise ConfigError(f'{where}: {label}: {error}') from error
    except TypeError as error:  # of a base class that **kwargs go to
        if takes_any_name(component) and 'keyword argument' in str(error):
            raise ConfigError(f'{where}: {label}: {error}') from error
        raise
