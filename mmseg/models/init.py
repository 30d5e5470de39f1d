"""Start values of weights, by kind of layer."""

from __future__ import annotations

import math

from torch import nn


def init_transformer_(module: nn.Module) -> None:
    """SegFormer's start values, for every layer below ``module`` in place.

    Linear: normal of standard deviation 0.02, truncated at 2 (absolute), bias 0.  Convolution: normal of variance
    ``2 / fan_out`` with ``fan_out`` divided by the groups, bias 0.  LayerNorm: 1 and 0.  Source: the released code of
    arXiv 2105.15203.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size) // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
        else:
            continue
        zero_bias_(layer)


def zero_bias_(layer: nn.Module) -> None:
    """Sets ``layer.bias`` to zero where there is one."""
    bias = getattr(layer, 'bias', None)
    if bias is not None:
        nn.init.zeros_(bias)


def init_xavier_(layer: nn.Linear | nn.Conv2d) -> None:
    """Xavier-uniform weight of gain 1, bias 0, in place."""
    nn.init.xavier_uniform_(layer.weight)
    zero_bias_(layer)


def init_kaiming_(layer: nn.Linear | nn.Conv2d) -> None:
    """Kaiming-uniform weight with ``a = 1`` (Caffe2's "XavierFill"), bias 0, in place."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    zero_bias_(layer)
