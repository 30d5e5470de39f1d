"""Multi-scale deformable attention: one op; native where it can be, plain PyTorch everywhere else.

``functional`` checks arguments and chooses (``backend``), ``library`` tells torch about the ops, ``build`` compiles
them, ``pytorch`` is the form that all others are checked against.
"""

from .functional import ms_deform_attn, ms_deform_attn_fused, without_autocast

__all__ = ['ms_deform_attn', 'ms_deform_attn_fused', 'without_autocast']
