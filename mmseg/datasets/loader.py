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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

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

logger = logging.getLogger('mmseg')


def build_dataset(
        cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str = 'data.train', **defaults: Any) -> Any:
    """Builds a data set; a list of configs gives their concatenation.

    Args:
        cfg: dict with ``type``, or a list of such dicts.
        where: the key under which ``cfg`` stands in the config, for errors.
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


class _Positions(Sampler[list[tuple[int, int]]]):
    """Endless batches of (global position, item index) for one rank.

    The stream is a fresh permutation of the data set an epoch; rank r of R takes positions r, r + R, ...
    """

    def __init__(self, length: int, batch: int, seed: int, rank: int, world_size: int, start: int):
        self.length = length
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.intp)
        drawn = self.start
        while True:
            batch = []
            for _ in range(self.batch):
                position = drawn * self.world_size + self.rank
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append((position, int(order[position % self.length])))
                drawn += 1
            yield batch


class _Seeded(Dataset):
    """Items of a data set, each drawn under a seed made of (seed, position); errors of the user are values."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with seeded(self.seed, position):
            return _item_or_error(self.dataset, index)


def _item_or_error(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except _AS_VALUES as error:
        return error


class _Clips(Dataset):
    """Some items of a test set; errors of the user are values."""

    def __init__(self, dataset: VideoDataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return _item_or_error(self.dataset, self.indices[position])


class _ReadingNotes:
    """Which file each process of a loader is reading, in memory that they share with the main process.

    Args:
        processes: number of workers; 1 where the main process reads.
    """

    def __init__(self, processes: int):
        self._slots = multiprocessing.RawArray(_Slot, processes)

    def take(self, slot: int, path: str) -> None:
        """Process ``slot`` opens a file."""
        self._slots[slot].path = path.encode(errors='replace')[-ctypes.sizeof(_Slot) + 9:]
        self._slots[slot].since = time.time()

    def clear(self, slot: int) -> None:
        """Process ``slot`` has read what it needed."""
        self._slots[slot].since = 0.0

    def open(self) -> dict[int, tuple[str, float]]:
        """Process -> the file that it is reading, and for how many seconds."""
        now = time.time()
        taken = ((i, bytes(slot.path).decode(errors='replace'), slot.since) for i, slot in enumerate(self._slots))
        return {i: (path, now - since) for i, path, since in taken if since}


class _Slot(ctypes.Structure):
    _fields_ = [('since', ctypes.c_double), ('path', ctypes.c_char * 1016)]


class _Noted(Dataset):
    """A data set whose reading is noted.

    Args:
        dataset: gives an item for whatever the sampler gives.
        notes: where to.
    """

    def __init__(self, dataset: Any, notes: _ReadingNotes):
        self.dataset = dataset
        self.notes = notes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        worker = torch.utils.data.get_worker_info()
        slot = 0 if worker is None else worker.id
        former, images.watch = images.watch, partial(self.notes.take, slot)
        try:
            return self.dataset[key]
        finally:
            images.watch = former
            self.notes.clear(slot)


@contextlib.contextmanager
def _opencv_without_threads() -> Iterator[None]:
    """Ends OpenCV's threads while workers are forked, so that these run OpenCV in their one thread.

    A forked worker cannot do it for itself: it inherits OpenCV's pool without the threads in it, and
    ``cv2.setNumThreads`` waits for them, now and then for ever.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _init_worker(_: int) -> None:
    """Limits a worker to one thread, and leaves signals to the main process."""
    if torch.multiprocessing.get_start_method() != 'fork':
        cv2.setNumThreads(0)  # torch does its part
    leave_signals_to_the_parent()


def _shared(collate: Any, items: Any) -> Any:
    """What ``collate`` makes of ``items``; in a worker with its tensors in memory that the main process can see.

    The queue would move them there too, but in a thread that can tell nobody that there is no room: the main process
    would wait for ever.
    """
    batch = collate(items)
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


def collate(items: Sequence[dict[str, Any] | DataError | ConfigError]) -> dict[str, Any] | DataError | ConfigError:
    """Joins training items to a batch.

    Returns:
        ``img`` [B,T,3,H,W] float32, ``gt_semantic_seg`` [B,T,H,W] int64, ``img_metas`` (list of B dicts), ``skipped``
        (errors of all items); or the first error among the items.
    """
    clips = []
    for item in items:
        if isinstance(item, _AS_VALUES):
            return item
        clips.append(item)
    shapes = {tuple(clip['img'].shape) for clip in clips}
    if len(shapes) > 1:
        return DataError(f'a batch needs clips of one size, got {sorted(shapes)}; end the pipeline with Pad(size=...)')
    return {
        'img': torch.stack([clip['img'] for clip in clips]),
        'gt_semantic_seg': torch.stack([clip['gt_semantic_seg'] for clip in clips]).squeeze(-3),
        'img_metas': [clip['img_metas'] for clip in clips],
        'skipped': [error for clip in clips for error in clip['skipped']],
    }


_BEFORE_QUEUES = 100  # multiprocessing closes its queues, through which workers are told to stop, at 10


class _Pass(Iterator[Any]):
    """One pass through a ``DataLoader``; its worker processes end with it, with :meth:`close` or with the program.

    Where the program ends and something still holds the pass (as the traceback of an error does), multiprocessing sends
    SIGTERM to the workers and waits for them.  They ignore it, so they must have been told to stop before.

    Args:
        loader: over a :class:`_Noted` data set.
        stall_seconds: after so long a wait, and again after as long, the log says which files are being read.
    """

    def __init__(self, loader: DataLoader, stall_seconds: float = STALL_SECONDS):
        self._notes: _ReadingNotes = loader.dataset.notes  # type: ignore[attr-defined]
        self._stall_seconds = stall_seconds
        self._waiting: float | None = None  # since when
        self._ended = threading.Event()
        with _opencv_without_threads(), _own_child_signal(), _no_half_start():
            self._items = iter(loader)
        self._end: Finalize | None = None
        if loader.num_workers:
            self._end = Finalize(self, _end_workers, (self._items, self._notes), exitpriority=_BEFORE_QUEUES)
        threading.Thread(target=_watch, args=(weakref.ref(self), self._ended), name='loader', daemon=True).start()

    def __next__(self) -> Any:
        """The next item; an error in its place is raised, and so is the end of a worker."""
        self._waiting = time.monotonic()
        try:
            item = next(self._items)
        except RuntimeError as error:
            if (reason := self._ended_worker()) is not None:
                raise DataError(reason) from error
            raise
        finally:
            self._waiting = None
        if isinstance(item, _AS_VALUES):
            raise item
        return item

    def _ended_worker(self) -> str | None:
        """What ended a worker, if one has ended."""
        for worker in getattr(self._items, '_workers', ()):
            if worker.exitcode:
                name = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f'status {worker.exitcode}'
                hint = {'SIGKILL': ' (was there too little memory?)', 'SIGBUS': ' (is /dev/shm full?)'}.get(name, '')
                return f'loader worker {worker.pid} was ended by {name}{hint}'
        return None

    def stalled(self) -> str | None:
        """Which files are being read, where the wait for them has taken ``stall_seconds``, and the wait starts anew."""
        since = self._waiting
        if since is None or time.monotonic() - since < self._stall_seconds:
            return None
        self._waiting = time.monotonic()
        files = ', '.join(f'{path} (for {seconds:.0f} s)' for path, seconds in self._notes.open().values())
        return (f'the loader has delivered nothing for {self._stall_seconds:.0f} s; '
                + (f'it is reading {files}' if files else 'no file is being read'))

    @property
    def interval(self) -> float:
        """How often to look, in seconds."""
        return min(1.0, self._stall_seconds / 4)

    def close(self) -> None:
        """Ends the worker processes; what they have prepared is lost."""
        self._ended.set()
        if self._end is not None:
            self._end()

    def __del__(self) -> None:
        self._ended.set()


def _watch(of: weakref.ref[_Pass], ended: threading.Event) -> None:
    """Runs in a thread as long as the pass lives."""
    interval = 0.0
    while not ended.wait(interval):
        if (watched := of()) is None:
            return
        if message := watched.stalled():
            logger.warning(message)
        interval = watched.interval
        del watched


@contextlib.contextmanager
def _no_half_start() -> Iterator[None]:
    """Where a signal breaks the start of workers off, ends those that run already; nobody else would."""
    former = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - former:
            worker.kill()
        raise


@contextlib.contextmanager
def _own_child_signal() -> Iterator[None]:
    """Keeps torch from raising the end of a worker out of a signal handler, wherever the main thread is just then.

    It would break an update of the weights in two.  The loader notices by itself, at the next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, 'SIGCHLD'):
        yield
        return
    former = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, former if former is not None else signal.SIG_DFL)


def _end_workers(items: Any, notes: _ReadingNotes) -> None:
    """Ends the workers of a pass in good order, and those that are stuck all the same."""
    for slot, (_, seconds) in notes.open().items():
        if seconds > _STUCK_SECONDS:
            items._workers[slot].kill()
    items._shutdown_workers()
    for worker in items._workers:
        worker.kill()


class TrainLoader:
    """Endless iterator over training batches; see :func:`build_train_loader`.

    Worker processes start with the first batch and end with :meth:`close` or with the program.
    """

    def __init__(self, loader: DataLoader, stall_seconds: float = STALL_SECONDS):
        self._loader = loader
        self._stall_seconds = stall_seconds
        self._batches: _Pass | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = _Pass(self._loader, self._stall_seconds)
        return next(self._batches)

    def close(self) -> None:
        """Ends the worker processes; batches that they prepared are lost."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class TestLoader:
    """Iterates over one rank's test items in order; see :func:`build_test_loader`."""

    __test__ = False  # no test case, whatever pytest makes of its name

    def __init__(self, loader: DataLoader, stall_seconds: float = STALL_SECONDS):
        self._loader = loader
        self._stall_seconds = stall_seconds

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _Pass(self._loader, self._stall_seconds)


def _loader(dataset: Any, collate: Any, workers_per_gpu: int, **options: Any) -> DataLoader:
    """A ``DataLoader`` that notes what it reads; its own generator spares the global one."""
    generator = torch.Generator()
    generator.manual_seed(0)
    return DataLoader(
        _Noted(dataset, _ReadingNotes(max(1, workers_per_gpu))), collate_fn=partial(_shared, collate),
        num_workers=workers_per_gpu, generator=generator, worker_init_fn=_init_worker, **options)


def build_train_loader(
        dataset: Any, samples_per_gpu: int, workers_per_gpu: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1,
        start: int = 0, pin_memory: bool = False, stall_seconds: float = STALL_SECONDS) -> TrainLoader:
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
    batches = _Positions(len(dataset), samples_per_gpu, seed, rank, world_size, start)
    loader = _loader(
        _Seeded(dataset, seed), collate, workers_per_gpu, batch_sampler=batches, pin_memory=pin_memory)
    return TrainLoader(loader, stall_seconds)


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
    indices = [index for index, clip in enumerate(clips) if clip.video in mine]
    return TestLoader(_loader(_Clips(dataset, indices), _unchanged, workers_per_gpu, batch_size=None), stall_seconds)


def _unchanged(item: Any) -> Any:
    return item
