"""Data sets from configs, and the loaders that feed training and testing.

The training order is a function of a seed and a position in one endless stream of samples: neither the number of
workers, nor the number of ranks, nor a stop and resume changes which samples come at which position or what is drawn
for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.util import Finalize
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmseg.registry import DATASETS, build
from mmseg.utils import images
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.signals import leave_signals_to_the_parent

from .dataset_wrappers import ConcatDataset
from .video_dataset import VideoDataset

STALL_SECONDS = 600.0
"""After so long a wait for data the log says which files are being read."""

_STUCK_SECONDS = 2.0  # a worker that reads one file for so long is ended without being asked

_AS_VALUES = (DataError, ConfigError)  # leave a worker as values, without the worker's traceback

_BEFORE_QUEUES = 100  # multiprocessing closes its queues, through which workers are told to stop, at 10

_PATH_BYTES = 1016  # of the end of a path that are shown

_Key = tuple[int, tuple[int, int] | None]
"""What a worker is asked for: the index of an item, and the words that seed its draws; a test item draws nothing."""

logger = logging.getLogger('mmseg')


def build_dataset(
        cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str = 'data.train', **defaults: Any) -> Any:
    """Builds a data set; a list of configs gives their concatenation.

    Args:
        cfg: dict with ``type``, or a list of such dicts.
        where: the key of ``cfg`` in the config, for errors.
        **defaults: arguments that the caller supplies where ``cfg`` has none.
    """
    if isinstance(cfg, Mapping):
        return build(DATASETS, cfg, where, **defaults)
    return ConcatDataset([build(DATASETS, c, f'{where}[{i}]', **defaults) for i, c in enumerate(cfg)])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch from ``key``, and puts their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _batches(length: int, batch: int, seed: int, rank: int, world_size: int, start: int) -> Iterator[list[_Key]]:
    """Endless batches of keys for one rank.

    All ranks share one stream, a new permutation of the data set for each epoch; rank r of R takes positions r, r + R,
    and so on.
    """
    epoch, order = -1, np.empty(0, np.intp)
    keys: list[_Key] = []
    for position in count(start * world_size + rank, world_size):
        if position // length != epoch:
            epoch = position // length
            order = np.random.default_rng([seed, epoch]).permutation(length)
        keys.append((int(order[position % length]), (seed, position)))
        if len(keys) == batch:
            yield keys
            keys = []


class _Slot(ctypes.Structure):
    """The file that a process is reading, and since when; 0.0 where it reads none."""

    _fields_ = [('since', ctypes.c_double), ('path', ctypes.c_char * _PATH_BYTES)]

    def take(self, path: str) -> None:
        """The process opens a file."""
        self.path = path.encode(errors='replace')[-_PATH_BYTES:]
        self.since = time.time()


class _Items(Dataset):
    """Items of a data set by key; errors of the user are values.

    Memory that all processes share holds which file each of them is reading.

    Args:
        dataset: gives an item for an index.
        processes: number of workers; 1 where the main process reads.
    """

    def __init__(self, dataset: Any, processes: int):
        self.dataset = dataset
        self._slots = multiprocessing.RawArray(_Slot, processes)

    def __getitem__(self, key: _Key) -> Any:
        index, seed = key
        worker = torch.utils.data.get_worker_info()
        slot = self._slots[0 if worker is None else worker.id]
        former, images.watch = images.watch, slot.take
        try:
            with seeded(*seed) if seed else contextlib.nullcontext():
                return self.dataset[index]
        except _AS_VALUES as error:
            return error
        finally:
            images.watch = former
            slot.since = 0.0

    def open_files(self) -> dict[int, tuple[str, float]]:
        """Process -> the file that it is reading, and for how many seconds."""
        now = time.time()
        taken = [(slot.path.decode(errors='replace'), slot.since) for slot in self._slots]
        return {process: (path, now - since) for process, (path, since) in enumerate(taken) if since}


def _init_worker(_: int) -> None:
    """Limits a worker to one thread, and leaves signals to the main process."""
    if torch.multiprocessing.get_start_method() != 'fork':
        cv2.setNumThreads(0)  # torch does its part
    leave_signals_to_the_parent()


def _shared(collate: Callable[[Any], Any] | None, items: Any) -> Any:
    """What ``collate`` makes of ``items``; in a worker with its tensors in memory that the main process can see.

    The queue would move them there too, but in a thread that can tell nobody that there is no room: the main process
    would wait for ever.
    """
    batch = items if collate is None else collate(items)
    if torch.utils.data.get_worker_info() is not None:
        try:
            _share(batch)
        except RuntimeError as error:
            room = ''
            with contextlib.suppress(OSError):  # a system without this folder
                room = f' ({shutil.disk_usage("/dev/shm").free / 2**20:.1f} MiB of /dev/shm are free)'
            return DataError(
                f'a worker cannot hand a batch over: {str(error).splitlines()[0]}{room}; give shared memory more room '
                '(docker run --shm-size=1g), or set data.workers_per_gpu=0')
    return batch


def _share(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            _share(part)


def collate(clips: Sequence[Any]) -> dict[str, Any] | DataError | ConfigError:
    """Joins training items to a batch.

    Returns:
        ``img`` [B,T,3,H,W] float32, ``gt_semantic_seg`` [B,T,H,W] int64, ``img_metas`` (list of B dicts), ``skipped``
        (errors of all items); or the first error among the items.
    """
    for clip in clips:
        if isinstance(clip, _AS_VALUES):
            return clip
    shapes = {tuple(clip['img'].shape) for clip in clips}
    if len(shapes) > 1:
        return DataError(f'a batch needs clips of one size, got {sorted(shapes)}; end the pipeline with Pad(size=...)')
    return {
        'img': torch.stack([clip['img'] for clip in clips]),
        'gt_semantic_seg': torch.stack([clip['gt_semantic_seg'] for clip in clips]).squeeze(-3),
        'img_metas': [clip['img_metas'] for clip in clips],
        'skipped': [error for clip in clips for error in clip['skipped']],
    }


class Pass(Iterator[Any]):
    """One pass through a ``DataLoader``.

    Worker processes start with the first item, and end with the pass, with :meth:`close` or with the program.  Where
    the program ends and something still holds the pass (as the traceback of an error does), multiprocessing sends
    SIGTERM to the workers and waits for them.  They ignore it, so they must have been told to stop before.

    Args:
        loader: over :class:`_Items`.
        stall_seconds: after so long a wait, and again after as long, the log says which files are being read.
    """

    def __init__(self, loader: DataLoader, stall_seconds: float):
        self._loader = loader
        self._stall_seconds = stall_seconds
        self._items: Iterator[Any] | None = None
        self._end: Finalize | None = None
        self._waiting: float | None = None  # since when
        self._reported = 0.0

    def __next__(self) -> Any:
        """The next item; an error in its place is raised, and so is the end of a worker."""
        if self._items is None:
            self._start()
        assert self._items is not None
        self._waiting = time.monotonic()
        try:
            item = next(self._items)
        except RuntimeError as error:
            if (reason := _ended_worker(self._items)) is not None:
                raise DataError(reason) from error
            raise
        finally:
            self._waiting = None
        if isinstance(item, _AS_VALUES):
            raise item
        return item

    def _start(self) -> None:
        with _starting_workers():
            self._items = iter(self._loader)
        if self._loader.num_workers:
            self._end = Finalize(
                self, _end_workers, (self._items, self._loader.dataset), exitpriority=_BEFORE_QUEUES)
        threading.Thread(target=_watch, args=(weakref.ref(self),), name='loader', daemon=True).start()

    def report_stall(self) -> float:
        """Warns where the wait for an item has taken ``stall_seconds``; returns when to look again, in seconds."""
        now, since = time.monotonic(), self._waiting
        if since is not None and now - max(since, self._reported) >= self._stall_seconds:
            self._reported = now
            reading = self._loader.dataset.open_files().values()  # type: ignore[attr-defined]
            files = ', '.join(f'{path} (for {seconds:.0f} s)' for path, seconds in reading)
            logger.warning('the loader has delivered nothing for %.0f s; %s', self._stall_seconds,
                           f'it is reading {files}' if files else 'no file is being read')
        return min(1.0, self._stall_seconds / 4)

    def close(self) -> None:
        """Ends the worker processes; what they have prepared is lost."""
        self._items = iter(())
        if self._end is not None:
            self._end()


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Inside, worker processes are started.

    * OpenCV has no threads, so that the workers run it in their one thread.  A forked worker cannot end them for
      itself: it inherits OpenCV's pool without the threads in it, and ``cv2.setNumThreads`` waits for them, now and
      then for ever.
    * torch's handler of SIGCHLD is taken away again.  It raises the end of a worker wherever the main thread is just
      then, and would break an update of the weights in two.  The loader notices by itself, at the next batch.
    * Where a signal breaks the start off, the workers that run already are ended; nobody else would.
    """
    threads, former = cv2.getNumThreads(), set(multiprocessing.active_children())
    handled = threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD')
    handler = signal.getsignal(signal.SIGCHLD) if handled else None
    cv2.setNumThreads(0)
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - former:
            worker.kill()
        raise
    finally:
        cv2.setNumThreads(threads)
        if handled:
            signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)


def _watch(reference: weakref.ref[Pass]) -> None:
    """Runs in a thread as long as the pass lives."""
    while (watched := reference()) is not None:
        pause = watched.report_stall()
        del watched
        time.sleep(pause)


def _ended_worker(items: Any) -> str | None:
    """What ended a worker, if one has ended."""
    for worker in getattr(items, '_workers', ()):
        if worker.exitcode:
            name = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f'status {worker.exitcode}'
            hint = {'SIGKILL': ' (was there too little memory?)', 'SIGBUS': ' (is /dev/shm full?)'}.get(name, '')
            return f'loader worker {worker.pid} was ended by {name}{hint}'
    return None


def _end_workers(iterator: Any, items: _Items) -> None:
    """Tells the workers of a pass to end, and kills those that do not."""
    for process, (_, seconds) in items.open_files().items():
        if seconds > _STUCK_SECONDS:
            iterator._workers[process].kill()
    iterator._shutdown_workers()
    for worker in iterator._workers:
        worker.kill()


@dataclass(frozen=True)
class TestLoader:
    """Iterates over one rank's test items in order; see :func:`build_test_loader`."""

    loader: DataLoader
    stall_seconds: float
    __test__ = False  # no test case, whatever pytest makes of its name

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Pass:
        return Pass(self.loader, self.stall_seconds)


def _loader(dataset: Any, collate: Callable[[Any], Any] | None, workers_per_gpu: int, **options: Any) -> DataLoader:
    """A ``DataLoader`` over keys; its own generator spares the global one."""
    generator = torch.Generator()
    generator.manual_seed(0)
    return DataLoader(
        _Items(dataset, max(1, workers_per_gpu)), collate_fn=partial(_shared, collate), num_workers=workers_per_gpu,
        generator=generator, worker_init_fn=_init_worker, **options)


def build_train_loader(
        dataset: Any, samples_per_gpu: int, workers_per_gpu: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1,
        start: int = 0, pin_memory: bool = False, stall_seconds: float = STALL_SECONDS) -> Pass:
    """An endless iterator over training batches.

    Sample number g of the whole run is item ``permutation(epoch)[g % len(dataset)]``, drawn with all random generators
    seeded by (``seed``, g).  Rank r of R takes numbers r, r + R, ..., so batches of two ranks together are the batch of
    one process with twice the size (in another order).

    Args:
        dataset: a training set.
        samples_per_gpu: batch size of this rank.
        workers_per_gpu: worker processes; 0 draws in this process, whose random generators stay as they were.
        seed: of the whole run, the same on all ranks.
        rank: this process.
        world_size: number of processes.
        start: number of samples that this rank has drawn already (resume).
        pin_memory: prepare batches in page-locked memory, for a GPU.
        stall_seconds: after so long a wait for a batch the log says which files are being read.

    Returns:
        Iterator over dicts as :func:`collate` makes them.

    Raises:
        ConfigError: ``dataset`` is a test set.
        DataError: while iterating, for a bad file.
    """
    if not dataset.is_training:
        raise ConfigError('training needs a data set with dilation ([0] for single frames), got one with test_size')
    keys = _batches(len(dataset), samples_per_gpu, seed, rank, world_size, start)
    return Pass(_loader(dataset, collate, workers_per_gpu, batch_sampler=keys, pin_memory=pin_memory), stall_seconds)


def share_videos(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Deals videos to ranks so that the ranks' numbers of frames are about equal.

    The longest video goes first, each to the rank with the fewest frames so far.

    Args:
        lengths: number of frames of every video.
        world_size: number of ranks.

    Returns:
        Ascending indices of every rank's videos; empty for some where there are more ranks than videos.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for video in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(video)
        loads[rank] += lengths[video]
    return [sorted(share) for share in shares]


def build_test_loader(
        dataset: VideoDataset, workers_per_gpu: int = 0, rank: int = 0, world_size: int = 1,
        stall_seconds: float = STALL_SECONDS) -> TestLoader:
    """Iterates over the test items of this rank's videos, video by video, clip by clip.

    Every video is on one rank as a whole, so that metrics over time can be streamed.

    Args:
        dataset: a test set.
        workers_per_gpu: worker processes.
        rank: this process.
        world_size: number of processes.
        stall_seconds: as of :func:`build_train_loader`.

    Returns:
        Iterable with a length, over items of :class:`~mmseg.datasets.video_dataset.VideoDataset`.

    Raises:
        ConfigError: ``dataset`` is a training set.
        DataError: while iterating, for a bad file.
    """
    clips = getattr(dataset, 'clips', None)
    if clips is None:
        raise ConfigError('testing needs a data set with test_size, got a training set')
    mine = set(share_videos([len(video.frames) for video in dataset.videos], world_size)[rank])
    keys: list[_Key] = [(index, None) for index, clip in enumerate(clips) if clip.video in mine]
    return TestLoader(_loader(dataset, None, workers_per_gpu, batch_size=None, sampler=keys), stall_seconds)
