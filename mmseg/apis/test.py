"""Testing: clips in, metrics and files out, with one clip of predictions in memory at a time."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config

from mmseg.config import required
from mmseg.core.evaluation import ConsistencyOptions, Results, StreamingMetrics
from mmseg.core.evaluation.temporal import temporal_measure
from mmseg.datasets.pipelines.loading import read_frame
from mmseg.datasets.pipelines.test_time_aug import flips_of
from mmseg.datasets.video_dataset import VideoDataset
from mmseg.models import build_segmentor
from mmseg.utils.dist import broadcast_object, fail_together, gather_objects, get_dist_info, is_main_process
from mmseg.utils.errors import ConfigError, DataError, nearest
from mmseg.utils.files import write_atomically
from mmseg.utils.logger import get_logger
from mmseg.utils.progress import Progress
from mmseg.utils.signals import Interruption

from .sinks import Sink

_CONFUSION_METRICS = ('mIoU', 'mIoU_vspw', 'fwIoU', 'aAcc', 'mAcc', 'mDice')
Gather = Callable[[Any], list[Any]]


@dataclass
class TestOutcome:
    """What a test gives, the same on every rank.

    Attributes:
        results: metrics; None where the split has no masks or none were asked for.
        skipped: errors of the clips that were left out (``skip_bad_clips``).
        frames: number of frames predicted.
        seconds: of this rank, loading included.
    """

    __test__ = False  # no test case, whatever pytest makes of its name

    results: Results | None
    skipped: list[str]
    frames: int
    seconds: float


def metrics_for(dataset: VideoDataset, names: str | Sequence[str] | None = (), *, last_window: bool = False,
                min_frames: int = 0, remap_void: bool = False, per_frame: bool = False) -> StreamingMetrics:
    """The metrics of a test set.

    Args:
        dataset: a test set with masks.
        names: what was asked for, as ``--eval`` and ``evaluation.metric`` give it.  The scores of the confusion matrix
            always come together; ``VC<n>`` chooses window lengths, 8 and 16 where none is named; ``VEC<n>`` and ``TC``
            are the optional measures of :mod:`mmseg.core.evaluation.temporal`.
        last_window: see :class:`~mmseg.core.evaluation.ConsistencyOptions`.
        min_frames: likewise.
        remap_void: likewise.
        per_frame: give the scores of every frame, too.

    Raises:
        ConfigError: an unknown name, or an option that is out of range.
    """
    names = [names] if isinstance(names, str) else names or ()
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'metric: expected a name or a list of names, got {names!r}')
    lengths, extras = [], []
    for name in names:
        window = re.fullmatch(r'VC(\d{1,9})', name)
        if window and int(window[1]) >= 2:
            lengths.append(int(window[1]))
        elif temporal_measure(name, len(dataset.CLASSES), dataset.ignore_index):
            extras.append(name)
        elif name not in _CONFUSION_METRICS:
            hint = nearest(name, (*_CONFUSION_METRICS, 'VC8', 'VC16', 'VEC8', 'TC'))
            raise ConfigError(f"metric '{name}' is not known{hint}; VC<n> and VEC<n> take any n >= 2")
    try:
        consistency = ConsistencyOptions(
            tuple(dict.fromkeys(lengths)) or (8, 16), last_window=last_window, min_frames=min_frames,
            remap_void=remap_void)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return StreamingMetrics(
        len(dataset.CLASSES), ignore_index=dataset.ignore_index, reduce_zero_label=dataset.reduce_zero_label,
        consistency=consistency, videos={video.name: video.frames for video in dataset.videos},
        class_names=dataset.CLASSES, extras=extras, per_frame=per_frame)


def check_model(cfg: Config) -> None:
    """Builds the model of ``cfg`` without memory or weights: a wrong key is known before any long work.

    Raises:
        ConfigError: see :func:`~mmseg.models.build_segmentor`.
    """
    try:
        with torch.device('meta'):
            build_segmentor(required(cfg, 'model'), cfg.get('train_cfg'), cfg.get('test_cfg'))
    except ConfigError:
        raise
    except Exception as error:  # a part of one's own may compute with its weights; it is built for real later
        get_logger().debug('the model cannot be built without memory: %s', error)


def run_test(model: Any, dataset: VideoDataset, loader: Iterable[dict[str, Any]], **options: Any) -> dict[str, float]:
    """The summary of :func:`stream_test`, as fractions: what evaluation during training needs.

    Clips that were left out are listed in the log.

    Raises:
        DataError: the split has no masks, or nothing was scored; see also :func:`stream_test`.
    """
    if not dataset.has_masks:
        raise DataError(f"split '{dataset.split}' of {dataset.data_root} has no masks to evaluate against")
    outcome = stream_test(model, dataset, loader, **options)
    log_skipped(outcome)
    assert outcome.results is not None
    outcome.results.check_scored()
    for note in outcome.results.notes if is_main_process() else ():
        get_logger().warning(note)
    return outcome.results.summary


def log_skipped(outcome: TestOutcome) -> None:
    """Lists the clips of all ranks that were left out, in the log of rank 0."""
    if outcome.skipped and is_main_process():
        get_logger().warning('%d clips were left out:', len(outcome.skipped))
        for error in outcome.skipped:
            get_logger().warning('  %s', error)


def stream_test(
    model: Any,
    dataset: VideoDataset,
    loader: Iterable[dict[str, Any]],
    *,
    device: torch.device | str | None = None,
    metrics: StreamingMetrics | None = None,
    evaluate: bool = True,
    sinks: Sequence[Sink] = (),
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    gather: Gather = gather_objects,
    progress: bool = True,
    interruption: Interruption | None = None,
    interrupted_together: bool = False,
) -> TestOutcome:
    """Predicts every clip of ``loader``, counts it, hands it to the sinks, and forgets it.

    Called by all ranks, each with a loader over whole videos of its own; the results are those of one rank to the last
    digit.

    Args:
        model: a segmentor with ``predict(views, flips, size)``, wrapped for several processes or not.  Its training
            mode is put back afterwards.
        dataset: the test set.
        loader: test items, video by video (:func:`mmseg.datasets.build_test_loader`).
        device: where the clips go; default that of the model's first parameter.
        metrics: what counts the frames; default :func:`metrics_for`.
        evaluate: whether to count at all; a split without masks is never counted.
        sinks: where predictions go.
        autocast: makes the context of the forward passes (mixed precision).
        gather: collects a value from all ranks on every rank.
        progress: show rate and remaining time on rank 0.
        interruption: ends the test after a clip, or while it waits for one.
        interrupted_together: ranks wait for each other before they leave.

    Raises:
        DataError: a bad file, named, unless the data set has ``skip_bad_clips``.  What the sinks have finished stays.
        OtherRankError: another rank has failed; it raises its own error.  The sinks are closed.
        Interrupted: the interruption has come.  Each rank leaves by itself, unless ``interrupted_together``.
    """
    segmentor = getattr(model, 'module', model)
    device = torch.device(device) if device is not None else next(segmentor.parameters()).device
    if not (evaluate and dataset.has_masks):
        metrics = None
    elif metrics is None:
        metrics = metrics_for(dataset)
    skipped: list[str] = []
    frames = 0
    left = {video.name: len(video.frames) for video in dataset.videos}
    start = time.perf_counter()
    training = segmentor.training
    segmentor.eval()
    try:
        # One context for all clips: autocast keeps the cast weights as long as it lasts.
        with (fail_together(interrupted_together), _closing(sinks), torch.no_grad(), autocast(),
              _progress(loader, progress) as show):
            video = None
            for item in _until(interruption, loader):
                if video is not None and item['video'] != video and left[video]:
                    _finish_video(video, metrics, sinks)
                video = item['video']
                if item['skipped']:
                    skipped += item['skipped']
                    if metrics is not None:
                        for frame in item['frames']:
                            metrics.skip(video, frame)
                else:
                    labels = predict_item(segmentor, item, device)
                    if metrics is not None:
                        _count(metrics, dataset, item, labels)
                    for sink in sinks:
                        sink.write(item, labels)
                    frames += len(labels)
                left[video] -= len(item['frames'])
                if not left[video]:  # now, since the next clip may never come
                    _finish_video(video, metrics, sinks)
                show.advance(len(item['frames']))
            if video is not None and left[video]:
                _finish_video(video, metrics, sinks)
    finally:
        segmentor.train(training)

    seconds = time.perf_counter() - start
    shares = gather({'state': metrics.state() if metrics else {}, 'skipped': skipped, 'frames': frames})
    if metrics is not None:
        rank = get_dist_info()[0]
        for other, share in enumerate(shares):
            if other != rank:
                metrics.merge(share['state'])
    return TestOutcome(
        results=metrics.results() if metrics else None, skipped=[e for share in shares for e in share['skipped']],
        frames=sum(share['frames'] for share in shares), seconds=seconds)


def _until(interruption: Interruption | None, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The ``items``; where a signal has come, or comes while the next one is waited for, ``Interrupted`` is raised."""
    iterator = iter(items)
    while True:
        with interruption.raising() if interruption is not None else contextlib.nullcontext():
            item = next(iterator, None)
        if item is None:
            return
        yield item


def predict_item(segmentor: Any, item: dict[str, Any], device: torch.device) -> np.ndarray:
    """Label maps of one test item, uint8 [T, H0, W0] at the size of the files."""
    views = [view.unsqueeze(0).to(device, non_blocking=True) for view in item['img']]
    metas = item['img_metas']
    return segmentor.predict(views, flips_of(metas), tuple(metas[0]['ori_shape'][:2]))[0].cpu().numpy()


def _count(metrics: StreamingMetrics, dataset: VideoDataset, item: dict[str, Any], labels: np.ndarray) -> None:
    truths = (gt if known else None for gt, known in zip(item['raw_label'], item['labelled']))
    for frame, pred, gt in zip(item['frames'], labels, truths):
        image = read_frame(dataset.frame_path(item['video'], frame)) if metrics.needs_images else None
        try:
            metrics.update(item['video'], frame, pred, gt, image)
        except ValueError as error:
            raise DataError(str(error)) from None


def _finish_video(video: str, metrics: StreamingMetrics | None, sinks: Sequence[Sink]) -> None:
    if metrics is not None:
        metrics.finish(video)
    for sink in sinks:
        sink.finish_video(video)


@contextlib.contextmanager
def _closing(sinks: Sequence[Sink]) -> Any:
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        yield


def _progress(loader: Any, enabled: bool) -> Progress:
    """What shows the progress of rank 0."""
    rank, world_size = get_dist_info()
    share = f'rank 0 of {world_size}: ' if world_size > 1 else ''
    total = len(loader) if hasattr(loader, '__len__') else None
    return Progress(f'{share}clip', total, get_logger().info if enabled and rank == 0 else None)


def gather_by(tmpdir: str | None, gpu_collect: bool, device: torch.device) -> Gather:
    """How ranks exchange results: ``tmpdir`` and ``gpu_collect`` of the command line or of the ``evaluation`` section.

    Raises:
        ConfigError: both are given.
    """
    if tmpdir and gpu_collect:
        raise ConfigError('tmpdir and gpu_collect are two ways to collect results; give one')
    if gpu_collect:
        return gather_on_device(device)
    return gather_in_folder(tmpdir) if tmpdir else gather_objects


def check_classes(model: Any, dataset: Any, where: str) -> None:
    """Model and data set must agree on the number of classes.

    Raises:
        ConfigError: naming both; ``where`` is the key of the data set.
    """
    if model.num_classes != len(dataset.CLASSES):
        raise ConfigError(
            f'model.decode_head.num_classes is {model.num_classes}, but the data set of {where} has '
            f'{len(dataset.CLASSES)} classes')


def gather_in_folder(folder: str | None) -> Gather:
    """``--tmpdir``: ranks leave their part as a JSON file in a folder that all of them can see.

    Args:
        folder: an existing or new folder, in which a folder is made and removed again.  None makes one among the
            system's temporary ones, for ranks of one machine.
    """

    def gather(value: Any) -> list[Any]:
        rank, world_size = get_dist_info()
        made = None
        with fail_together():
            if rank == 0:
                Path(folder or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix='themask_test_', dir=folder)
        shared = Path(broadcast_object(made))
        with fail_together():
            write_atomically(shared / f'rank{rank}.json', json.dumps(value))
        with fail_together():
            parts = [json.loads((shared / f'rank{other}.json').read_bytes()) for other in range(world_size)]
        if rank == 0:
            shutil.rmtree(shared, ignore_errors=True)
        return parts

    return gather


def gather_on_device(device: torch.device) -> Gather:
    """``--gpu-collect``: ranks send their part through the collective backend of their device (nccl on GPUs)."""

    def gather(value: Any) -> list[Any]:
        world_size = get_dist_info()[1]
        if world_size == 1:
            return [value]
        data = torch.tensor(bytearray(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
        dist.all_gather(lengths, torch.tensor([len(data)], device=device))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[:len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[:int(n)].cpu().numpy())) for part, n in zip(parts, lengths)]

    return gather
