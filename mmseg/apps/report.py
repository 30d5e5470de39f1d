"""A test as one self-contained HTML page: scores, and players of the worst, median and best videos.

:class:`ReportSink` looks at the predictions while they stream by and keeps little of them: two numbers a frame, and
small pictures of the few videos that may be shown.  :func:`write_report` puts them and the scores into a page that
opens from disk without a network; :func:`read_report` gets them out again, so that one page can compare two runs.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmseg.apis.test import metrics_for
from mmseg.core.evaluation import Results, joint_histogram, mean_scores
from mmseg.datasets.pipelines.loading import VOID, load_labels, read_frame, read_mask
from mmseg.datasets.video_dataset import VideoDataset
from mmseg.utils.errors import DataError
from mmseg.utils.files import write_atomically
from mmseg.utils.names import natural_key, some
from mmseg.version import __version__

GROUPS = ('worst', 'median', 'best', 'always')
"""Which videos have a player; ``always``: the same videos in every run on a data set, so that runs can be compared."""

MAX_POINTS = 100_000
"""Frames whose two numbers a page holds; of longer tests every second, third, ... frame is kept."""

_NAME = 'index.html'
_LEFT_OUT = 'left out'
_DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)
_PLACE = '"DATA"'
_JPEG_QUALITY = 80
_DIGITS = 4
_SPARE = 6  # videos around the running median that are kept beside those shown


class ReportSink:
    """Collects what a page shows beside the scores; a sink of :func:`mmseg.apis.test.stream_test`.

    What is kept does not grow with the number of videos, but for two numbers a frame.  The worst and the best videos
    are exact.  The median is the closest to it of the videos that were kept; one that came while the median was far off
    is gone.

    Args:
        dataset: a test set with masks; gives the frames.
        per_group: how many videos are shown of each of :data:`GROUPS`.
        max_frames: of a player; of a longer video its first frames are shown.
        width: of a player's pictures at most, in pixels.
    """

    def __init__(self, dataset: VideoDataset, per_group: int = 2, max_frames: int = 48, width: int = 320) -> None:
        self._dataset = dataset
        self._per_group = per_group
        self._max_frames = max_frames
        self._width = width
        self._order = {video.name: {frame: i for i, frame in enumerate(video.frames)} for video in dataset.videos}
        spread = np.linspace(0, len(self._order), per_group, endpoint=False, dtype=int)
        self._always = {list(self._order)[i] for i in spread}
        self._video: _OpenVideo | None = None
        self._lines: dict[str, dict[str, Any]] = {}
        self._ious: dict[str, float] = {}
        self._players: dict[str, dict[str, Any]] = {}

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Takes a clip: the test item (see :class:`~mmseg.datasets.VideoDataset`), and uint8 [T, H, W]."""
        if item['label'] is None:
            raise DataError(f"video '{item['video']}' has no masks: a report needs them")
        for frame, label, gt, raw in zip(item['frames'], labels, item['label'], item['raw_label']):
            self.add(item['video'], frame, self._dataset.frame_path(item['video'], frame), label, gt, raw)

    def add(
        self, video: str, frame: str, image: str | np.ndarray, pred: np.ndarray, gt: np.ndarray,
        raw: np.ndarray | None = None,
    ) -> None:
        """Takes one frame; the frames of a video may come in any order, but not mixed with another video's.

        Args:
            video: its name.
            frame: its name.
            image: file or uint8 [H, W, 3] BGR.
            pred: labels, uint8 [H, W].
            gt: training labels, uint8 [H, W].
            raw: ground truth as it stands in the file, which VC compares; ``gt`` where there is none.
        """
        if self._video is None:
            self._video = _OpenVideo(video, self._order[video], len(self._dataset.CLASSES), self._dataset.ignore_index)
        position = self._order[video][frame]
        self._video.count(position, pred, gt, gt if raw is None else raw)
        if position < self._max_frames:
            self._video.pictures[position] = self._picture(image, pred, gt)

    def _picture(self, image: str | np.ndarray, pred: np.ndarray, gt: np.ndarray) -> dict[str, str]:
        """Frame as JPEG, labels as grey PNGs (the page gives them colours), in base64."""
        pixels = image if isinstance(image, np.ndarray) else read_frame(image)
        scale = min(1.0, self._width / max(pixels.shape[:2]))
        size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        labels = {key: cv2.resize(map_, size, interpolation=cv2.INTER_NEAREST) for key, map_ in
                  (('pred', pred), ('gt', np.where(gt == self._dataset.ignore_index, VOID, gt).astype(np.uint8)))}
        return {'image': _base64(small, '.jpg', quality), **{k: _base64(v, '.png') for k, v in labels.items()}}

    def finish_video(self, video: str) -> None:
        """No further frame of ``video`` will come; its pictures stay if it may be shown."""
        done, self._video = self._video, None
        if done is None:
            return
        self._lines[video] = done.lines()
        self._ious[video] = done.iou
        names = list(self._order[video])
        shown = sorted(done.pictures)
        self._players[video] = {
            'video': video, 'frames': [names[i] for i in shown], 'pictures': [done.pictures[i] for i in shown],
            'of': len(names),
        }  # fmt: skip
        kept = {name for names in self._groups(_SPARE).values() for name in names}
        self._players = {name: player for name, player in self._players.items() if name in kept}

    def _groups(self, spare: int = 0) -> dict[str, list[str]]:
        """The videos with pictures that are shown, by group; ``spare`` more around the median."""
        ious, per_group = self._ious, self._per_group
        ranked = sorted((name for name in ious if not math.isnan(ious[name])), key=lambda n: (ious[n], natural_key(n)))
        middle = (len(ranked) - 1) / 2
        rank = {name: i for i, name in enumerate(ranked) if name in self._players}
        worst, left = list(rank)[:per_group], list(rank)[per_group:]
        best, left = left[::-1][:per_group], left[::-1][per_group:]
        median = sorted(left, key=lambda name: abs(rank[name] - middle))[: per_group + spare]
        always = [name for name in self._players if name in self._always and name not in {*worst, *best, *median}]
        return dict(zip(GROUPS, (worst, median, best, always)))

    def close(self) -> None:
        """Nothing is left to do."""

    def state(self) -> dict[str, Any]:
        """All that was collected, as JSON, for :meth:`merge` on another rank."""
        return {'lines': self._lines, 'ious': self._ious, 'players': self._players}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds what another rank has collected about other videos."""
        self._lines.update(state['lines'])
        self._ious.update(state['ious'])
        self._players.update(state['players'])

    def run(self, results: Results, name: str, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What :func:`write_report` shows of a run.

        Args:
            results: the scores of all frames.
            name: of the run.
            about: more that is known, for the head of the page: config, checkpoint, options.
        """
        total = sum(len(line['frames']) for line in self._lines.values())
        step = -(-total // MAX_POINTS)
        groups = self._groups()
        rows = {row['video']: row for row in results.as_dict()['per_video']}
        return {
            'name': name,
            'about': {key: str(value) for key, value in (about or {}).items()},
            'results': results.as_dict(),
            'confusion': results.confusion.tolist(),
            'palette': [list(map(int, colour)) for colour in self._dataset.PALETTE],
            'lines': {video: {key: values[::step] for key, values in self._lines[video].items()}
                      for video in sorted(self._lines, key=natural_key)},
            'line_step': step,
            'players': [{'group': group, 'mIoU': rows[video]['mIoU'], **self._players[video]}
                        for group, videos in groups.items() for video in videos],
        }  # fmt: skip

    def gathered(
        self, gather: Callable[[Any], list[Any]], results: Results, name: str, about: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """:meth:`run` of all ranks, the same on each; every rank must call it.

        Args:
            gather: collects a value from all ranks on every rank.
            results: likewise of all ranks.
            name: of the run.
            about: see :meth:`run`.
        """
        for state in gather(self.state()):
            self.merge(state)
        return self.run(results, name, about)


def run_of_predictions(
    dataset: VideoDataset, predictions: Iterator[tuple[str, str, np.ndarray]], name: str, **options: Any
) -> dict[str, Any]:
    """Scores label maps that were written before, and collects what a page shows of them.

    Args:
        dataset: a test set with masks.
        predictions: video, frame, labels uint8 [H, W]; the frames of a video one after the other.
        name: of the run.
        options: of :class:`ReportSink`.

    Returns:
        See :meth:`ReportSink.run`.  Videos and frames without a prediction are named under ``about``, ``left out``.

    Raises:
        DataError: frames that the data set does not have, labels out of range, or nothing to score.
    """
    metrics, sink = metrics_for(dataset), ReportSink(dataset, **options)
    missing = {video.name: dict.fromkeys(video.frames) for video in dataset.videos}
    frames = {video: set(names) for video, names in missing.items()}

    def finish(video: str) -> None:
        for frame in missing[video]:
            metrics.skip(video, frame)
        metrics.finish(video)
        sink.finish_video(video)

    before: str | None = None
    for video, frame, pred in predictions:
        if frame not in frames.get(video, ()):
            raise DataError(f"split '{dataset.split}' of {dataset.data_root} has no frame {video}/{frame}")
        if before is not None and video != before:
            finish(before)
        before = video
        path = dataset.mask_path(video, frame)
        (raw,) = load_labels([path], False, None, pred.shape, video)
        (gt,) = load_labels([path], dataset.reduce_zero_label, dataset.num_classes, pred.shape, video)
        try:
            metrics.update(video, frame, pred, raw)
        except ValueError as error:
            raise DataError(str(error)) from None
        sink.add(video, frame, dataset.frame_path(video, frame), pred, gt, raw)
        del missing[video][frame]
    if before is None:
        raise DataError('there are no predictions')
    finish(before)
    results = metrics.results()
    results.check_scored()
    partly = [f'{video} ({len(absent)} of {len(frames[video])} frames)' for video, absent in missing.items() if absent]
    return sink.run(results, name, {_LEFT_OUT: f'{len(partly)} videos: {some(partly)}'} if partly else None)


def left_out(run: Mapping[str, Any]) -> str:
    """What a run has not scored of its data set; empty where it has scored all of it."""
    return run['about'].get(_LEFT_OUT, '')


def read_predictions(folder: str | Path, dataset: VideoDataset) -> Iterator[tuple[str, str, np.ndarray]]:
    """Palette or grey PNGs ``<folder>/<video>/<frame>.png`` of the videos that the folder has.

    Yields:
        video, frame, labels uint8 [H, W].

    Raises:
        DataError: a frame of one of these videos is missing or cannot be read.
    """
    for video in dataset.videos:
        if (Path(folder) / video.name).is_dir():
            for frame in video.frames:
                yield video.name, frame, read_mask(str(Path(folder) / video.name / f'{frame}.png'))


class _OpenVideo:
    """Counts of the video whose frames are coming.

    A frame waits for its neighbour in time, because consistency compares the two; test clips are three frames apart, so
    few wait.
    """

    def __init__(self, name: str, order: Mapping[str, int], num_classes: int, ignore_index: int) -> None:
        self._names = list(order)
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._total = np.zeros((num_classes, num_classes), np.int64)
        self._frame_iou: dict[int, float] = {}
        self._consistency: dict[int, float] = {}  # of a frame with the one before
        self._waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.pictures: dict[int, dict[str, str]] = {}

    def count(self, position: int, pred: np.ndarray, gt: np.ndarray, raw: np.ndarray) -> None:
        """Takes the labels of the frame at ``position``."""
        counts = joint_histogram(np.ascontiguousarray(gt), np.ascontiguousarray(pred))
        counts[self._ignore_index] = 0
        counts = counts[: self._num_classes, : self._num_classes]
        self._total += counts
        self._frame_iou[position] = mean_scores(counts)['mIoU']
        for neighbour in (position - 1, position + 1):
            if neighbour in self._waiting:
                other_raw, other_pred = self._waiting[neighbour]
                still = raw == other_raw
                both = np.count_nonzero(still & (pred == other_pred))
                count = np.count_nonzero(still)
                self._consistency[max(position, neighbour)] = both / count if count else math.nan
        self._waiting[position] = raw, pred
        for seen in (position - 1, position, position + 1):
            around = [i for i in (seen - 1, seen + 1) if 0 <= i < len(self._names)]
            if seen in self._waiting and all(i in self._frame_iou for i in around):
                del self._waiting[seen]

    @property
    def iou(self) -> float:
        """The mIoU of the video."""
        return mean_scores(self._total)['mIoU']

    def lines(self) -> dict[str, Any]:
        """Names, IoU and consistency of the frames, in order; None where a number does not exist."""
        positions = sorted(self._frame_iou)
        return {
            'frames': [self._names[i] for i in positions],
            'iou': [_rounded(self._frame_iou[i]) for i in positions],
            'consistency': [_rounded(self._consistency.get(i, math.nan)) for i in positions],
        }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, _DIGITS)


def _base64(picture: np.ndarray, suffix: str, options: Sequence[int] = ()) -> str:
    return base64.b64encode(cv2.imencode(suffix, picture, list(options))[1].tobytes()).decode()


def write_report(runs: Sequence[Mapping[str, Any]], folder: str | Path, max_mib: float = 16) -> Path:
    """Writes ``folder/index.html``.

    Args:
        runs: one of :meth:`ReportSink.run`, or two with the same classes to compare.
        folder: made if needed.
        max_mib: size of the page; players lose their last frames to stay below it.

    Returns:
        The page.

    Raises:
        DataError: the runs have other classes.
    """
    if not 1 <= len(runs) <= 2:
        raise ValueError(f'a report shows one or two runs, got {len(runs)}')
    first, last = runs[0], runs[-1]
    classes = [[row['class'] for row in run['results']['per_class']] for run in (first, last)]
    if classes[0] != classes[1]:
        raise DataError(f"runs '{first['name']}' and '{last['name']}' have other classes and cannot be compared")
    template = resources.files('mmseg.apps').joinpath('report.html').read_text(encoding='utf-8')
    budget = max_mib * 2**20 - len(template.encode())
    data = _fitted(runs, int(budget))
    path = Path(folder) / _NAME
    write_atomically(path, template.replace(_PLACE, data))
    return path


def _fitted(runs: Sequence[Mapping[str, Any]], budget: int) -> str:
    """The runs as JSON that can stand in HTML, with as many frames in the players as the budget allows."""
    def encode(frames: int | None) -> str:
        shown = [
            {**run, 'players': [{**p, 'frames': p['frames'][:frames], 'pictures': p['pictures'][:frames]}
                                for p in run['players']]} for run in runs]  # fmt: skip
        return json.dumps({'version': __version__, 'runs': shown}, separators=(',', ':')).replace('<', '\\u003c')

    frames = max((len(player['frames']) for run in runs for player in run['players']), default=0)
    data = encode(frames)
    while len(data) > budget and frames:
        frames = max(0, min(frames - 1, int(frames * budget / len(data))))
        data = encode(frames)
    return data


def report_page(path: str | Path) -> Path:
    """The page that ``path`` names: of a folder, its ``index.html``."""
    path = Path(path)
    return path if path.suffix == '.html' and not path.is_dir() else path / _NAME


def read_report(path: str | Path) -> list[dict[str, Any]]:
    """The runs of a page.

    Args:
        path: of :func:`write_report`, or its folder.

    Raises:
        DataError: it is none, or it is damaged.
    """
    path = report_page(path)
    try:
        found = _DATA.search(path.read_text(encoding='utf-8'))
        data = json.loads(found[1], parse_constant=_no_number) if found else None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is no report: {error}") from error
    if data is None:
        raise DataError(f"'{path}' is no report: it holds no data")
    fault = _fault(data, _PAGE, 'data') or next(filter(None, map(_fault_of_sizes, data['runs'])), None)
    if fault or not data['runs']:
        raise DataError(f"'{path}' is a damaged report: {fault or 'it holds no run'}; make it again")
    return data['runs']


def _no_number(text: str) -> float:
    raise ValueError(f'{text} is no number in JSON')


_NUMBER = (int, float, type(None))
_RUN = {
    'name': str,
    'about': {str: str},
    'results': {
        'per_class': [{'class': str, 'pixels': int, 'IoU': _NUMBER}],
        'per_video': [{'video': str, 'frames': int, 'mIoU': _NUMBER}],
    },
    'confusion': [[int]],
    'palette': [[int]],
    'lines': {str: {'frames': [str], 'iou': [_NUMBER], 'consistency': [_NUMBER]}},
    'line_step': int,
    'players': [{
        'group': str, 'video': str, 'mIoU': _NUMBER, 'of': int, 'frames': [str],
        'pictures': [{'image': str, 'pred': str, 'gt': str}],
    }],
}  # fmt: skip
_PAGE = {'runs': [_RUN]}
"""What a page holds: a type, or several; ``[of]`` is a list, ``{str: of}`` any keys, and ``{'key': of}`` these keys."""


def _fault(value: Any, expected: Any, where: str) -> str | None:
    """The first place in which ``value`` is not as ``expected`` says; None where there is none."""
    kind_or_kinds = expected if isinstance(expected, (type, tuple)) else type(expected)
    kinds = kind_or_kinds if isinstance(kind_or_kinds, tuple) else (kind_or_kinds,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return f"{where} should be {' or '.join(kind.__name__ for kind in kinds)}, and is {type(value).__name__}"
    inside: Iterable[tuple[Any, Any, str]] = ()
    if isinstance(expected, list):
        inside = ((item, expected[0], f'{where}[{i}]') for i, item in enumerate(value))
    elif isinstance(expected, dict) and str in expected:
        inside = ((item, expected[str], f'{where}.{key}') for key, item in value.items())
    elif isinstance(expected, dict):
        absent = [key for key in expected if key not in value]
        if absent:
            return f'{where}.{absent[0]} is missing'
        inside = ((value[key], kind, f'{where}.{key}') for key, kind in expected.items())
    return next(filter(None, (_fault(*part) for part in inside)), None)


def _fault_of_sizes(run: Mapping[str, Any]) -> str | None:
    """Lists of a run whose lengths do not go together."""
    classes = len(run['results']['per_class'])
    if [len(row) for row in run['confusion']] != [classes] * classes:
        return f'confusion should have {classes} rows and columns, one a class'
    if len(run['palette']) < classes or any(len(colour) != 3 for colour in run['palette']):
        return f'palette should have three numbers for each of {classes} classes'
    for player in run['players']:
        if len(player['frames']) != len(player['pictures']):
            return f"the player of '{player['video']}' has {len(player['frames'])} frames with other pictures"
    for video, line in run['lines'].items():
        if not len(line['frames']) == len(line['iou']) == len(line['consistency']):
            return f"the line of '{video}' has {len(line['frames'])} frames with other values"
    return None
