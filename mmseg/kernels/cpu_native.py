"""Native forms of attention and of LayerNorm with what is around it, without gradients on the CPU.

Both are for float32 and bfloat16.  ``layers.cpp`` and the kernels are compiled on first use and kept in the cache of
:mod:`.native`, whose environment variables they follow.  They work on the threads of torch's own pool, which
they reach through torch's stable ABI.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from mmseg.kernels.native import BuildError, Library, Unit, loaded, warn_of_slower_form

_HERE = Path(__file__).parent / 'csrc'
DRIVER, HEADER = _HERE / 'layers.cpp', _HERE / 'layers.h'
KERNELS = {'attend': _HERE / 'attention_kernel.cpp', 'normalize': _HERE / 'norm_kernel.cpp'}
VECTORS = _HERE / 'simd.h'
FLAGS = ('-std=c++17', '-O3', '-fPIC', '-fvisibility=hidden', '-Wno-psabi')
# No traps, and a product and a sum in one step; NaN and infinity keep their meaning.
KERNEL_FLAGS = ('-fno-trapping-math', '-ffp-contract=fast')
_AVX512 = ('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512', '-DWIDTH=64')
X86_SETS = {
    'avx2': ('-mavx2', '-mfma', '-DWIDTH=32'),
    'avx512': _AVX512,
    'avx512_bf16': (*_AVX512, '-mavx512bf16', '-DWITH_BF16_PRODUCTS'),
}
_X86 = platform.machine().lower() in ('x86_64', 'amd64')
DTYPES = (torch.float32, torch.bfloat16)


def made_of() -> Library:
    """What the compiler is given: the driver, and the kernels once for each instruction set."""
    sets: dict[str, tuple[str, ...]] = {'portable': ('-DWIDTH=16',)}
    if _X86:
        sets |= X86_SETS
    kernels = (
        Unit(source, (*FLAGS, *KERNEL_FLAGS, f'-DNAME=themask_{task}_{name}', *own), f'{task}_{name}')
        for name, own in sets.items()
        for task, source in KERNELS.items()
        if (task, name) != ('normalize', 'avx512_bf16')  # it has no products
    )
    units = (Unit(DRIVER, FLAGS, 'driver'), *kernels)
    return Library('cpu', (DRIVER, *KERNELS.values(), HEADER, VECTORS), units)


def load(path: Path) -> ctypes.CDLL:
    """A built library.

    Raises:
        OSError, AttributeError: it does not load, or lacks a function.
        BuildError: torch has no parallel loop.
    """
    library = ctypes.CDLL(str(path))
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.themask_cpu_set.restype = ctypes.c_char_p
    library.themask_cpu_set.argtypes = [number]
    library.themask_attention.restype = ctypes.c_bool
    library.themask_attention.argtypes = [
        address, address, address, ctypes.c_double, ctypes.c_bool, number, number]
    library.themask_norm.restype = ctypes.c_bool
    library.themask_norm.argtypes = [
        address, number, number, ctypes.c_double, ctypes.c_bool, ctypes.c_bool, number]
    try:
        loop = _torch_library().torch_parallel_for
    except AttributeError as error:
        raise BuildError(f'torch {torch.__version__} has no torch_parallel_for') from error
    library.themask_cpu_pool.argtypes = [address]
    library.themask_cpu_pool(ctypes.cast(loop, address))
    return library


def _torch_library() -> ctypes.CDLL:
    end = {'darwin': '.dylib'}.get(sys.platform, '.so')
    return ctypes.CDLL(str(Path(torch.__file__).parent / 'lib' / f'libtorch_cpu{end}'))


@functools.cache
def native() -> ctypes.CDLL | BuildError:
    """The library, built and loaded on the first call; what went wrong where that fails."""
    return loaded(made_of, load)


@functools.cache
def usable() -> bool:
    """Whether there is a library, and vectors with which it was seen to be faster than torch; says once why not."""
    if not _X86:
        return False
    library = native()
    if isinstance(library, BuildError):
        warn_of_slower_form("Attention and LayerNorm run in torch's slower form on the CPU", library, stacklevel=4)
        return False
    return instruction_sets()[0] != 'portable'


def _library() -> ctypes.CDLL:
    library = native()
    if isinstance(library, BuildError):
        raise BuildError(str(library))  # a new one: an exception that is raised twice keeps the frames of both
    return library


def instruction_sets() -> list[str]:
    """Names of those that this processor has, the fastest first."""
    library = native()
    names: list[str] = []
    while not isinstance(library, BuildError) and (name := library.themask_cpu_set(len(names))):
        names.append(name.decode())
    return names


def serves_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`attention` can be called with these; it trusts its caller and reads memory as they say."""
    tensors = (query, key, value)
    return (
        all(
            type(x) is Tensor and x.device.type == 'cpu' and x.dtype == query.dtype and x.dim() == 4
            and x.stride(-1) == 1 and x.numel() > 0
            for x in tensors
        )
        and query.dtype in DTYPES
        and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.device.type == 'cpu'))
    )  # fmt: skip


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, number: int = 0) -> Tensor:
    """``softmax(query @ key.T / sqrt(d)) @ value``.

    Args:
        query: ``[N, heads, L, d]`` float32 or bfloat16 on the CPU, the last axis contiguous, as in the others.
        key: ``[N, heads, S, d]``.
        value: ``[N, heads, S, d]``.
        mask: bool, broadcastable to ``[N, heads, L, S]``: true where a query may attend.
        number: of the instruction set in :func:`instruction_sets`.

    Returns:
        ``[N, heads, L, d]``, a view of ``[N, L, heads, d]``; NaN for queries without any true entry in the mask.

    Raises:
        BuildError: there is no native library.
        MemoryError: there is no memory for the threads.
    """
    library = _library()
    n, heads, queries, channels = query.shape
    keys = key.shape[2]
    out = query.new_empty(n, queries, heads, channels)
    if mask is not None:
        mask = mask.expand(n, heads, queries, keys)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    tensors = (query, key, value, mask)
    strides = [stride for x in tensors for stride in (x.stride()[:3] if x is not None else (0, 0, 0))]
    addresses = [x.data_ptr() if x is not None else None for x in (*tensors, out)]
    done = library.themask_attention(
        (ctypes.c_void_p * 5)(*addresses), (ctypes.c_int64 * 12)(*strides),
        (ctypes.c_int64 * 5)(n, heads, queries, keys, channels), channels**-0.5, query.dtype == torch.bfloat16, number,
        torch.get_num_threads())
    if not done:
        raise MemoryError('no memory for attention')
    return out.transpose(1, 2)


def serves_norm(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether :func:`norm` can be called with these; it trusts its caller and reads memory as they say."""
    tensors = [tensor for tensor in (x, branch, weight, bias) if tensor is not None]
    return (
        len(tensors) == 3 + (branch is not None)
        and all(t.device.type == 'cpu' and t.is_contiguous() and t.layout == torch.strided for t in tensors)
        and type(x) is Tensor
        and x.dtype in DTYPES
        and (branch is None or (type(branch) is Tensor and branch.shape == x.shape))
        and (branch is None or branch.dtype in (x.dtype, torch.bfloat16))
        and weight is not None and bias is not None
        and weight.shape == bias.shape == x.shape[-1:]
        and weight.dtype == bias.dtype == torch.float32
        and x.numel() > 0
    )  # fmt: skip


def norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, keep: tuple[bool, bool, bool],
    number: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``x + branch`` and its LayerNorm over the last axis.

    Args:
        x: ``[..., C]`` float32 or bfloat16, contiguous, as all others.
        branch: of the same shape, in bfloat16 or the type of ``x``; None: nothing is added.
        weight: ``[C]`` float32.
        bias: ``[C]`` float32.
        eps: added to the variance.
        keep: which of the results are wanted; with a branch the first or the second.
        number: of the instruction set in :func:`instruction_sets`.

    Returns:
        The sum and its LayerNorm in the type of ``x``, and that in bfloat16; None for those not wanted.

    Raises:
        BuildError: there is no native library.
    """
    library = _library()
    results = [
        torch.empty(x.shape, dtype=dtype) if kept else None
        for kept, dtype in zip(keep, (x.dtype, x.dtype, torch.bfloat16))
    ]
    addresses = [t.data_ptr() if t is not None else None for t in (x, branch, weight, bias, *results)]
    done = library.themask_norm(
        (ctypes.c_void_p * 7)(*addresses), x.numel() // x.shape[-1], x.shape[-1], eps,
        x.dtype == torch.bfloat16, branch is not None and branch.dtype == torch.bfloat16, number)
    if not done:
        raise RuntimeError('torch_parallel_for failed')
    return results[0], results[1], results[2]
