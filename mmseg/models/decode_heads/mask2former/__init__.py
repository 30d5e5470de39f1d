"""Only the address of the op: see :mod:`.pixel_decoder.ops`."""
