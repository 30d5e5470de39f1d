"""The only package that knows what a processor is.  What each name equals in plain torch or numpy:

* ``layers.Linear``, ``layers.Conv2d``: ``nn.Linear`` and ``nn.Conv2d``, maybe with an activation behind them
* ``layers.LayerNorm.add(x, branch)``: ``x + branch``, and ``nn.LayerNorm`` of it
* ``layers.attention``: ``F.scaled_dot_product_attention``
* ``layers.products(rows, columns)``: ``rows @ columns.transpose(-2, -1)``
* ``layers.chunked(function, *inputs)``: ``function(*inputs)``
* ``layers.smallest``: ``topk`` of the smallest values, in no order
* ``half.low_copies``: autocast, with weights that are cast once
* ``label_map.label_map``: bilinear ``F.interpolate`` and ``argmax``
* ``ms_deform_attn.ms_deform_attn``: ``F.grid_sample`` of each level, and a weighted sum
* ``run_lengths.RunLengths``: comparisons of frames, and sums over windows

Names are imported where they are used (``from mmseg.kernels.layers import Linear``); nothing here knows the method.
"""
