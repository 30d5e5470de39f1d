"""Speed of the metrics beside the forms that other projects use, as ratios measured in one run.

    python -m benchmarks.metrics [--frames 40] [--rounds 5] [--json FILE]

* VC8 + VC16: the window form of the official VSPW script (for every window, compare its frames with the first), and a
  vectorised window form, beside both forms of :class:`WindowCounts`, which go over each frame once.
* Confusion matrix of a frame: the three histograms of mmsegmentation 0.x and the bincount of VSPW's evaluator, beside
  :func:`joint_histogram`.

All forms of a measure must give the same integers, or the benchmark fails.  Frames are 480 x 853 with 124 classes:
moving regions with noisy patches; every form gets one thread.  The forms take turns, and the fastest round of each
counts.  ``--json`` writes a list of rows {measure, form, ms (of a frame), ratio_to: {usual form: ratio}}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/metrics.py`

import cv2
import numpy as np

from mmseg.core.evaluation.confusion import joint_histogram
from mmseg.core.evaluation.video_consistency import WindowCounts
from mmseg.kernels.library import BuildError, native

CLASSES = 124
LENGTHS = (8, 16)
Windows = dict[int, list[tuple[int, int]]]
Form = Callable[[np.ndarray, np.ndarray], Any]


def video(frames: int, height: int = 480, width: int = 853) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and prediction, uint8 [frames, height, width]."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, CLASSES, (height // 40 + 1, width // 40 + 2 + frames // 40), dtype=np.uint8)
    stuff = np.kron(tiles, np.ones((40, 40), np.uint8))
    gt = np.stack([stuff[:height, t:t + width] for t in range(frames)])
    gt[:, :4] = 255
    pred = np.where(gt == 255, 3, gt)
    for t in range(frames):
        y, x = rng.integers(0, height - 60), rng.integers(0, width - 60)
        pred[t, y:y + 60, x:x + 60] = rng.integers(0, CLASSES, (60, 60))
    return gt, pred


def windows_official(gt: np.ndarray, pred: np.ndarray) -> Windows:
    """The loops of VSPW's ``VC_perclip.py``."""
    counts: Windows = {n: [] for n in LENGTHS}
    for n in LENGTHS:
        for i in range(len(gt) - n):
            constant, same = np.ones(gt.shape[1:]), np.ones(gt.shape[1:])
            for j in range(1, n):
                constant = np.logical_and(constant, gt[i] == gt[i + j])
                same = np.logical_and(same, pred[i] == pred[i + j])
            counts[n].append((int((same * constant).sum()), int(constant.sum())))
    return counts


def windows_vectorised(gt: np.ndarray, pred: np.ndarray) -> Windows:
    """The same windows with one comparison a window."""
    counts: Windows = {n: [] for n in LENGTHS}
    for n in LENGTHS:
        for i in range(len(gt) - n):
            constant = (gt[i:i + n] == gt[i]).all(0)
            same = (pred[i:i + n] == pred[i]).all(0)
            counts[n].append((int(np.count_nonzero(same & constant)), int(np.count_nonzero(constant))))
    return counts


def windows_numpy(gt: np.ndarray, pred: np.ndarray) -> Windows:
    """Ours, without a compiler."""
    return _streamed(gt, pred, native=False)


def windows_native(gt: np.ndarray, pred: np.ndarray) -> Windows:
    """Ours, compiled."""
    return _streamed(gt, pred, native=True)


def _streamed(gt: np.ndarray, pred: np.ndarray, native: bool) -> Windows:
    counts: Windows = {n: [] for n in LENGTHS}
    stream = WindowCounts(LENGTHS, native=native)
    for t in range(len(gt)):
        for n, both, constant in stream.push(gt[t], pred[t]):
            counts[n].append((both, constant))
    return counts


def areas_histograms(gt: np.ndarray, pred: np.ndarray) -> list[np.ndarray]:
    """Intersection, prediction and label areas as in mmsegmentation 0.x ``intersect_and_union``."""
    mask = gt != 255
    pred, gt = pred[mask], gt[mask]
    bins = np.arange(CLASSES + 1)
    return [np.histogram(x, bins=bins)[0] for x in (pred[pred == gt], pred, gt)]


def areas_bincount(gt: np.ndarray, pred: np.ndarray) -> list[np.ndarray]:
    """The confusion matrix of VSPW's ``Evaluator``, reduced to the three areas."""
    mask = gt < CLASSES
    index = CLASSES * gt[mask].astype(int) + pred[mask]
    confusion = np.bincount(index, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    return [np.diag(confusion), confusion.sum(0), confusion.sum(1)]


def areas_joint(gt: np.ndarray, pred: np.ndarray) -> list[np.ndarray]:
    """Ours, reduced to the three areas."""
    confusion = joint_histogram(gt, pred)[:CLASSES, :CLASSES]
    return [np.diag(confusion), confusion.sum(0), confusion.sum(1)]


def compare(
    measure: str, usual: Sequence[Form], ours: Sequence[Form], gt: np.ndarray, pred: np.ndarray, rounds: int
) -> list[dict[str, Any]]:
    """Times the forms of a measure in turns, checks that they agree, and gives a row for each."""
    best = {form.__name__: float('inf') for form in (*usual, *ours)}
    frames = len(gt) if gt.ndim == 3 else 1
    for _ in range(rounds):
        results = []
        for form in (*usual, *ours):
            start = time.perf_counter()
            results.append(form(gt, pred))
            best[form.__name__] = min(best[form.__name__], time.perf_counter() - start)
        for result in results[1:]:
            np.testing.assert_equal(result, results[0])
    return [
        {
            'measure': measure,
            'form': name,
            'ms': 1000 * seconds / frames,
            'ratio_to': {form.__name__: best[form.__name__] / seconds for form in usual},
        }
        for name, seconds in best.items()
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=40, help='frames of the video')
    parser.add_argument('--rounds', type=int, default=5, help='the fastest of so many rounds counts')
    parser.add_argument('--json', help='write the rows to this file')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    gt, pred = video(args.frames)
    library = native('cpu')
    if isinstance(library, BuildError):
        print(f'the native form is left out: {library}')

    ours = [windows_numpy] if isinstance(library, BuildError) else [windows_numpy, windows_native]
    rows = compare('VC8 + VC16', [windows_official, windows_vectorised], ours, gt, pred, args.rounds)
    rows += compare('confusion', [areas_histograms, areas_bincount], [areas_joint], gt[0], pred[0], args.rounds)
    print(f'{gt.shape[2]}x{gt.shape[1]}, one thread, equal results; the fastest of {args.rounds} rounds, in turns')
    for row in rows:
        ratios = ', '.join(f'{ratio:.1f}x {form}' for form, ratio in row['ratio_to'].items() if form != row['form'])
        print(f'{row["measure"]:<11} {row["form"]:<19} {row["ms"]:7.3f} ms a frame   {ratios}')
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(rows, file, indent=1)


if __name__ == '__main__':
    main()
