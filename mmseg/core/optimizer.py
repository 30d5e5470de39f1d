"""Optimizers from configs: parameter groups by name, states that find their parameters by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from mmseg.registry import OPTIMIZERS, build, check
from mmseg.utils.arguments import Weight
from mmseg.utils.errors import CheckpointError, ConfigError
from mmseg.utils.state_dict_alias import reference_names

for _name, _class in vars(torch.optim).items():
    if inspect.isclass(_class) and _class is not torch.optim.Optimizer:
        OPTIMIZERS.register_module(_name, module=_class)


@dataclass(frozen=True)
class Multipliers:
    """Factors for some of the parameters.

    Attributes:
        lr_mult: of the learning rate.
        decay_mult: of the weight decay.
    """

    lr_mult: Weight = 1.0
    decay_mult: Weight = 1.0


@dataclass(frozen=True)
class ParamwiseConfig:
    """Parameters with another rate or decay than the rest.

    Attributes:
        custom_keys: part of a parameter's name in checkpoints -> its :class:`Multipliers`.  Where several keys are part
            of a name the longest one counts (of equally long ones the first in alphabetical order), as in mmcv 1.x.
    """

    custom_keys: Mapping[str, Annotated[Mapping[str, Any], Multipliers]] | None = None

    def of(self, name: str) -> Multipliers:
        """The factors of the parameter ``name``."""
        factors = self.custom_keys or {}
        keys = sorted((key for key in factors if key in name), key=lambda key: (-len(key), key))
        return Multipliers(**factors[keys[0]]) if keys else Multipliers()


@dataclass(frozen=True)
class GroupsConfig:
    """Rate and decay of the parameters.

    Attributes:
        lr: the learning rate, which ``lr_config`` changes from iteration to iteration.
        weight_decay: the weight decay.
        paramwise_cfg: parameters with another rate or decay.
    """

    lr: Weight
    weight_decay: Weight = 0.0
    paramwise_cfg: Annotated[Mapping[str, Any] | None, ParamwiseConfig] = None


def build_optimizer(model: nn.Module, cfg: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that ``cfg`` describes, over the parameters of ``model`` that require a gradient.

    Parameters with equal learning rate and decay share a group, so that the update runs in few kernels.  Where
    ``torch.optim`` has a fused form it is used unless ``cfg`` says otherwise (``fused``, ``foreach``): the same formula
    in one pass over the memory, which is a third of the time on a CPU.

    Args:
        model: its parameters are matched by their names in checkpoints.
        cfg: ``type`` (registered, as the classes of ``torch.optim`` are), its arguments, and the keys of
            :class:`GroupsConfig`.

    Raises:
        ConfigError: unknown optimizer, argument or key, or no parameter to train.
    """
    (_, own), (optimizer, arguments) = check(cfg, 'optimizer', GroupsConfig, OPTIMIZERS)
    config = build(GroupsConfig, own, 'optimizer')
    paramwise = build(ParamwiseConfig, config.paramwise_cfg, 'optimizer.paramwise_cfg')
    known = inspect.signature(optimizer).parameters
    if config.weight_decay and 'weight_decay' not in known:
        raise ConfigError(f"optimizer.weight_decay: {cfg['type']} takes no argument 'weight_decay'")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    saved_names = reference_names(model)
    for local_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors = paramwise.of(saved_names[local_name])
            values = config.lr * factors.lr_mult, config.weight_decay * factors.decay_mult
            groups.setdefault(values, []).append((saved_names[local_name], parameter))
    if not groups:
        raise ConfigError('optimizer: no parameter requires a gradient; see the finetune section of the config')
    params: list[dict[str, Any]] = [{'params': members, 'lr': lr} for (lr, _), members in groups.items()]
    if 'weight_decay' in known:
        params = [{**group, 'weight_decay': decay} for group, (_, decay) in zip(params, groups)]
    if 'fused' in known and not arguments.keys() & {'foreach', 'differentiable'}:
        arguments.setdefault('fused', True)
    try:
        return optimizer(params, lr=config.lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f'optimizer: {error}') from error


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
    own: dict[str, tuple[int, nn.Parameter]] = {
        name: (index, parameter)
        for indexed, group in zip(current['param_groups'], optimizer.param_groups)
        for name, index, parameter in zip(group['param_names'], indexed['params'], group['params'])
    }
    missing = [name for name in own if name not in states] if states else []
    wrong = [
        name for name, (_, parameter) in own.items() for value in states.get(name, {}).values()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape
    ]
    if missing or wrong:
        raise CheckpointError(
            f'the optimizer state does not fit: {len(missing)} parameters have none, {len(wrong)} have another shape '
            f'(such as {(missing + wrong)[0]}); use --load-from to take the weights only'
        )
    current['state'] = {index: states[name] for name, (index, _) in own.items() if name in states}
    optimizer.load_state_dict(current)
