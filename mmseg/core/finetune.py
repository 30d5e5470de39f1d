"""Start a model from another one's weights and train only a part of it (``--finetune-from``)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmseg.utils.errors import CheckpointError, ConfigError
from mmseg.utils.state_dict_alias import reference_names

_SHOWN = 5
logger = logging.getLogger('mmseg')


@dataclass(frozen=True)
class FinetuneConfig:
    """The ``finetune`` section of a config.  Patterns are parts of parameter names, as they stand in checkpoints.

    Attributes:
        train: parameters whose name holds one of these are trained, all others are frozen.
        fresh: parameters whose name holds one of these keep their start values.
        copy: dotted part of a name in the checkpoint -> parts to put in its place: ``decoder_norm`` ->
            ``[decoder_norm1, decoder_norm2]`` fills both norms of the video decoder from the one-frame decoder's.
        frozen_eval: frozen parts run in eval mode, so that drop path does not disturb them (the reference left it on).
    """

    train: str | Sequence[str] = ('predictor',)
    fresh: str | Sequence[str] = ()
    copy: Mapping[str, str | Sequence[str]] | None = None
    frozen_eval: bool = False

    def __post_init__(self) -> None:
        for key in ('train', 'fresh'):
            object.__setattr__(self, key, _as_tuple(getattr(self, key)))


def warn_of_unused(section: Any) -> None:
    """Warns of a ``finetune`` section in a training that is not started or resumed as a fine-tuning."""
    if section:
        logger.warning(
            'the finetune section of the config has no effect: it goes with --finetune-from, and everything is trained')


@dataclass
class FinetuneReport:
    """What became of every tensor: names as they stand in checkpoints."""

    loaded: list[str] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)

    def lost(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that got no weights, with their shapes where these differ."""
        wanted = set(names)
        return [text for text in (*self.missing, *self.mismatched) if text.split(' ')[0] in wanted]

    def lines(self) -> list[str]:
        """The report, one line a subject; a part whose tensors all share a fate is named once."""
        everything = [*self.trained, *self.frozen]
        known = sorted({*self.loaded, *self.copied, *self.fresh, *self.missing, *self.mismatched, *everything})
        mismatched = [text.split(' ')[0] for text in self.mismatched]
        return [
            f'loaded by name: {len(self.loaded)}',
            f'copied to a new name: {_counted(self.copied, known)}',
            f'kept fresh, as asked: {_counted(self.fresh, known)}',
            f'missing in the checkpoint, kept at their start values: {_counted(self.missing, known)}',
            f'of another shape, kept at their start values: {_counted(mismatched, known)}'
            + ''.join(f'\n    {text}' for text in self.mismatched),
            f'unexpected in the checkpoint, not used: {_counted(self.unexpected, sorted({*self.unexpected, *known}))}',
            f'frozen: {_counted(self.frozen, everything)}',
            f'trained: {_counted(self.trained, everything)}',
        ]


def _as_tuple(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _holds(name: str, patterns: Iterable[str]) -> bool:
    return any(pattern in name for pattern in patterns)


def load_for_finetune(model: nn.Module, weights: Mapping[str, torch.Tensor], config: FinetuneConfig) -> FinetuneReport:
    """Loads what fits by name, freezes what is not to be trained, and reports both.

    Args:
        model: changed in place.
        weights: the ``state_dict`` of a checkpoint.
        config: patterns to train, to keep fresh and to copy.

    Raises:
        CheckpointError: a part that will be frozen gets no weights (another backbone?), so it would stay random.
        ConfigError: nothing would be trained.
    """
    report = FinetuneReport()
    own = model.state_dict()
    origins = {copy: name for name in weights for copy in _copies_of(name, config.copy)}
    origins |= {name: name for name in weights}
    for name, tensor in own.items():
        origin = origins.get(name)
        if _holds(name, config.fresh):
            report.fresh.append(name)
        elif origin is None:
            report.missing.append(name)
        elif weights[origin].shape != tensor.shape:
            report.mismatched.append(f'{name} {tuple(weights[origin].shape)} there, {tuple(tensor.shape)} here')
        elif origin == name:
            report.loaded.append(name)
        else:
            report.copied[name] = origin
    taken = {name: weights[origins[name]] for name in (*report.loaded, *report.copied)}
    left = {name: weights[name] for name in weights.keys() - own.keys() - set(report.copied.values())}
    unexpected = model.load_state_dict({**taken, **left}, strict=False).unexpected_keys  # the model may drop some
    report.unexpected = [name for name in weights if name in left and name in unexpected]
    report.frozen, report.trained = freeze(model, config.train)

    lost = report.lost(report.frozen)
    if lost:
        more = f' and {len(lost) - _SHOWN} more' if len(lost) > _SHOWN else ''
        raise CheckpointError(
            f'{len(lost)} tensors of frozen parts get no weights and would stay random (a checkpoint of another '
            f'backbone?): {"; ".join(lost[:_SHOWN])}{more}'
        )
    return report


def freeze(model: nn.Module, train: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the gradient from every parameter whose name holds none of ``train``.

    A part without trainable parameters builds no autograd graph then, because neither its weights nor the images ask
    for one.

    Returns:
        Names of the frozen and of the trained parameters.

    Raises:
        ConfigError: no parameter is left to train.
    """
    names = reference_names(model)
    frozen, trained = [], []
    for name, parameter in model.named_parameters():
        if _holds(names[name], train):
            trained.append(names[name])
        else:
            parameter.requires_grad_(False)
            frozen.append(names[name])
    if not trained:
        raise ConfigError(f'finetune.train: no parameter name holds {" or ".join(map(repr, train))}')
    return frozen, trained


def freeze_named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Takes the gradient from every parameter whose name holds one of ``patterns``; returns their names.

    Raises:
        ConfigError: a pattern that no name holds, or nothing is left to train.
    """
    names = reference_names(model)
    for pattern in patterns:
        if not any(pattern in name for name in names.values()):
            raise ConfigError(f"freeze: no parameter name holds '{pattern}'")
    frozen = []
    for name, parameter in model.named_parameters():
        if _holds(names[name], patterns):
            parameter.requires_grad_(False)
            frozen.append(names[name])
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f'freeze: {list(patterns)} leaves nothing to train')
    return frozen


def frozen_parts(model: nn.Module) -> list[nn.Module]:
    """The largest modules that hold parameters, none of which is trained."""
    parts = []
    for child in model.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            parts.append(child)
        else:
            parts += frozen_parts(child)
    return parts


def _copies_of(name: str, copies: Mapping[str, str | Sequence[str]] | None) -> list[str]:
    """Names that the tensor ``name`` fills as well: a run of whole dotted parts is replaced."""
    dotted = f'.{name}.'
    return [
        dotted.replace(f'.{source}.', f'.{target}.').strip('.')
        for source, targets in (copies or {}).items()
        if f'.{source}.' in dotted
        for target in _as_tuple(targets)
    ]


def _counted(names: Iterable[str], everything: Sequence[str]) -> str:
    names = list(names)
    return f'{len(names)}' + (f' ({", ".join(_summary(names, everything))})' if names else '')


def _summary(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """``names``, where all of ``everything`` under a dotted prefix is among them replaced by ``prefix.*``."""
    chosen = set(names)
    spoiled = {prefix for name in everything if name not in chosen for prefix in _prefixes(name)}
    members: dict[str, int] = {}
    for name in names:
        whole = next((prefix for prefix in _prefixes(name) if prefix not in spoiled), name)
        members[whole] = members.get(whole, 0) + 1
    return [label if label in chosen else f'{label}.* {count}' for label, count in members.items()]


def _prefixes(name: str) -> list[str]:
    parts = name.split('.')
    return ['.'.join(parts[:i]) for i in range(1, len(parts))]
