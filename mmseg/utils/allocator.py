"""How a process gets, keeps and has used the memory of large tensors; for tools, which own their process.

The C library gives large blocks back to the system when a tensor dies, and the kernel clears new pages for the next
one, which takes up to half of the time where tensors are large (``benchmarks/scaling.py``).  Evaluation asks for
huge pages, which costs no memory; training, which they do not help, keeps its pages.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>
_VARIABLES = ('MALLOC_', 'GLIBC_TUNABLES')


def use_huge_pages() -> None:
    """Lets torch ask for huge pages (Linux) for tensors of 2 MB and more; to be called before the first tensor is made.

    ``THP_MEM_ALLOC_ENABLE`` in the environment, 0 or 1, has the last word.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')


def keep_pages() -> bool:
    """Lets glibc keep what is freed, for the rest of this process; returns whether it does.

    What is held settles after a few steps, at about a quarter more at most.  Settings of glibc's allocator in the
    environment (``MALLOC_...``, ``GLIBC_TUNABLES``) stay as they are.
    """
    if any(name.startswith(_VARIABLES) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def peak_memory(device: Any = None) -> float:
    """Peak memory in MiB: of tensors on a GPU, of the whole process on the CPU (``device`` None)."""
    if device is not None and device.type == 'cuda':
        import torch  # here, since use_huge_pages is called before it is imported

        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == 'darwin' else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
