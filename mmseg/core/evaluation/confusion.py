"""One joint histogram of labels and predictions, and the scores that follow from it.

The scores are those of mmsegmentation 0.x (``mIoU``, ``mAcc``, ``aAcc``, ``mDice``: means over classes with a non-empty
union) and of the official VSPW evaluation (``mIoU_vspw``: mean over classes present in the ground truth).
"""

from __future__ import annotations

import cv2
import numpy as np

LABELS = 256  # of a uint8 label map
_EXACT = 1 << 24  # float32 counts integers exactly up to here


def joint_histogram(gt: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Counts of every (ground truth, prediction) pair of labels; exact for any size.

    Args:
        gt: uint8 [H, W].
        pred: uint8 [H, W].

    Returns:
        int64 [256, 256]; entry [g, p] is the number of pixels with label g and prediction p.
    """
    rows = max(1, _EXACT // max(1, gt.shape[1]))
    counts = np.zeros((LABELS, LABELS), np.int64)
    for top in range(0, gt.shape[0], rows):
        part = [gt[top:top + rows], pred[top:top + rows]]
        hist = cv2.calcHist(part, [0, 1], None, [LABELS, LABELS], [0, LABELS, 0, LABELS])
        np.add(counts, hist, out=counts, casting='unsafe')
    return counts


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of each class.

    Args:
        confusion: int64 [K, K], rows = ground truth; pixels without a label are left out.

    Returns:
        float64 [K] each: ``IoU``, ``Acc``, ``Dice`` (nan where the denominator is empty), and int64 ``pixels`` (of the
        ground truth).
    """
    hit = np.diag(confusion)
    gt, pred = confusion.sum(1), confusion.sum(0)
    with np.errstate(divide='ignore', invalid='ignore'):
        return {'IoU': hit / (gt + pred - hit), 'Acc': hit / gt, 'Dice': 2 * hit / (gt + pred), 'pixels': gt}


def mean_scores(confusion: np.ndarray) -> dict[str, float]:
    """Scores of a whole confusion matrix, as fractions; nan where nothing was counted.

    ``mIoU``, ``mAcc`` and ``mDice`` average over the classes for which the score is defined (mmseg), ``mIoU_vspw`` over
    the classes present in the ground truth (VSPW), ``fwIoU`` weights IoU by the frequency in the ground truth, and
    ``aAcc`` is the share of correct pixels.
    """
    scores = class_scores(confusion)
    pixels = scores['pixels']
    total = int(pixels.sum())
    present = pixels > 0
    return {
        'mIoU': _mean(scores['IoU']),
        'mIoU_vspw': _mean(scores['IoU'][present]),
        'fwIoU': float((scores['IoU'][present] * (pixels[present] / total)).sum()) if total else float('nan'),
        'aAcc': float(np.diag(confusion).sum() / total) if total else float('nan'),
        'mAcc': _mean(scores['Acc']),
        'mDice': _mean(scores['Dice']),
    }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float('nan')
