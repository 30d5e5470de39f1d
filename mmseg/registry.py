"""Registries of named components; how a dict of a config is checked against a signature, and built.

A dict of a config holds the arguments of a class or a function, its *reader*: the one that ``type`` names in a
registry, or a fixed one, such as :class:`~mmseg.core.lr_schedule.LrSchedule` for ``lr_config``.  The reader's signature
says which keys there are, what they may be, and their defaults; arguments that are no keys are positional-only.  An
annotation ``Annotated[Mapping[str, Any], READER]`` says the same of a dict inside.  The registries are those of
mmengine; checking is our own, because an error must say which key is wrong, where it stands, and what was meant.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin

from mmengine.registry import Registry

from mmseg.utils.arguments import (
    Range,
    alternatives,
    annotations_of,
    check_value,
    entries,
    named_parameters,
    takes_any_name,
)
from mmseg.utils.errors import ConfigError, nearest

_MODELS = ['mmseg.models']
_DATASETS = ['mmseg.datasets']

BACKBONES = Registry('backbone', scope='mmseg', locations=_MODELS)
PIXEL_DECODERS = Registry('pixel decoder', scope='mmseg', locations=_MODELS)
TRANSFORMER_DECODERS = Registry('transformer decoder', scope='mmseg', locations=_MODELS)
LOSSES = Registry('mask loss', scope='mmseg', locations=_MODELS)
HEADS = Registry('decode head', scope='mmseg', locations=_MODELS)
SEGMENTORS = Registry('segmentor', scope='mmseg', locations=_MODELS)
DATASETS = Registry('dataset', scope='mmseg', locations=_DATASETS)
MASK_DECODERS = Registry('mask decoder', scope='mmseg', locations=_DATASETS)
PIPELINES = Registry('pipeline step', scope='mmseg', locations=_DATASETS)
HOOKS = Registry('hook', scope='mmseg', locations=['mmseg.core.hooks'])
OPTIMIZERS = Registry('optimizer', scope='mmseg', locations=['mmseg.core.optimizer'])

Reader: TypeAlias = Registry | Callable[..., Any]

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


def find(registry: Registry, name: Any, where: str) -> Callable[..., Any]:
    """The component registered as ``name``; a :class:`ConfigError` naming the nearest one where there is none."""
    if callable(name):
        return name
    is_name = isinstance(name, str) and all(name.split('.'))  # mmengine has no answer to others
    component = registry.get(name) if is_name else None
    if component is None:
        raise ConfigError(f"{where}.type: unknown {registry.name} '{name}'{nearest(str(name), registry.module_dict)}")
    return component


def keys_of(reader: Callable[..., Any]) -> set[str]:
    """Names that a dict for ``reader`` may hold, those that fall into ``**kwargs`` left out."""
    return named_parameters(reader) | set(_retired(reader))


def _retired(reader: Callable[..., Any]) -> Mapping[str, tuple[Any, ...]]:
    return getattr(reader, 'retired_arguments', {})


def check(cfg: Any, where: str, *readers: Reader) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """The class or function that each of ``readers`` means, and its arguments in ``cfg`` without the retired ones.

    Args:
        cfg: a dict of a config; dicts inside are checked as well.
        where: its dotted path.
        *readers: each key is for the first of them that knows it; a registry means what ``cfg['type']`` names there.

    Raises:
        ConfigError: an unknown ``type``, a key that no reader knows, a value that does not fit its annotation (see
            :mod:`mmseg.utils.arguments`), or a retired key with another value than it had.
    """
    registry = next((reader for reader in readers if isinstance(reader, Registry)), None)
    if registry is not None and (not isinstance(cfg, Mapping) or 'type' not in cfg):
        raise ConfigError(f"{where}: expected a dict with a 'type' key for a {registry.name}, got {cfg!r}")
    found = [find(reader, cfg['type'], where) if isinstance(reader, Registry) else reader for reader in readers]
    known = {key: i for i, component in reversed(list(enumerate(found))) for key in keys_of(component)}
    if not isinstance(cfg, Mapping):
        raise ConfigError(f'{where}: expected a dict with keys {", ".join(sorted(known))}, got {cfg!r}')
    name = getattr(found[-1], '__name__', str(found[-1])) if registry else where.rpartition('.')[2] or 'the config'
    args: list[dict[str, Any]] = [{} for _ in found]
    for key, value in cfg.items():
        if key == 'type' and registry is not None:
            continue
        place = f'{where}.{key}' if where else key
        if key not in known and not takes_any_name(found[-1]):
            raise ConfigError(f"{place}: {name} takes no argument '{key}'{nearest(key, known)}")
        index = known.get(key, -1)
        accepted = _retired(found[index]).get(key)
        if accepted is None:
            annotation = annotations_of(found[index]).get(key, Any)
            check_value(value, annotation, place)
            _check_inside(value, annotation, place)
            args[index][key] = value
        elif accepted and value not in accepted:
            allowed = ' or '.join(map(repr, accepted))
            raise ConfigError(f'{place}: {name} supports only {allowed}, got {value!r}; remove the key')
    return list(zip(found, args))


def check_arguments(reader: Callable[..., Any], args: Any, where: str) -> dict[str, Any]:
    """``args`` without the retired ones; see :func:`check`."""
    return check(args, where, reader)[0][1]


def _check_inside(value: Any, annotation: Any, where: str) -> None:
    """Checks the dicts in ``value`` whose annotation names readers."""
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        readers = [mark for mark in marks if not isinstance(mark, Range)]
        if readers and isinstance(value, Mapping):
            check(value, where, *readers)
    for alternative in alternatives(annotation):
        if get_origin(alternative) is Annotated:
            _check_inside(value, alternative, where)
        for place, item, inner in entries(value, alternative):
            _check_inside(item, inner, where + place)


@contextlib.contextmanager
def config_key(key: str) -> Iterator[str]:
    """Inside, errors show ``key`` (``'decode_head'``, ``'[3]'``) after the path so far; yields the whole path."""
    outer = _where.get()
    path = f'{outer}.{key}' if outer and not key.startswith('[') else outer + key
    token = _where.set(path)
    try:
        yield path
    finally:
        _where.reset(token)


def config_path(otherwise: str) -> str:
    """The path of the config that is being built, for an error message; ``otherwise`` outside of a config."""
    return _where.get() or otherwise


def build(reader: Reader, cfg: Any, key: str, *supplied: Any, **defaults: Any) -> Any:
    """Calls what ``cfg`` is read by with its arguments; ``cfg`` is left unchanged.

    Args:
        reader: a class or a function, or a registry in which ``cfg['type']`` names one.
        cfg: a dict of a config; where ``reader`` is no registry, None stands for an empty one.
        key: the key of ``cfg`` in the dict around it, for errors.
        *supplied: arguments of the caller, positional.
        **defaults: arguments of the caller where ``cfg`` has none.

    Raises:
        ConfigError: see :func:`check`; also an argument that is missing, or a value that the component refuses (it
            raises ``ValueError``).
    """
    with config_key(key) as where:
        ((component, args),) = check({} if cfg is None and not isinstance(reader, Registry) else cfg, where, reader)
        args = {**defaults, **args}
        what = f'{where}: {getattr(component, "__name__", component)}'
        try:
            inspect.signature(component).bind(*supplied, **args)
        except TypeError as error:
            raise ConfigError(f'{what}: {error}') from None
        try:
            return component(*supplied, **args)
        except ConfigError:
            raise
        except (ValueError, OverflowError) as error:
            raise ConfigError(f'{what}: {error}') from error
        except TypeError as error:  # of a base class that **kwargs go to
            if takes_any_name(component) and 'keyword argument' in str(error):
                raise ConfigError(f'{what}: {error}') from error
            raise
