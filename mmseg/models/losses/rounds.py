"""What a round of matching is, and the rounds and weights of a config (``loss_cfg``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmseg.models.losses.matching import Cost
from mmseg.registry import LOSSES, check_arguments, config_key, find, retired
from mmseg.utils.arguments import Index, Weight
from mmseg.utils.errors import ConfigError


@retired(class_weight_unmatched=())
@dataclass(frozen=True)
class LossWeights:
    """Weights of cost terms and losses (``matcher_cfg`` of the reference, which gave both the same ones).

    Attributes:
        class_weight: class cost, and ``loss_ce``.
        mask_weight: BCE cost, and BCE of primary masks.
        dice_weight: dice cost, and dice of primary masks.
        mask_weight_unmatched: BCE of secondary masks.
        dice_weight_unmatched: dice of secondary masks.
    """

    class_weight: Weight = 2.0
    mask_weight: Weight = 5.0
    dice_weight: Weight = 5.0
    mask_weight_unmatched: Weight = 0.5
    dice_weight_unmatched: Weight = 0.5


@dataclass(frozen=True)
class CostWeights:
    """Weights of the full cost, where ``rounds`` say what the losses weigh.

    Attributes:
        class_weight: class cost, and ``loss_ce``.
        mask_weight: BCE cost.
        dice_weight: dice cost.
    """

    class_weight: Weight = 2.0
    mask_weight: Weight = 5.0
    dice_weight: Weight = 5.0


@dataclass(frozen=True)
class Round:
    """A round of matching, and what the masks that it matches learn.

    Attributes:
        name: how the names of its losses begin.
        cost: what the assignment minimises: the ``'full'`` cost, or the unweighted ``'mask'`` BCE alone.
        losses: name of a mask loss -> its weight.  ``mask`` (BCE) and ``dice``, and for ``labels='target'`` any
            function in the registry ``LOSSES``.
        weight: factor on all of them.
        labels: ``'target'``: at random points against the target.  ``'self'``: on every pixel against the target where
            the mask itself is above 0.5, and 0 elsewhere.
        start: iteration from which the round takes part; ``None``: never.
    """

    name: str
    cost: Cost = 'full'
    losses: Mapping[str, Weight] | None = None
    weight: Weight = 1.0
    labels: Literal['target', 'self'] = 'target'
    start: Index | None = 0

    def begins(self, iteration: int) -> bool:
        """Whether the round takes part in this iteration."""
        return self.start is not None and iteration >= self.start


def papers_rounds(weights: LossWeights, factors: Sequence[float], cost: Cost, start: int | None) -> list[Round]:
    """The two rounds of THE-Mask; the second minimises ``cost`` from iteration ``start`` on."""
    primary = {'mask': weights.mask_weight, 'dice': weights.dice_weight}
    secondary = {'mask': weights.mask_weight_unmatched, 'dice': weights.dice_weight_unmatched}
    return [Round('r0_', 'full', primary, factors[0]), Round('r1_', cost, secondary, factors[1], 'self', start)]


def rounds_of(entries: Sequence[Mapping[str, Any]]) -> list[Round]:
    """The rounds of a config.

    Raises:
        ConfigError: no round, two of one name, the first one starts later, or a loss that nobody knows.
    """
    rounds: list[Round] = []
    for i, entry in enumerate(entries):
        with config_key(f'rounds[{i}]') as where:
            own = Round(**check_arguments(Round, entry, where))
            for name in own.losses or {}:
                if own.labels == 'self' and name not in ('mask', 'dice'):
                    raise ConfigError(f"{where}.losses.{name}: labels='self' knows mask and dice alone")
                find(LOSSES, name, f'{where}.losses')
            if own.name in {other.name for other in rounds}:
                raise ConfigError(f"{where}.name: '{own.name}' is the name of an earlier round; take another")
            rounds.append(own)
    if not rounds or rounds[0].start != 0:
        raise ConfigError('rounds: expected at least one round, the first with start=0')
    return rounds


def refuse(key: str, value: Any, why: str) -> None:
    """A :class:`ConfigError` where ``value`` was given for ``key``."""
    if value is not None:
        with config_key(key) as where:
            raise ConfigError(f'{where}: {why}')
