"""What the environment says of who started this process, beside how many others; read without torch."""

from __future__ import annotations

import os

from mmseg.utils.errors import ConfigError

PATIENCE = 5.0  # seconds in which a launcher ends the processes beside one that has failed
RANK_VARIABLES = {
    'pytorch': dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    'mpi': dict(
        RANK='OMPI_COMM_WORLD_RANK', WORLD_SIZE='OMPI_COMM_WORLD_SIZE', LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK'
    ),
}


def detect_launcher(given: str = 'none') -> str:
    """``given``; where that is ``none``, the launcher in whose environment this process runs beside others, if any.

    torchrun goes first, because srun and mpirun may start one torchrun on each machine.
    """
    if given != 'none':
        return given
    steps = 'SLURM_STEP_NUM_TASKS' if 'SLURM_STEP_NUM_TASKS' in os.environ else 'SLURM_NTASKS'
    signs = {
        'pytorch': ('WORLD_SIZE', ('RANK', 'LOCAL_RANK')),
        'slurm': (steps, ('SLURM_PROCID', 'SLURM_STEP_ID')),  # a job without a step is one process
        'mpi': ('OMPI_COMM_WORLD_SIZE', ('OMPI_COMM_WORLD_RANK',)),
    }
    for launcher, (size, others) in signs.items():
        if all(name in os.environ for name in (size, *others)) and whole_number(size, 1) > 1:
            return launcher
    return 'none'


def whole_number(variable: str, least: int, most: int = 2**31) -> int:
    """The whole number in an environment variable."""
    text = os.environ[variable]
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        limits = f'at least {least}' if most == 2**31 else f'from {least} to {most}'
        raise ConfigError(f"environment variable {variable}: expected a whole number, {limits}, got '{text}'")
    return int(text)


def is_first_of_machine() -> bool:
    """What the launchers' variables say; it needs no process group."""
    return all(os.environ.get(variables['LOCAL_RANK'], '0') in ('', '0') for variables in RANK_VARIABLES.values())
