"""Optimizers from configs: parameter groups by name, states that find their parameters by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmseg.registry import check_arguments
from mmseg.utils.arguments import Weight, check_value
from mmseg.utils.errors import CheckpointError, ConfigError, nearest
from mmseg.utils.state_dict_alias import reference_names

_MULTIPLIERS = ('lr_mult', 'decay_mult')


def build_optimizer(model: nn.Module, cfg: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that ``cfg`` describes, over the parameters of ``model`` that require a gradient.

    Parameters with equal learning rate and decay share a group, so that the update runs in few kernels.  Where
    ``torch.optim`` has a fused form it is used unless ``cfg`` says otherwise (``fused``, ``foreach``): the same formula
    in one pass over the memory, which is a third of the time on a CPU.

    Args:
        model: its parameters are matched by their names in checkpoints.
        cfg: ``type`` (a class of ``torch.optim``), its arguments, and optionally ``paramwise_cfg.custom_keys``: part of
            a parameter name -> ``dict(lr_mult=1.0, decay_mult=1.0)``.  Where several keys are part of a name the
            longest one counts (of equally long ones the first in alphabetical order), as in mmcv 1.x.

    Raises:
        ConfigError: unknown optimizer, argument or key, or no parameter to train.
    """
    optimizer, arguments, custom_keys = check_optimizer(cfg)
    lr, decay = arguments['lr'], arguments.get('weight_decay', 0.0)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    saved_names = reference_names(model)
    for local_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mult = _multipliers(saved_names[local_name], custom_keys)
            values = lr * mult.get('lr_mult', 1.0), decay * mult.get('decay_mult', 1.0)
            groups.setdefault(values, []).append((saved_names[local_name], parameter))
    if not groups:
        raise ConfigError('optimizer: no parameter requires a gradient; see the finetune section of the config')
    params = [{'params': members, 'lr': lr, 'weight_decay': decay} for (lr, decay), members in groups.items()]
    if 'weight_decay' not in inspect.signature(optimizer).parameters:
        params = [{k: v for k, v in group.items() if k != 'weight_decay'} for group in params]
    if 'fused' in inspect.signature(optimizer).parameters and not arguments.keys() & {'foreach', 'differentiable'}:
        arguments.setdefault('fused', True)
    try:
        return optimizer(params, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f'optimizer: {error}') from error


def check_optimizer(
    cfg: Mapping[str, Any],
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], dict[str, dict[str, float]]]:
    """What :func:`build_optimizer` can know of ``cfg`` without a model.

    Returns:
        Class, its arguments, and the custom keys, the one that wins first.

    Raises:
        ConfigError: unknown optimizer, argument or key; a value of a wrong type or out of range.
    """
    arguments = dict(cfg)
    name = arguments.pop('type', None)
    paramwise = arguments.pop('paramwise_cfg', None) or {}
    classes: dict[str, Any] = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != 'Optimizer'}
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(f"optimizer.type: torch.optim has no '{name}'{nearest(str(name), classes)}")
    if 'params' in arguments:
        raise ConfigError('optimizer.params: these are the parameters of the model; see paramwise_cfg')
    if 'lr' not in arguments:
        raise ConfigError('optimizer.lr: missing')
    for key in ('lr', 'weight_decay'):  # torch takes a tensor, too, and annotates them in several ways
        check_value(arguments.get(key, 0.0), Weight, f'optimizer.{key}')
    return classes[name], check_arguments(classes[name], arguments, 'optimizer'), _custom_keys(paramwise)


def _custom_keys(paramwise: Any) -> dict[str, dict[str, float]]:
    """Checks ``paramwise_cfg`` and returns its custom keys, the one that wins first."""
    where = 'optimizer.paramwise_cfg'
    check_value(paramwise, Mapping[str, Mapping[str, Any] | None], where)
    for key in paramwise.keys() - {'custom_keys'}:
        raise ConfigError(f"{where}.{key}: unknown key '{key}' (known: custom_keys)")
    custom_keys = dict(paramwise.get('custom_keys') or {})
    check_value(custom_keys, Mapping[str, Mapping[str, Weight]], f'{where}.custom_keys')
    for pattern, multipliers in custom_keys.items():
        for key in multipliers:
            if key not in _MULTIPLIERS:
                place = f'{where}.custom_keys.{pattern}.{key}'
                raise ConfigError(f"{place}: unknown key '{key}'{nearest(key, _MULTIPLIERS)}")
    return {key: custom_keys[key] for key in sorted(sorted(custom_keys), key=len, reverse=True)}


def _multipliers(name: str, custom_keys: dict[str, dict[str, float]]) -> dict[str, float]:
    return next((values for key, values in custom_keys.items() if key in name), {})


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Sequence[str] | None = None
) -> None:
    """Gives every parameter its saved state (such as Adam's moments); rates and decay stay those of the config.

    Args:
        optimizer: built by :func:`build_optimizer`.
        saved: ``optimizer.state_dict()`` of ours, or of an optimizer made by mmcv 1.x.
        names: parameter names in the order of the saved state, where that holds none (mmcv 1.x).

    Raises:
        CheckpointError: the saved state belongs to other parameters.
    """
    saved_groups = saved['param_groups']
    if all('param_names' in group for group in saved_groups):
        names = [name for group in saved_groups for name in group['param_names']]
    indices = [index for group in saved_groups for index in group['params']]
    if names is None or len(names) != len(indices):
        raise CheckpointError(
            f'the optimizer state is of {len(indices)} parameters, the checkpoint has {len(names or ())}; '
            'use --load-from to take the weights only'
        )
    states = {name: saved['state'][index] for name, index in zip(names, indices) if index in saved['state']}

    current = optimizer.state_dict()
    own = {n: i for group in current['param_groups'] for n, i in zip(group['param_names'], group['params'])}
    shapes = {
        name: parameter.shape
        for group in optimizer.param_groups
        for name, parameter in zip(group['param_names'], group['params'])
    }
    missing = [name for name in own if name not in states] if states else []
    wrong = [
        name
        for name in own
        for value in states.get(name, {}).values()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != shapes[name]
    ]
    if missing or wrong:
        raise CheckpointError(
            f'the optimizer state does not fit: {len(missing)} parameters have none, {len(wrong)} have another shape '
            f'(such as {(missing + wrong)[0]}); use --load-from to take the weights only'
        )
    current['state'] = {index: states[name] for name, index in own.items() if name in states}
    optimizer.load_state_dict(current)
