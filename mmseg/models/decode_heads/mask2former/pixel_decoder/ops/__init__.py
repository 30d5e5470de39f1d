"""Multi-scale deformable attention: one op, several backends."""

from .functional import ms_deform_attn, ms_deform_attn_fused

__all__ = ['ms_deform_attn', 'ms_deform_attn_fused']
