"""A test as one self-contained HTML page: scores, and players of the worst, median and best videos.

:class:`ReportSink` sees the predictions during a test and keeps small pictures of the few videos that may be shown.
All numbers come from the results of the test.  :func:`write_report` writes both into a page that opens from disk
without a network; :func:`read_report` reads them from it, so that one page can compare two runs.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmseg.apis.sinks import Sink
from mmseg.apis.test import metrics_for
from mmseg.core.evaluation import Results, StreamingMetrics
from mmseg.datasets.pipelines.loading import load_labels
from mmseg.datasets.video_dataset import VideoDataset
from mmseg.utils.errors import DataError
from mmseg.utils.files import write_atomically
from mmseg.utils.images import UNKNOWN, VOID, read_frame, read_mask
from mmseg.utils.names import natural_key, some
from mmseg.utils.visual import overlay
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
_SHEET = 12  # frames on the contact sheet of the data set
_SHEET_WIDTH = 200  # pixels
_SPARE = 6  # videos around the running median that are kept beside those shown


class ReportSink(Sink):
    """Collects the pictures of a page; a sink of :func:`mmseg.apis.test.stream_test`.

    The number of videos whose pictures are kept does not grow.  The worst and the best videos are exact.  The median is
    the closest to it of the videos that were kept; one that came while the median was far off is gone.

    Args:
        dataset: a test set with masks; gives the frames.
        metrics: what counts the frames, with ``per_frame``; a video is finished there before it is here.
        per_group: how many videos are shown of each of :data:`GROUPS`.
        max_frames: of a player; of a longer video its first frames are shown.
        width: of a player's pictures at most, in pixels.
    """

    def __init__(self, dataset: VideoDataset, metrics: StreamingMetrics, per_group: int = 2, max_frames: int = 48,
                 width: int = 320) -> None:
        self._dataset = dataset
        self._metrics = metrics
        self._per_group = per_group
        self._max_frames = max_frames
        self._width = width
        self._names = {video.name: list(video.frames) for video in dataset.videos}
        spread = np.linspace(0, len(self._names), per_group, endpoint=False, dtype=int)
        self._always = {list(self._names)[i] for i in spread}
        spread = np.linspace(0, len(self._names), _SHEET, endpoint=False, dtype=int)
        self._first = {list(self._names)[i]: math.inf for i in spread}
        self._sheet: dict[str, dict[str, str]] = {}
        self._pictures: dict[str, dict[str, str]] = {}  # of the video whose frames are coming
        self._ious: dict[str, float] = {}
        self._players: dict[str, dict[str, Any]] = {}

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Takes a clip whose frames have masks."""
        if item['label'] is None:
            raise DataError(f"video '{item['video']}' has no masks: a report needs them")
        for frame, pred, gt in zip(item['frames'], labels, item['label']):
            self.add(item['video'], frame, self._dataset.frame_path(item['video'], frame), pred, gt)

    def add(self, video: str, frame: str, image: str | np.ndarray, pred: np.ndarray, gt: np.ndarray) -> None:
        """Takes one frame; the frames of a video may come in any order, but not mixed with another video's.

        Args:
            video: its name.
            frame: its name.
            image: file or uint8 [H, W, 3] BGR.
            pred: labels, uint8 [H, W].
            gt: training labels, uint8 [H, W].
        """
        if video in self._first:  # of videos on the sheet, the first frame with labels
            position = self._names[video].index(frame)
            if position < self._first[video] and (gt < UNKNOWN).any():
                self._first[video], self._sheet[video] = position, self._sample(video, frame, image, gt)
        if frame in self._names[video][:self._max_frames]:
            self._pictures[frame] = self._picture(image, pred, gt)

    def _sample(self, video: str, frame: str, image: str | np.ndarray, gt: np.ndarray) -> dict[str, str]:
        """A frame under its labels, for the contact sheet of the data set."""
        pixels = image if isinstance(image, np.ndarray) else read_frame(image)
        shown = overlay(pixels, np.where(gt >= UNKNOWN, np.uint8(VOID), gt), self._dataset.PALETTE)
        height = max(1, round(_SHEET_WIDTH * pixels.shape[0] / pixels.shape[1]))
        small = cv2.resize(shown, (_SHEET_WIDTH, height), interpolation=cv2.INTER_AREA)
        picture = _base64(small, '.jpg', [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        return {'video': video, 'frame': frame, 'image': picture}

    def _picture(self, image: str | np.ndarray, pred: np.ndarray, gt: np.ndarray) -> dict[str, str]:
        """Frame as JPEG, labels as grey PNGs (the page gives them colours), in base64."""
        pixels = image if isinstance(image, np.ndarray) else read_frame(image)
        scale = min(1.0, self._width / max(pixels.shape[:2]))
        size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        labels = {key: cv2.resize(map_, size, interpolation=cv2.INTER_NEAREST) for key, map_ in
                  (('pred', pred), ('gt', np.where(gt >= UNKNOWN, np.uint8(VOID), gt)))}
        return {'image': _base64(small, '.jpg', quality), **{k: _base64(v, '.png') for k, v in labels.items()}}

    def finish_video(self, video: str) -> None:
        """Keeps the pictures of ``video`` if it may be shown."""
        pictures, self._pictures = self._pictures, {}
        if not pictures:
            return
        self._ious[video] = self._metrics.video_scores(video)['mIoU']
        names = self._names[video]
        frames = [name for name in names if name in pictures]
        self._players[video] = {
            'video': video, 'frames': frames, 'pictures': [pictures[name] for name in frames], 'of': len(names)}
        kept = {name for names in self._groups(self._ious, _SPARE).values() for name in names}
        self._players = {name: player for name, player in self._players.items() if name in kept}

    def _groups(self, ious: Mapping[str, float], spare: int = 0) -> dict[str, list[str]]:
        """The videos with pictures that are shown, by group; ``spare`` more around the median."""
        per_group = self._per_group
        ranked = sorted((name for name in ious if not math.isnan(ious[name])), key=lambda n: (ious[n], natural_key(n)))
        middle = (len(ranked) - 1) / 2
        rank = {name: i for i, name in enumerate(ranked) if name in self._players}
        worst, left = list(rank)[:per_group], list(rank)[per_group:]
        best, left = left[::-1][:per_group], left[::-1][per_group:]
        median = sorted(left, key=lambda name: abs(rank[name] - middle))[: per_group + spare]
        always = [name for name in self._players if name in self._always and name not in {*worst, *best, *median}]
        return dict(zip(GROUPS, (worst, median, best, always)))

    def run(self, results: Results, name: str, about: Mapping[str, Any] | None = None,
            gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, Any]:
        """What :func:`write_report` shows of a run.

        Args:
            results: the scores of all frames of all ranks.
            name: of the run.
            about: more that is known, for the head of the page: config, checkpoint, options.
            gather: collects a value from all ranks on every rank; every rank must then call this.
        """
        for players, sheet in gather((self._players, self._sheet)):
            self._players.update(players)
            self._sheet.update(sheet)
        step = -(-sum(map(len, results.frames.values())) // MAX_POINTS)
        shown = results.as_dict()
        ious = {row['video']: row['mIoU'] for row in shown['per_video']}
        notes = {'note': '; '.join(results.notes)} if results.notes else {}
        groups = self._groups({row['video']: row['mIoU'] for row in results.videos})
        return {
            'name': name,
            'about': {key: str(value) for key, value in {**(about or {}), **notes}.items()},
            'results': shown,
            'confusion': results.confusion.tolist(),
            'palette': [list(map(int, colour)) for colour in self._dataset.PALETTE],
            'lines': {video: _line(rows[::step]) for video, rows in results.frames.items() if rows},
            'line_step': step,
            'sheet': [self._sheet[name] for name in self._names if name in self._sheet],
            'players': [{'group': group, 'mIoU': ious[video], **self._players[video]}
                        for group, videos in groups.items() for video in videos],
        }  # fmt: skip


def _line(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The scores of a video's frames; None where a number does not exist."""
    scores = {key: [None if math.isnan(row[score]) else round(row[score], _DIGITS) for row in rows]
              for key, score in (('iou', 'mIoU'), ('consistency', 'consistency'))}
    return {'frames': [row['frame'] for row in rows], **scores}


def _base64(picture: np.ndarray, suffix: str, options: Sequence[int] = ()) -> str:
    return base64.b64encode(cv2.imencode(suffix, picture, list(options))[1].tobytes()).decode()


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
    metrics = metrics_for(dataset, per_frame=True)
    sink = ReportSink(dataset, metrics, **options)
    frames = {video.name: set(video.frames) for video in dataset.videos}
    for video, found in groupby(predictions, key=itemgetter(0)):
        for _, frame, pred in found:
            if frame not in frames.get(video, ()):
                raise DataError(f"split '{dataset.split}' of {dataset.data_root} has no frame {video}/{frame}")
            path = dataset.mask_of(video, frame)
            (gt,), (raw,) = load_labels([path], dataset.labels, pred.shape, video)
            try:
                metrics.update(video, frame, pred, None if path is None else raw)
            except ValueError as error:
                raise DataError(str(error)) from None
            sink.add(video, frame, dataset.frame_path(video, frame), pred, gt)
        metrics.finish(video)
        sink.finish_video(video)
    results = metrics.results()
    if not results.videos:
        raise DataError('there are no predictions')
    results.check_scored()
    counted = {row['video']: row['frames'] for row in results.videos}
    absent = {video: len(names) - counted.get(video, 0) for video, names in frames.items()}
    partly = [f'{video} ({number} of {len(frames[video])} frames)' for video, number in absent.items() if number]
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
    for run in data.get('runs', ()) if isinstance(data, dict) and isinstance(data.get('runs'), list) else ():
        if isinstance(run, dict):
            run.setdefault('sheet', [])  # of a page from before there were any
    fault = next(_faults(data, _PAGE, 'data'), None) or next(_faults_of_sizes(data['runs']), None)
    if fault is not None:
        raise DataError(f"'{path}' is a damaged report: {fault}; make it again")
    return data['runs']


def _no_number(text: str) -> float:
    raise ValueError(f'{text} is no number in JSON')


_NUMBER = int | float | None
_PAGE = {'runs': [{
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
    'sheet': [{'video': str, 'frame': str, 'image': str}],
    'players': [{
        'group': str, 'video': str, 'mIoU': _NUMBER, 'of': int, 'frames': [str],
        'pictures': [{'image': str, 'pred': str, 'gt': str}],
    }],
}]}  # fmt: skip
"""What a page holds: a type, a list ``[of]``, a dict of any keys ``{str: of}``, or of these keys ``{'key': of}``."""


def _faults(value: Any, expected: Any, where: str) -> Iterator[str]:
    """The places in which ``value`` is not as ``expected`` says."""
    kind = type(expected) if isinstance(expected, (list, dict)) else expected
    if not isinstance(value, kind) or isinstance(value, bool):
        yield f"{where} should be {getattr(kind, '__name__', kind)}, and is {type(value).__name__}"
    elif isinstance(expected, list):
        for i, item in enumerate(value):
            yield from _faults(item, expected[0], f'{where}[{i}]')
    elif isinstance(expected, dict):
        for key in value if str in expected else expected:
            if key in value:
                yield from _faults(value[key], expected.get(str) or expected[key], f'{where}.{key}')
            else:
                yield f'{where}.{key} is missing'


def _faults_of_sizes(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lists of the runs whose lengths do not agree."""
    if not runs:
        yield 'it holds no run'
    for run in runs:
        classes = len(run['results']['per_class'])
        if [len(row) for row in run['confusion']] != [classes] * classes:
            yield f'confusion should have {classes} rows and columns, one a class'
        if len(run['palette']) < classes or any(len(colour) != 3 for colour in run['palette']):
            yield f'palette should have three numbers for each of {classes} classes'
        for player in run['players']:
            if len(player['frames']) != len(player['pictures']):
                yield f"the player of '{player['video']}' has {len(player['frames'])} frames with other pictures"
        for video, line in run['lines'].items():
            if not len(line['frames']) == len(line['iou']) == len(line['consistency']):
                yield f"the line of '{video}' has {len(line['frames'])} frames with other values"
