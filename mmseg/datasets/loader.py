"""Data sets from configs, and the loaders that feed training and testing.

The training order is a function of a seed and a position in one endless stream of samples: neither the number of
workers, nor the number of ranks, nor a stop and resume changes which samples come at which position or what is drawn
for them.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.util import Finalize
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmseg.registry import DATASETS, build
from mmseg.utils.errors import ConfigError, DataError

from .dataset_wrappers import ConcatDataset
from .video_dataset import VideoDataset


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
    """Items of a data set, each drawn under a seed made of (seed, position).

    A :class:`DataError` is returned as a value: so it leaves a worker without the worker's traceback, and the loader
    raises it as it is.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with seeded(self.seed, position):
            try:
                return self.dataset[index]
            except DataError as error:
                return error


class _Clips(Dataset):
    """Some items of a test set, with a :class:`DataError` returned as a value."""

    def __init__(self, dataset: VideoDataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        try:
            return self.dataset[self.indices[position]]
        except DataError as error:
            return error


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
    """Limits a worker to one thread, and leaves signals to the main process, which finishes its iteration first."""
    if torch.multiprocessing.get_start_method() != 'fork':
        cv2.setNumThreads(0)  # torch does its part
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(items: Sequence[dict[str, Any] | DataError]) -> dict[str, Any] | DataError:
    """Joins training items to a batch.

    Returns:
        ``img`` [B,T,3,H,W] float32, ``gt_semantic_seg`` [B,T,H,W] int64, ``img_metas`` (list of B dicts), ``skipped``
        (errors of all items); or the first error among the items.
    """
    clips = []
    for item in items:
        if isinstance(item, DataError):
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
    """

    def __init__(self, loader: DataLoader):
        with _opencv_without_threads():
            self._items = iter(loader)
        self._end: Finalize | None = None
        if loader.num_workers:
            self._end = Finalize(self, _end_workers, (self._items,), exitpriority=_BEFORE_QUEUES)

    def __next__(self) -> Any:
        """The next item; a :class:`DataError` among them is raised."""
        item = next(self._items)
        if isinstance(item, DataError):
            raise item
        return item

    def close(self) -> None:
        """Ends the worker processes; what they have prepared is lost."""
        if self._end is not None:
            self._end()


def _end_workers(items: Any) -> None:
    """Ends the workers of a pass in good order, and those that are stuck all the same."""
    items._shutdown_workers()
    for worker in items._workers:
        worker.kill()


class TrainLoader:
    """Endless iterator over training batches; see :func:`build_train_loader`.

    Worker processes start with the first batch and end with :meth:`close` or with the program.
    """

    def __init__(self, loader: DataLoader):
        self._loader = loader
        self._batches: _Pass | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = _Pass(self._loader)
        return next(self._batches)

    def close(self) -> None:
        """Ends the worker processes; batches that they prepared are lost."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class TestLoader:
    """Iterates over one rank's test items in order; see :func:`build_test_loader`."""

    __test__ = False  # no test case, whatever pytest makes of its name

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _Pass(self._loader)


def _workers(workers_per_gpu: int) -> dict[str, Any]:
    """Arguments of ``DataLoader`` that concern worker processes; its own generator spares the global one."""
    generator = torch.Generator()
    generator.manual_seed(0)
    return dict(num_workers=workers_per_gpu, generator=generator, worker_init_fn=_init_worker)


def build_train_loader(
        dataset: Any, samples_per_gpu: int, workers_per_gpu: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1,
        start: int = 0, pin_memory: bool = False) -> TrainLoader:
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

    Returns:
        Iterator over dicts as :func:`collate` makes them.

    Raises:
        ConfigError: ``dataset`` is a test set.
        DataError: while iterating, for a bad file.
    """
    if not dataset.is_training:
        raise ConfigError('training needs a data set with dilation ([0] for single frames), got one with test_size')
    batches = _Positions(len(dataset), samples_per_gpu, seed, rank, world_size, start)
    return TrainLoader(DataLoader(
        _Seeded(dataset, seed), batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory,
        **_workers(workers_per_gpu)))


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
        dataset: VideoDataset, workers_per_gpu: int = 0, rank: int = 0, world_size: int = 1) -> TestLoader:
    """Iterates over the test items of this rank's videos, video by video, clip by clip.

    Every video is on one rank as a whole, so that metrics over time can be streamed.

    Args:
        dataset: a test set.
        workers_per_gpu: worker processes.
        rank: this process.
        world_size: number of processes.

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
    return TestLoader(DataLoader(
        _Clips(dataset, indices), batch_size=None, collate_fn=_unchanged, **_workers(workers_per_gpu)))


def _unchanged(item: Any) -> Any:
    return item
