"""Only the address of the op: see :mod:`.ops`."""
