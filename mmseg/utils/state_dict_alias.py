"""Names in the code on one side, names in checkpoint files on the other.

Checkpoints keep the names of the 2023 reference (its files load here, ours load there), while the code uses names
that say what a part does.  The module that owns a poor name holds a table of both; hooks of ``torch.nn.Module`` apply
it when a state dict is taken and when one is loaded, at any depth of nesting and under any wrapper.  ``state_dict()``
is thus in reference names, ``named_parameters()`` in names of the code; :func:`reference_names` relates the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn


def _under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + '.')


def _rename(
    names: Mapping[str, str], _module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Hook: replaces ``prefix + key`` by ``prefix + names[key]`` for whole dotted parts, in place, all at once."""
    renamed = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        local = key[len(prefix) :]
        owner = max((old for old in names if _under(local, old)), key=len, default=None)
        if owner is not None:
            renamed[prefix + names[owner] + local[len(owner) :]] = state_dict.pop(key)
    state_dict.update(renamed)


def _drop(names: tuple[str, ...], _module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook: deletes ``prefix + name`` and all below it, in place."""
    for key in [key for key in state_dict if any(_under(key, prefix + name) for name in names)]:
        del state_dict[key]


def alias_state_dict(module: nn.Module, names: Mapping[str, str]) -> None:
    """Makes ``module`` save and load under the names of the reference.

    Args:
        module: the owner of the names.
        names: name in the code (of a submodule or a parameter, relative to ``module``) -> name in checkpoints.  Where
            several apply, the longest one does.

    Raises:
        ValueError: two names in the code share one in checkpoints.
    """
    names = dict(names)
    inverse = {saved: local for local, saved in names.items()}
    if len(inverse) != len(names):
        raise ValueError(f'two names of {type(module).__name__} share one name in checkpoints: {names}')

    module.register_state_dict_post_hook(partial(_rename, names))
    module.register_load_state_dict_pre_hook(partial(_rename, inverse))


def drop_dead_keys(module: nn.Module, names: Iterable[str]) -> None:
    """Makes ``module`` accept and forget tensors that the reference saved but never used.

    Args:
        module: the owner of the names.
        names: names relative to ``module``; everything under them is dropped on load.
    """
    module.register_load_state_dict_pre_hook(partial(_drop, tuple(names)))


def reference_names(module: nn.Module) -> dict[str, str]:
    """Name in ``named_parameters()`` -> name in ``state_dict()``, for every parameter below ``module``.

    The two differ where :func:`alias_state_dict` is at work.  Reports, freeze patterns and ``custom_keys`` that a user
    writes after a checkpoint should use the second.
    """
    saved = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
    return {name: saved[id(parameter)] for name, parameter in module.named_parameters()}
