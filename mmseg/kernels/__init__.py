"""What knows a processor: layers, the native op, label maps and run lengths, each equal to a plain PyTorch form.

Names are imported where they are used (``from mmseg.kernels.linear import Linear``); nothing here knows the method.
"""
