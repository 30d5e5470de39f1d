"""The op's address since Mask2Former; the op itself lives in :mod:`mmseg.kernels.ms_deform_attn`."""

from mmseg.kernels.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused, without_autocast

__all__ = ['ms_deform_attn', 'ms_deform_attn_fused', 'without_autocast']
