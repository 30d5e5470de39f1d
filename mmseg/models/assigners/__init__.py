"""Assignment of queries to targets."""

from mmseg.models.assigners.two_round import TwoRoundAssigner, assign_two_rounds

__all__ = ['TwoRoundAssigner', 'assign_two_rounds']
