"""Variables of a config: a value ``'${crop_size}'`` stands for the key ``crop_size`` at the top level.

A base config that uses one follows the file that inherits it, and ``--options crop_size=(320,320)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from mmseg.utils.errors import ConfigError, nearest

_REFERENCE = re.compile(r'\$\{([A-Za-z_]\w*)\}')


def fill_in_variables(cfg: Config) -> None:
    """Replaces every reference in ``cfg``, in place.

    Raises:
        ConfigError: a reference to a key that is not there, or to one that holds references itself.
    """
    for key in list(cfg):
        cfg[key] = _filled(cfg[key], cfg, key)


def _filled(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return type(value)({key: _filled(inner, variables, f'{where}.{key}') for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(inner, variables, f'{where}[{i}]') for i, inner in enumerate(value))
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    name = reference[1]
    if name not in variables:
        raise ConfigError(f"{where}: '{value}' stands for the key '{name}' at the top level of the config, which has "
                          f"none{nearest(name, variables)}")
    found = variables[name]
    if _REFERENCE.search(repr(found)):
        raise ConfigError(f"{where}: '{value}' stands for the key '{name}', which holds references itself: {found!r}")
    return found
