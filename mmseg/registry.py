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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin

from mmengine.registry import Registry

from mmseg.utils.arguments import alternatives, annotations_of, check_value, entries, named_parameters, takes_any_name
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
PIPELINES = Registry('pipeline step', scope='mmseg', locations=_DATASETS)
HOOKS = Registry('hook', scope='mmseg', locations=['mmseg.core.hooks'])
OPTIMIZERS = Registry('optimizer', scope='mmseg', locations=['mmseg.core.optimizer'])

Reader: TypeAlias = Registry | Callable[..., Any]

_Component = TypeVar('_Component', bound=Callable[..., Any])
_where: contextvars.ContextVar[str] = contextvars.ContextVar('where', default='')
_builders: dict[str, tuple[Callable[..., Any]]] = {}


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


def read_beside(registry: Registry) -> Callable[[_Component], _Component]:
    """Marks a signature whose keys may stand in every config of ``registry``, for whoever builds from it."""

    def mark(signature: _Component) -> _Component:
        _builders[registry.name] = (signature,)
        return signature

    return mark


@read_beside(HOOKS)
def hook_keys(priority: str | int | None = None) -> None:
    """A hook in a config.

    Args:
        priority: hooks are called in this order: 0 (first) to 100, or a name such as ``NORMAL``; None: the hook's own.
    """


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


def check(reader: Reader, cfg: Any, where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What ``cfg`` is read by, and its arguments; dicts inside are checked as well.

    Args:
        reader: a class or a function, or a registry in which ``cfg['type']`` names one.
        cfg: a dict of a config.
        where: the dotted path of ``cfg``.

    Raises:
        ConfigError: an unknown ``type``, and what :func:`split_arguments` refuses.
    """
    if not isinstance(reader, Registry):
        return reader, check_arguments(reader, cfg, where)
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ConfigError(f"{where}: expected a dict with a 'type' key for a {reader.name}, got {cfg!r}")
    component = find(reader, cfg['type'], where)
    args = {key: value for key, value in cfg.items() if key != 'type'}
    readers = (*_builders.get(reader.name, ()), component)
    return component, split_arguments(readers, args, where, getattr(component, '__name__', str(component)))[-1]


def check_arguments(reader: Callable[..., Any], args: Any, where: str) -> dict[str, Any]:
    """``args`` without the retired ones; see :func:`split_arguments`."""
    return split_arguments((reader,), args, where)[0]


def split_arguments(
    readers: Sequence[Callable[..., Any]], args: Any, where: str, name: str = ''
) -> list[dict[str, Any]]:
    """The arguments of each of ``readers`` in a dict of a config, without the retired ones; ``name`` is for errors.

    Raises:
        ConfigError: a key that none of them knows, a value that does not fit its annotation (see
            :mod:`mmseg.utils.arguments`), or a retired key with another value than it had.
    """
    known = {key: i for i, reader in reversed(list(enumerate(readers))) for key in keys_of(reader)}
    if not isinstance(args, Mapping):
        raise ConfigError(f'{where}: expected a dict with keys {", ".join(sorted(known))}, got {args!r}')
    name = name or where.rpartition('.')[2] or 'the config'
    shares: list[dict[str, Any]] = [{} for _ in readers]
    for key, value in args.items():
        place = f'{where}.{key}' if where else key
        if key not in known and not takes_any_name(readers[-1]):
            raise ConfigError(f"{place}: {name} takes no argument '{key}'{nearest(key, known)}")
        index = known.get(key, -1)
        accepted = _retired(readers[index]).get(key)
        if accepted is None:
            annotation = annotations_of(readers[index]).get(key, Any)
            check_value(value, annotation, place)
            _check_inside(value, annotation, place)
            shares[index][key] = value
        elif accepted and value not in accepted:
            allowed = ' or '.join(map(repr, accepted))
            raise ConfigError(f'{place}: {name} supports only {allowed}, got {value!r}; remove the key')
    return shares


def _check_inside(value: Any, annotation: Any, where: str) -> None:
    """Checks the dicts in ``value`` whose annotation names a reader."""
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        for reader in marks:
            if isinstance(value, Mapping) and (isinstance(reader, Registry) or callable(reader)):
                check(reader, value, where)
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
        reader: as in :func:`check`.
        cfg: a dict of a config; where ``reader`` is no registry, None stands for an empty one.
        key: the key of ``cfg`` in the dict around it, for errors.
        *supplied: arguments of the caller, positional.
        **defaults: arguments of the caller where ``cfg`` has none.

    Raises:
        ConfigError: see :func:`check`; also an argument that is missing, or a value that the component refuses (it
            raises ``ValueError``).
    """
    with config_key(key) as where:
        component, args = check(reader, {} if cfg is None and not isinstance(reader, Registry) else cfg, where)
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
