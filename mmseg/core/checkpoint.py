"""Checkpoints that are whole or absent, and safe to read.

A file is written beside its place, brought to the disk and renamed, so a crash leaves the earlier files as they were.
Reading never runs code from the file, checks every byte against the checksums in it, and accepts the layout of mmcv 1.x
(``meta``, ``state_dict``, ``optimizer``) as well as a bare state dict.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmseg.utils.errors import CheckpointError
from mmseg.utils.files import atomic_file

LATEST = 'latest.pth'
RUN = 'run'
"""Key of ``meta``: the id of the run that saved a checkpoint."""

_NUMBERED = re.compile(r'iter_(\d+)\.pth')
_LEFTOVERS = '.*.pth.*.part'
_REFUSED = re.compile(r'GLOBAL (\S+)')
_SHOWN = 5

logger = logging.getLogger('mmseg')


class DamagedCheckpointError(CheckpointError):
    """The file is truncated, altered, or no checkpoint at all."""


def _numpy_constructors() -> list[Any]:
    """What numpy arrays and numbers in the ``meta`` of old checkpoints are made with; none of it runs foreign code."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    named: list[Any] = [np.ndarray, np.dtype]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        named += [(getattr(multiarray, name), f'{module}.{name}') for name in ('_reconstruct', 'scalar')]
    return named + [type(np.dtype(kind)) for kind in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?US']


# ---------------------------------------------------------------------------------------------------------- write


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Writes ``checkpoint`` to ``path``, which appears only when it is whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing half-written stays, and an earlier
            file of that name is unharmed.
    """
    path = Path(path)
    try:
        with atomic_file(path) as file:
            torch.save(dict(checkpoint), file)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write by the position it lost; the operating system's reason stands behind it
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(error, RuntimeError) and reason is error and 'inline_container' not in str(error):
            raise
        raise CheckpointError(
            f'cannot write {path}: {reason}; free some space or choose another --work-dir '
            '(earlier checkpoints are unharmed)'
        ) from error


def _sync_folder(folder: Path) -> None:
    """Brings a rename to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def point_latest(path: Path) -> None:
    """Makes ``latest.pth`` beside ``path`` a link to it; where the file system has no links, there is none."""
    link = path.with_name(LATEST)
    temporary = path.with_name(f'.{LATEST}.{os.getpid()}.part')
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, link)
    except OSError as error:
        logger.warning('no %s pointer: %s', LATEST, error)


def prune_checkpoints(folder: Path, keep: int, newest: int, run_id: str | None = None) -> None:
    """Deletes a run's numbered checkpoints up to iteration ``newest`` but the last ``keep``; others are not its own."""
    own = [path for path in checkpoint_files(folder) if checkpoint_iteration(path) <= newest and run_of(path) == run_id]
    for path in own[keep:]:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what an interrupted save left in ``folder``."""
    for path in folder.glob(_LEFTOVERS):
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- read


def checkpoint_iteration(path: Path) -> int:
    """The iteration in the name ``iter_<n>.pth``, or -1."""
    match = _NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else -1


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The numbered checkpoints of a work dir, latest iteration first."""
    files = [path for path in Path(folder).glob('iter_*.pth') if checkpoint_iteration(path) >= 0]
    return sorted(files, key=checkpoint_iteration, reverse=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint into CPU memory without running code from it.

    Returns:
        A dict with at least ``meta`` (dict) and ``state_dict`` (name -> tensor, without a ``module.`` prefix).

    Raises:
        DamagedCheckpointError: the file is truncated or altered, or holds no weights.
        CheckpointError: it is missing, or is refused because it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{path}' does not exist (looked from {Path.cwd()})")
    try:
        with _named_damage(path):
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    altered = archive.testzip()
                if altered:
                    raise DamagedCheckpointError(f"checkpoint '{path}' is damaged: wrong checksum of {altered}")
            with torch.serialization.safe_globals(_numpy_constructors()):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise DamagedCheckpointError(f"checkpoint '{path}' is damaged or no checkpoint: {error}") from None
        raise CheckpointError(
            f"checkpoint '{path}' is refused: loading it would call {refused[1]}, which is code and not weights; "
            'ask its author for a file with tensors only'
        ) from None
    return _normalised(content, path)


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Turns whatever a reader throws at broken bytes into one error; what is refused as unsafe passes through."""
    try:
        yield
    except (pickle.UnpicklingError, CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else 'the file ends too early'
        raise DamagedCheckpointError(
            f"checkpoint '{path}' is damaged or no checkpoint: {type(error).__name__}: {reason}"
        ) from None


def _normalised(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise DamagedCheckpointError(f"checkpoint '{path}' holds a {type(content).__name__}, not a dict")
    checkpoint = dict(content)
    weights = checkpoint.get('state_dict', checkpoint.get('model'))
    if weights is None and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint, weights = {}, checkpoint
    if not isinstance(weights, Mapping) or not weights:
        raise DamagedCheckpointError(f"checkpoint '{path}' holds no weights (its keys: {', '.join(map(str, content))})")
    checkpoint.pop('model', None)
    checkpoint['state_dict'] = {name.removeprefix('module.'): value for name, value in weights.items()}
    checkpoint['meta'] = dict(checkpoint.get('meta') or {})
    return checkpoint


def run_of(path: str | Path) -> str | None:
    """The id of the run that saved a checkpoint; None where the file has none or cannot be read."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return _run_of(str(path), status.st_ino, status.st_mtime_ns, status.st_size)
    return None


@functools.lru_cache(maxsize=4096)
def _run_of(path: str, *_version: int) -> str | None:
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_numpy_constructors()):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)['meta'].get(RUN)
    return None


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of the run in a work dir and its content; damaged ones are named and passed over.

    ``latest.pth`` names the run where several have left checkpoints.

    Raises:
        CheckpointError: there is none, or a file is refused because it would run code.
    """
    alone = Path(folder) / LATEST  # perhaps a copy that somebody took along
    files = checkpoint_files(folder)
    run_id = run_of(alone)
    if run_id is not None:
        files = [path for path in files if run_of(path) == run_id]
    if not files and alone.is_file():
        files = [alone]
    for path in files:
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpointError as error:
            logger.warning('%s; trying the one before it', error)
    found = f'{len(files)} damaged ones' if files else 'no file iter_*.pth'
    raise CheckpointError(f"'{folder}' has no complete checkpoint ({found})")


def open_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Reads a checkpoint file, or the newest whole one of a work dir; returns its path and content."""
    path = Path(path)
    if path.is_dir():
        return newest_checkpoint(path)
    return path, read_checkpoint(path)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Puts ``weights`` into ``model``; every name and shape must fit.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    wrong = [
        f'{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} here'
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoint '{source}' is of another model (other backbone, classes or widths?): {_some(wrong)}"
        )
    result = model.load_state_dict(dict(weights), strict=False)
    faults = []
    if result.missing_keys:  # torch gives the names of the code
        faults.append(f'missing: {_some([name for name in own if name not in weights])}')
    if result.unexpected_keys:
        faults.append(f'unexpected: {_some(result.unexpected_keys)}')
    if faults:
        raise CheckpointError(f"checkpoint '{source}' does not fit the model; {'; '.join(faults)}")


def load_checkpoint(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint file (or the newest whole one of a work dir) strictly into ``model``; returns its ``meta``."""
    path, checkpoint = open_checkpoint(path)
    load_weights(model, checkpoint['state_dict'], path)
    return checkpoint['meta']


def _some(names: list[str]) -> str:
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more
