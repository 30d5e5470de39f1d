"""The only package that knows what a processor is. What each name equals in plain torch or numpy:

* ``attention.attention``: ``F.scaled_dot_product_attention``
* ``convolution.Conv2d``: ``nn.Conv2d``, with its activation
* ``label_map.label_map``: bilinear ``F.interpolate`` and ``argmax``
* ``linear.Linear``: ``nn.Linear``
* ``ms_deform_attn.ms_deform_attn``: ``F.grid_sample`` of each level, and a weighted sum
* ``norm``: ``nn.LayerNorm`` beside a residual sum
* ``run_lengths.RunLengths``: comparisons of frames, and sums over windows

Names are imported where they are used (``from mmseg.kernels.linear import Linear``); nothing here knows the method.
"""
