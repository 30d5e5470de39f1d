"""Random overrides of a config: values of wrong types and out of range, at any place of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

# no large numbers: a model of a million layers is allowed, and is not built in the time of a test
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, 7, 32, -1, -5, 0.0, 0.5, 1.5, -0.5, 1e-8, math.nan, math.inf, -math.inf,
    '', 'x', '3', 'auto', 'None', '~/x', 'a.b', 'ü', (), [], [0], [1, 2], (1, 2), [-3], ['x'], ('x', 'y'), [None],
    [[1, 2], [3, 4]], [math.nan, 1], {}, {'x': 1}, {'type': 'x'}, {'type': 3}, {'type': None}, [{}], [{'type': 'x'}],
    {'channels': 3}, [1, 2, 3, 4], (0, 0, 0, 0), [3.5, 2, 1, 1], b'x', 2j)


def places(cfg: Any, path: str = '') -> Iterator[str]:
    """Dotted path of every key and list entry."""
    if isinstance(cfg, Mapping):
        entries: Any = cfg.items()
    elif isinstance(cfg, (list, tuple)):
        entries = enumerate(cfg)
    else:
        return
    for key, value in entries:
        place = f'{path}.{key}' if path else str(key)
        yield place
        yield from places(value, place)


def arguments(cfg: Any, path: str = '') -> Iterator[str]:
    """Dotted path of every argument that a component of ``cfg`` takes and has no value for there."""
    from mmseg import registry
    from mmseg.config import SECTIONS, readers_of
    from mmseg.registry import Registry, keys_of

    known: set[str] = set()
    if isinstance(cfg, Mapping):
        readers = readers_of(path) if path in SECTIONS else []
        if isinstance(cfg.get('type'), str):
            registries = [value for value in vars(registry).values() if isinstance(value, Registry)]
            readers += [found for place in registries if (found := place.get(cfg['type'])) is not None]
        known = {key for reader in readers if not isinstance(reader, Registry) for key in keys_of(reader)} - set(cfg)
        for key, value in cfg.items():
            yield from arguments(value, f'{path}.{key}' if path else str(key))
    elif isinstance(cfg, (list, tuple)):
        for index, value in enumerate(cfg):
            yield from arguments(value, f'{path}.{index}')
    yield from (f'{path}.{key}' for key in sorted(known))


def random_overrides(cfg: Any, rng: random.Random, most: int = 2) -> dict[str, Any]:
    """One to ``most`` overrides of keys that stand in ``cfg`` or could stand there.

    Args:
        cfg: a loaded config.
        rng: what is drawn from.
        most: how many.

    Returns:
        Dotted keys to values, for ``load_config`` and ``override``.
    """
    sections = dict(cfg.items())
    keys = [*places(sections), *arguments(sections)]
    return {key: rng.choice(VALUES) for key in rng.sample(keys, rng.randint(1, most))}
