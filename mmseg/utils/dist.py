"""Several processes, one a GPU (nccl) or one a share of the CPU's cores (gloo): start, talk, and tell who is first.

Every helper also works in a single process without a process group, so callers need no ``if distributed``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmseg.utils.arguments import Port, Positive
from mmseg.utils.errors import CheckpointError, ConfigError, DataError, OtherRankError
from mmseg.utils.launcher import PATIENCE, RANK_VARIABLES, detect_launcher, is_first_of_machine, whole_number
from mmseg.utils.signals import Interrupted

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')

_LOCAL_SIZE = {
    'pytorch': 'LOCAL_WORLD_SIZE', 'slurm': 'SLURM_NTASKS_PER_NODE', 'mpi': 'OMPI_COMM_WORLD_LOCAL_SIZE'}

_SIGNS_OF_LOSS = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe')  # of gloo

_FAILED = 1000  # among ranks, above every signal number
_Result = TypeVar('_Result')


def init_dist(
    launcher: str, /, backend: str | None = None, timeout_minutes: Positive = 30, port: Port | None = None
) -> torch.device:
    """Joins the process group that ``launcher`` started and returns this process's device.

    Args:
        launcher: ``none`` (one process, no group; or the one that :func:`detect_launcher` finds), ``pytorch``
            (torchrun), ``slurm`` (srun) or ``mpi`` (Open MPI).
        backend: ``nccl`` or ``gloo``; ``nccl`` falls back to ``gloo`` where there is no GPU.
        timeout_minutes: how long a collective call may wait for the other ranks.
        port: where the ranks meet, if the launcher does not say it (``dist_params.port``; default 29500).

    Returns:
        This process's GPU where there is one, else ``cpu``.

    Raises:
        ConfigError: unknown launcher, its environment variables are missing or no numbers, or there are more processes
            than GPUs.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher: expected one of {', '.join(LAUNCHERS)}, got '{launcher}'")
    launcher = detect_launcher(launcher)
    if launcher == 'none' and {'RANK', 'WORLD_SIZE'} <= os.environ.keys() and whole_number('WORLD_SIZE', 1) > 1:
        raise ConfigError(
            'the environment variables RANK and WORLD_SIZE say that this is one of several processes, but LOCAL_RANK '
            'is missing: each would do the whole work; start them with torchrun, or unset RANK and WORLD_SIZE')
    local_rank = _export_rank_variables(launcher, port or 29500) if launcher != 'none' else 0
    if not torch.cuda.is_available():
        device = torch.device('cpu')
    else:
        device = torch.device('cuda', _gpu_index(launcher, local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if backend not in (None, 'nccl', 'gloo'):
        raise ConfigError(f"dist_params.backend: expected 'nccl' or 'gloo', got '{backend}'")
    if launcher != 'none' and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if device.type == 'cpu' or backend == 'gloo':
            dist.init_process_group('gloo', timeout=timeout)
        else:  # what the hosts say to each other (stop, failed, objects) needs no GPU and no stream that is idle
            dist.init_process_group('cpu:gloo,cuda:nccl', timeout=timeout, device_id=device)
    _keep_group()
    return device


def _gpu_index(launcher: str, local_rank: int, gpus: int) -> int:
    """Which of the ``gpus`` that this process sees is its own."""
    if launcher == 'none' or (launcher == 'slurm' and 'SLURM_GPUS_PER_TASK' in os.environ):  # it sees its own alone
        return 0
    size = _LOCAL_SIZE[launcher]
    processes = max(local_rank + 1, whole_number(size, 1) if size in os.environ else 1)
    if processes > gpus:
        raise ConfigError(f'{processes} processes were started on a machine with {gpus} GPUs; start {gpus} at most')
    return local_rank


def _export_rank_variables(launcher: str, port: int) -> int:
    """Puts the launcher's variables under torch's names into the environment; returns the local rank."""
    sources = RANK_VARIABLES[launcher]
    for source in sources.values():
        if source not in os.environ:
            raise ConfigError(
                f'--launcher {launcher}: the environment variable {source} is missing; start with tools/dist_train.sh '
                f'(pytorch), tools/slurm_train.sh (slurm) or mpirun (mpi), or use --launcher none'
            )
    size = whole_number(sources['WORLD_SIZE'], 1)
    os.environ['RANK'] = str(whole_number(sources['RANK'], 0, size - 1))
    os.environ['WORLD_SIZE'] = str(size)
    os.environ['LOCAL_RANK'] = str(whole_number(sources['LOCAL_RANK'], 0))
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host()
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', str(port))
    whole_number('MASTER_PORT', 1, 65535)
    return int(os.environ['LOCAL_RANK'])


def pick_device(device: str | torch.device) -> torch.device:
    """The device of that name (``cpu``, ``cuda``, ``cuda:1``), after a look whether this machine has it.

    Raises:
        ConfigError: there is no such kind of device, or this machine has none or fewer of it.
    """
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got '{device}'") from None
    if picked.type == 'meta':  # computes nothing
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got '{device}'")
    if picked.type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f"device: '{device}', but this machine has no GPU that torch can use; take cpu")
    if picked.type == 'cuda' and (picked.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: '{device}', but the GPUs here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    try:
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, ImportError):
        raise ConfigError(f"device: '{device}' cannot be used on this machine; take cpu") from None
    return picked


def _first_host() -> str:
    """Name of the first of SLURM's hosts, whose list is shortened: ``gpu[03-07,11],login1`` gives ``gpu03``."""
    variables = ('SLURM_STEP_NODELIST', 'SLURM_NODELIST', 'SLURM_JOB_NODELIST')
    name = next((name for name in variables if os.environ.get(name)), None)
    if name is None:
        raise ConfigError(f'--launcher slurm: set MASTER_ADDR, or start with srun, which sets {variables[0]}')
    first = re.split(r',(?![^\[]*\])', os.environ[name])[0]
    host = re.sub(r'\[(\w+)[\w,-]*\]', r'\1', first)
    if not re.fullmatch(r'[\w.-]+', host):
        raise ConfigError(
            f"--launcher slurm: no host can be read from {name}='{os.environ[name]}'; set MASTER_ADDR to the first one")
    return host


def close_dist() -> None:
    """Leaves the process group, if there is one; models that it served may be dropped before or after."""
    if dist.is_available() and dist.is_initialized():
        _keep_group()  # that of a program which made it itself
        dist.destroy_process_group()


def _keep_group() -> None:
    """Keeps the process group in memory until the process ends.

    The destructor of gloo's group joins its threads while it holds the interpreter's lock, and a thread that frees its
    last tensors waits for this lock: the process would hang, when the model that used the group is dropped after
    :func:`close_dist` or when Python itself ends.  An object that is never freed has no destructor to hang in.
    """
    if dist.group.WORLD is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def get_dist_info() -> tuple[int, int]:
    """``(rank, world size)``; ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes files."""
    return get_dist_info()[0] == 0


def report_error(error: Exception) -> None:
    """Prints the error that ends this process; one that all processes meet is printed once a machine.

    The first process of a machine prints at once.  The others wait: their launcher ends them meanwhile, unless the
    error is theirs alone.  A process that ends because of another one leaves it the time to speak, and prints nothing.
    """
    if isinstance(error, OtherRankError):
        time.sleep(2 * PATIENCE)
        return
    if not is_first_of_machine():
        time.sleep(PATIENCE)
    print(f'error: {describe(error)}', file=sys.stderr)


def describe(error: Exception) -> str:
    """The message of an error in one line; of the operating system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f'{error.filename}: {error.strerror}' if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def with_others() -> Iterator[None]:
    """Inside, the loss of a rank is an :class:`OtherRankError`: it has said, or its launcher says, what ended it."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _SIGNS_OF_LOSS):
            raise OtherRankError('another rank has ended') from None
        raise


def barrier() -> None:
    """Waits for every rank."""
    gather_objects(None)


def reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of ``tensor`` over the ranks, on every rank; a new tensor, without gradient."""
    world_size = get_dist_info()[1]
    if world_size == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size


def largest(value: int) -> int:
    """The largest of the ranks' values, on every rank; a word among hosts that waits for no GPU."""
    if get_dist_info()[1] == 1:
        return value
    box = torch.tensor(value)
    with with_others():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


@contextlib.contextmanager
def fail_together(interrupted_too: bool = False) -> Iterator[None]:
    """A block that every rank enters: where it fails on one, it fails on all, and no rank waits for ever.

    The error is raised where it came up, and :class:`OtherRankError` on the other ranks.  At its end the ranks wait for
    each other.

    Args:
        interrupted_too: an interruption of one rank interrupts all at the end of the block; else it leaves at once.
    """
    own: BaseException | None = None
    code = 0
    try:
        yield
    except Exception as error:
        own, code = error, _FAILED
    except KeyboardInterrupt as error:
        if not interrupted_too:
            raise
        own, code = error, getattr(error, 'number', signal.SIGINT)
    try:
        worst = largest(code)
        if code < worst:
            own = OtherRankError('another rank has failed') if worst == _FAILED else Interrupted(worst)
        if own is not None:
            own.on_all_ranks = True  # type: ignore[attr-defined]
    except OtherRankError as error:  # one is gone
        own = own or error
    if own is not None:
        raise own


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank ends in an error now: this one has left :func:`fail_together`, or there is one rank only."""
    return get_dist_info()[1] == 1 or getattr(error, 'on_all_ranks', False)


def on_rank_0(work: Callable[..., _Result], *args: Any) -> _Result:
    """What ``work(*args)`` returns on rank 0, or the user's error that it raises there, on every rank."""
    outcome: Any = None
    if is_main_process():
        try:
            outcome = work(*args)
        except (CheckpointError, ConfigError, DataError) as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (any picklable object) in rank order, on every rank."""
    world_size = get_dist_info()[1]
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    with with_others():
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: Any) -> None:
    """Gives every rank the buffers that ``model`` has on rank 0."""
    with with_others():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` (any picklable object) on every rank."""
    return gather_objects(value)[0]
