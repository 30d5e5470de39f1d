"""Checkpoints that are whole or absent, and safe to read.

A file is written beside its place, brought to the disk and renamed, so a crash leaves the earlier files as they were.
Reading never runs code from the file, checks every byte against the checksums in it, and accepts the layout of mmcv 1.x
(``meta``, ``state_dict``, ``optimizer``) as well as a bare state dict.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from mmseg.utils.errors import CheckpointError
from mmseg.utils.files import atomic_file, write_atomically
from mmseg.utils.names import some
from mmseg.utils.numpy_pickles import CONSTRUCTORS

LATEST = 'latest.pth'
RUN = 'run'
"""Key of ``meta``: the id of the run that saved a checkpoint."""

_LATEST_RUN = '.latest.run'
_NUMBERED = re.compile(r'iter_(\d+)\.pth')
_LEFTOVERS = '.*.pth.*.part'
_REFUSED = re.compile(r'GLOBAL (\S+)')
_SHOWN = 5
_WRAPPERS = ('module', 'model')
_COMPILED = re.compile(r'(?<![^.])_orig_mod\.')
_DIRECTORY = 0x10  # an entry's attribute in a zip file

logger = logging.getLogger('mmseg')


class DamagedCheckpointError(CheckpointError):
    """The file is truncated, altered, or no checkpoint at all."""


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
        # torch names the position at which a write failed; the reason is in the error of the operating system before it
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


def point_latest(path: Path, run_id: str | None = None) -> None:
    """Makes ``latest.pth`` beside ``path`` a link to it; where the file system has no links, there is none.

    A file of its own holds the id of its run, which is thus known where the checkpoint is damaged.
    """
    link = path.with_name(LATEST)
    temporary = path.with_name(f'.{LATEST}.{os.getpid()}.part')
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, link)
        write_atomically(path.with_name(_LATEST_RUN), run_id or '', sync=False)
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
        A dict with at least ``meta`` (dict) and ``state_dict`` (name -> tensor, without the prefixes of wrappers).

    Raises:
        DamagedCheckpointError: the file is truncated or altered, or holds no weights.
        CheckpointError: it is missing or cannot be opened, or is refused because it would run code.
    """
    path = Path(path).expanduser()
    with open_for_reading(path) as file, _named_damage(path):
        _check_archive(file, path)
        with _safe_globals():
            return _normalised(torch.load(file, map_location='cpu', weights_only=True), path)


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[IO[bytes]]:
    """A checkpoint file, open; what the operating system says against reading it is no damage.

    Raises:
        CheckpointError: it is missing, is no file, may not be read, or its disk fails.
    """
    try:
        with path.open('rb') as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint '{path}' does not exist (looked from {Path.cwd()})") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be read: {error.strerror or error}") from error


def _check_archive(file: IO[bytes], path: Path) -> None:
    """Compares the checksums in a zip file; torch does not, and gives memory as it was for an entry marked a folder.

    Raises:
        DamagedCheckpointError: naming the entry.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
            folder = next((entry.filename for entry in archive.infolist() if entry.external_attr & _DIRECTORY), None)
        if altered or folder:
            fault = f'wrong checksum of {altered}' if altered else f'its entry {folder} is marked as a folder'
            raise DamagedCheckpointError(f"checkpoint '{path}' is damaged: {fault}")
    file.seek(0)


def _safe_globals() -> Any:
    """A context inside which numpy's numbers and strings may be read from a checkpoint."""
    return torch.serialization.safe_globals([(made, name) for name, made in CONSTRUCTORS.items()])


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Inside, whatever a reader raises at broken bytes is one error; so is what it refuses because it would run code.

    An error of the operating system passes through, but for ``EINVAL``, its answer to an offset in broken bytes.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # torch wraps the error of a pickle in advice that does not hold here
        cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        if isinstance(error, pickle.UnpicklingError) and (refused := _REFUSED.search(str(cause))):
            raise CheckpointError(
                f"checkpoint '{path}' is refused: loading it would call {refused[1]}, which is code and not weights; "
                'ask its author for a file with tensors only'
            ) from None
        reason = str(cause).splitlines()[0] if str(cause) else 'the file ends too early'
        raise DamagedCheckpointError(
            f"checkpoint '{path}' is damaged or no checkpoint: {type(cause).__name__}: {reason}"
        ) from None


def _normalised(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise DamagedCheckpointError(f"checkpoint '{path}' holds a {type(content).__name__}, not a dict")
    checkpoint = dict(content)
    weights = checkpoint.get('state_dict', checkpoint.get('model'))
    if weights is None and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint, weights = {}, checkpoint
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(name, str) for name in weights):
        raise DamagedCheckpointError(f"checkpoint '{path}' holds no weights (its keys: {some([*map(str, content)])})")
    meta = checkpoint.get('meta') or {}
    if not isinstance(meta, Mapping):
        raise DamagedCheckpointError(f"checkpoint '{path}': meta is a {type(meta).__name__}, not a dict")
    checkpoint.pop('model', None)
    checkpoint['state_dict'] = without_wrappers(weights, path)
    checkpoint['meta'] = dict(meta)
    return checkpoint


def without_wrappers(weights: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """``weights`` under the names of the model alone; the log says which prefixes of wrappers were stripped."""
    own = unwrapped_names(weights)
    stripped = [name for name in weights if own[name] != name]
    if stripped:
        logger.info("'%s': the prefixes of wrappers are stripped from %d of %d names (%s -> %s)", source, len(stripped),
                    len(weights), stripped[0], own[stripped[0]])  # fmt: skip
    return {own[name]: value for name, value in weights.items()}


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Each name -> the name without what DDP, ``torch.compile`` and Lightning put before it, in any order.

    A prefix goes where most names have it and no two become equal; that of ``torch.compile`` may be inside names.
    """
    own = {name: name for name in names}
    compiled = {name: _COMPILED.sub('', name) for name in own}
    if len(set(compiled.values())) == len(own):
        own = compiled
    while own:
        first, count = Counter(name.partition('.')[0] for name in own.values()).most_common(1)[0]
        shorter = {name: now.removeprefix(f'{first}.') for name, now in own.items()}
        collide = len(set(shorter.values())) < len(own)
        if first not in _WRAPPERS or 2 * count <= len(own) or collide or shorter == own:
            break
        own = shorter
    return own


def run_of(path: str | Path, unreadable: str | None = None) -> str | None:
    """The id of the run that saved a checkpoint, None where the file has none; ``unreadable`` where it is damaged."""
    try:
        status = os.stat(path)
        return _read_run(str(path), status.st_ino, status.st_mtime_ns, status.st_size)
    except Exception:  # broken bytes may raise anything
        return unreadable


@functools.lru_cache(maxsize=4096)
def _read_run(path: str, *_version: int) -> str | None:
    with _safe_globals():
        return dict(torch.load(path, map_location='cpu', weights_only=True, mmap=True).get('meta') or {}).get(RUN)


def _latest_run(folder: Path) -> str | None:
    """The id of the run that ``latest.pth`` of a work dir points to."""
    latest = folder / LATEST
    if os.path.lexists(latest):
        with contextlib.suppress(OSError):
            return run_of(latest) or (folder / _LATEST_RUN).read_text(encoding='utf-8')
    return None


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of the run in a work dir and its content; damaged ones are named and passed over.

    ``latest.pth`` names the run where several have left checkpoints.

    Raises:
        CheckpointError: there is none, or a file is refused because it would run code.
    """
    alone = Path(folder) / LATEST  # perhaps a copy that somebody took along
    files = checkpoint_files(folder)
    run_id = _latest_run(Path(folder))
    if run_id:
        files = [path for path in files if run_of(path, run_id) == run_id]  # reading will name what is damaged
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
    path = Path(path).expanduser()
    if path.is_dir():
        return newest_checkpoint(path)
    return path, read_checkpoint(path)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Puts ``weights`` into ``model``; every name and shape must fit.

    Raises:
        CheckpointError: naming what is missing, unexpected, no tensor or of another shape.
    """
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"checkpoint '{source}': {name} is a {type(value).__name__}, expected a tensor")
    own = model.state_dict()
    wrong = [
        f'{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} here'
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoint '{source}' is of another model (other backbone, classes or widths?): {some(wrong)}"
        )
    result = model.load_state_dict(dict(weights), strict=False)
    faults = []
    if result.missing_keys:  # torch gives the names of the code
        faults.append(f'missing: {some([name for name in own if name not in weights])}')
    if result.unexpected_keys:
        faults.append(f'unexpected: {some(result.unexpected_keys)}')
    if faults:
        raise CheckpointError(f"checkpoint '{source}' does not fit the model; {'; '.join(faults)}")


def load_checkpoint(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint file (or the newest whole one of a work dir) strictly into ``model``; returns its ``meta``."""
    path, checkpoint = open_checkpoint(path)
    load_weights(model, checkpoint['state_dict'], path)
    return checkpoint['meta']
