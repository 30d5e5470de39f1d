"""Loaders: the data of a run depends on seed and position alone; test videos are dealt out whole."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.datasets import build_dataset, build_test_loader, build_train_loader
from mmseg.datasets.loader import _init_worker, share_videos
from mmseg.utils.errors import ConfigError, DataError
from tests.vspw_fixture import test_config as config_for_testing
from tests.vspw_fixture import train_config, write_vspw


@pytest.fixture(scope='module')
def vspw(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('vspw'))


@pytest.fixture(scope='module')
def dataset(vspw):
    return build_dataset(train_config(vspw, dilation=[-3], times=3, crop=32))


def draw(dataset, batches, **options):
    """The first batches' images and labels, item by item."""
    loader = build_train_loader(dataset, options.pop('samples_per_gpu', 2), **options)
    items = []
    for batch in itertools.islice(loader, batches):
        items += [(img, gt) for img, gt in zip(batch['img'], batch['gt_semantic_seg'])]
    loader.close()
    return items


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def test_a_batch(dataset):
    batch = next(build_train_loader(dataset, 3))
    assert batch['img'].shape == (3, 2, 3, 32, 32) and batch['img'].dtype == torch.float32
    assert batch['gt_semantic_seg'].shape == (3, 2, 32, 32) and batch['gt_semantic_seg'].dtype == torch.int64
    assert batch['skipped'] == [] and len(batch['img_metas']) == 3


def test_workers_ranks_and_resume_do_not_change_the_data(dataset):
    stream = draw(dataset, 8, seed=5)
    assert same(draw(dataset, 8, seed=5, workers_per_gpu=2), stream)
    assert same(draw(dataset, 5, seed=5, start=6), stream[6:])
    assert same(draw(dataset, 4, seed=5, samples_per_gpu=4), stream)
    ranks = [draw(dataset, 4, seed=5, rank=rank, world_size=2) for rank in range(2)]
    assert same([item for pair in zip(*ranks) for item in pair], stream)
    resumed = [draw(dataset, 3, seed=5, rank=rank, world_size=2, start=2) for rank in range(2)]
    assert same([item for pair in zip(*resumed) for item in pair], stream[4:])
    assert not same(draw(dataset, 8, seed=6), stream)


def test_an_epoch_shows_every_item_once_and_epochs_differ(dataset):
    class Numbers(torch.utils.data.Dataset):
        is_training = True

        def __len__(self):
            return 9

        def __getitem__(self, index):
            draws = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)
            return dict(img=torch.tensor([index]), gt_semantic_seg=draws[:, None, None], img_metas={}, skipped=[])

    seen = draw(Numbers(), 27, samples_per_gpu=1)
    order = [int(index) for index, _ in seen]
    epochs = [order[i:i + 9] for i in (0, 9, 18)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    draws = torch.stack([numbers.flatten() for _, numbers in seen])
    assert len(draws.unique()) == draws.numel()  # a repeated item is drawn anew, by each of the three generators


def test_drawing_leaves_the_global_generators_alone(dataset):
    loader = build_train_loader(dataset, 2)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        expected = random.random(), np.random.rand(), float(torch.rand(()))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        next(loader)
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_file_is_one_clear_error(tmp_path, workers):
    write_vspw(tmp_path, {'train': {'a': 2}, 'val': {'v': 2}})
    for path in tmp_path.glob('data/*/origin/*.jpg'):
        path.write_bytes(b'')
    train = build_train_loader(build_dataset(train_config(tmp_path)), 2, workers)
    val = build_test_loader(build_dataset(config_for_testing(tmp_path)), workers)
    for loader in (train, iter(val)):
        with pytest.raises(DataError, match=r"^video '.', frame 0000000\d: .*empty file") as error:
            next(loader)
        assert 'Traceback' not in str(error.value)
    train.close()


def test_skipped_clips_are_listed_in_the_batch(tmp_path):
    write_vspw(tmp_path, {'train': {'a': 2, 'b': 3}})
    for path in tmp_path.glob('data/a/origin/*.jpg'):
        path.write_bytes(b'')
    loader = build_train_loader(build_dataset(train_config(tmp_path, skip_bad_clips=True)), 4, workers_per_gpu=1)
    skipped = [message for batch in itertools.islice(loader, 2) for message in batch['skipped']]
    assert skipped and all("video 'a'" in message and 'empty file' in message for message in skipped)
    loader.close()


def test_clips_of_different_sizes_are_refused_with_advice(vspw):
    cfg = train_config(vspw)
    pipeline = cfg['dataset']['pipeline']
    cfg['dataset']['pipeline'] = [step for step in pipeline if step['type'] not in ('RandomCrop', 'Pad')]
    with pytest.raises(DataError, match=r'clips of one size.*Pad'):
        next(build_train_loader(build_dataset(cfg), 4))


def test_training_and_test_sets_are_told_apart(vspw, dataset):
    with pytest.raises(ConfigError, match='training needs a data set with dilation'):
        build_train_loader(build_dataset(config_for_testing(vspw)), 1)
    with pytest.raises(ConfigError, match='testing needs a data set with test_size'):
        build_test_loader(dataset)


@pytest.mark.parametrize('world_size', [1, 2, 5])
def test_ranks_share_whole_videos(vspw, world_size):
    dataset = build_dataset(config_for_testing(vspw, test_size=2))
    found = []
    for rank in range(world_size):
        loader = build_test_loader(dataset, workers_per_gpu=rank % 2, rank=rank, world_size=world_size)
        items = [(item['video'], tuple(item['frames'])) for item in loader]
        assert len(items) == len(loader)
        videos = [video for video, _ in itertools.groupby(items, key=lambda item: item[0])]
        assert len(videos) == len(set(videos))  # a video's clips come one after the other
        found.append(items)
    everything = [item for items in found for item in items]
    frames = [(video, frame) for video, names in everything for frame in names]
    assert len(frames) == len(set(frames)) == 18
    owners = [{video for video, _ in items} for items in found]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 3


def test_items_of_a_test_loader_come_unchanged(vspw):
    item = next(iter(build_test_loader(build_dataset(config_for_testing(vspw)), workers_per_gpu=1)))
    assert isinstance(item['label'], np.ndarray) and isinstance(item['img'], list)


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 9))
def test_shares_are_complete_and_balanced(lengths, world_size):
    shares = share_videos(lengths, world_size)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    for share, load in zip(shares, loads):  # every rank had the fewest frames when it got its shortest video
        assert load - min((lengths[i] for i in share), default=0) <= min(loads)


class OpenCVThreads(torch.utils.data.Dataset):
    is_training = True

    def __len__(self):
        return 4

    def __getitem__(self, index):
        count = torch.full((1, 1, 1), cv2.getNumThreads())
        return dict(img=count, gt_semantic_seg=count, img_metas={}, skipped=[])


def test_workers_run_opencv_in_one_thread_and_the_main_process_keeps_its_threads():
    """Set before the fork: a forked worker that set it for itself would hang now and then."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        loader = build_train_loader(OpenCVThreads(), 1, workers_per_gpu=1)
        assert next(loader)['img'].item() == 1
        assert cv2.getNumThreads() == 2
        loader.close()
    finally:
        cv2.setNumThreads(before)


def _wait_for_signals(ready):
    _init_worker(0)
    ready.set()
    time.sleep(60)


def test_workers_leave_signals_to_the_main_process():
    context = torch.multiprocessing.get_context('fork')
    ready = context.Event()
    process = context.Process(target=_wait_for_signals, args=(ready,))
    process.start()
    assert ready.wait(20)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    process.join(0.5)
    assert process.is_alive()
    process.kill()
    process.join()


_held = []


def _end_while_a_pass_is_held(dataset):
    """As after an error, whose traceback still holds it."""
    _held.append(iter(build_test_loader(dataset, workers_per_gpu=1)))
    next(_held[0])


def test_a_process_ends_though_something_holds_a_pass(vspw):
    process = torch.multiprocessing.get_context('fork').Process(
        target=_end_while_a_pass_is_held, args=(build_dataset(config_for_testing(vspw)),))
    process.start()
    try:
        process.join(20)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_killed_worker_is_named_at_the_next_batch_and_raises_nothing_elsewhere(tmp_path):
    loader = build_train_loader(build_dataset(train_config(write_vspw(tmp_path))), 2, workers_per_gpu=1)
    next(loader)
    (worker,) = loader._items._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    for _ in range(100_000):  # where a handler of SIGCHLD would raise
        pass
    with pytest.raises(DataError, match=rf'loader worker {worker.pid} was ended by SIGKILL \(was there too little'):
        for _ in range(10):  # what it has prepared comes first
            next(loader)
    loader.close()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_wrong_step_is_one_line_also_out_of_a_worker(tmp_path, workers):
    config = train_config(write_vspw(tmp_path))
    pad = next(step for step in config['dataset']['pipeline'] if step['type'] == 'Pad')
    pad['size'] = (8, 8)
    loader = build_train_loader(build_dataset(config), 2, workers_per_gpu=workers)
    with pytest.raises(ConfigError) as caught:
        next(loader)
    assert 'Traceback' not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    loader.close()


def test_no_room_in_shared_memory_is_an_error_and_no_wait(tmp_path, monkeypatch):
    def refuse(tensor):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')

    monkeypatch.setattr(torch.Tensor, 'share_memory_', refuse)  # the worker is forked with it
    loader = build_train_loader(build_dataset(train_config(write_vspw(tmp_path))), 2, workers_per_gpu=1)
    with pytest.raises(DataError, match=r'a worker cannot hand a batch over: .*No space left.*workers_per_gpu=0'):
        next(loader)
    loader.close()
