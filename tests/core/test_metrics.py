"""Streaming metrics against the recorded reference, and the exactness of the confusion matrix."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.core.evaluation import ConsistencyOptions, StreamingMetrics, class_scores, joint_histogram, mean_scores

CASES = [(10, 6, True), (10, 6, False), (124, 4, True)]


def recorded_case(case):
    """Labels and predictions of ``metrics.json``'s ``case<n>`` (recipe in tests/reference/README.md)."""
    classes, n, reduce = CASES[case]
    rng = np.random.default_rng(800 + case)
    gts = [rng.integers(0, classes + 1 if reduce else classes, (40, 60)) for _ in range(n)]
    for gt in gts:
        gt[rng.random(gt.shape) < 0.1] = 255
    preds = []
    for gt in gts:
        pred = np.clip(np.where(gt == 255, 0, gt) - (1 if reduce else 0), 0, classes - 1)
        noise = rng.random(gt.shape) < 0.4
        pred[noise] = rng.integers(0, classes, noise.sum())
        preds.append(pred)
    return classes, reduce, gts, preds


@pytest.mark.parametrize('case', range(3))
def test_recorded_scores(reference, case):
    classes, reduce, gts, preds = recorded_case(case)
    metrics = StreamingMetrics(classes, reduce_zero_label=reduce, consistency=None)
    for i, (gt, pred) in enumerate(zip(gts, preds)):
        metrics.update('video', i, pred, gt)
    results = metrics.results()
    for kind in ('IoU', 'Dice'):
        want = reference('metrics.json')[f'case{case}_m{kind}']
        assert results.summary['aAcc'] == pytest.approx(want['aAcc'], abs=1e-12)
        assert results.summary['mAcc'] == pytest.approx(want['mAcc'], abs=1e-12)
        assert results.summary[f'm{kind}'] == pytest.approx(want['mean'], abs=1e-12)
        assert [row['Acc'] for row in results.classes] == pytest.approx(want['acc'], abs=1e-12)
        assert [row[kind] for row in results.classes] == pytest.approx(want['per_class'], abs=1e-12)
        printed = want['printed'].split()
        assert results.summary['mIoU_vspw'] == pytest.approx(float(printed[printed.index('mIoU') + 2]), abs=1e-12)
        assert results.summary['fwIoU'] == pytest.approx(float(printed[printed.index('FWIoU') + 2]), abs=1e-12)


@pytest.mark.parametrize('name', ['{}', 'frame_{}', 'cam1_{}_left'])
def test_frames_without_given_order_are_taken_in_natural_order(name):
    by_position, by_name = StreamingMetrics(2), StreamingMetrics(2)
    gt = np.zeros((4, 5), np.uint8)
    for i in np.random.default_rng(0).permutation(20).tolist():
        pred = (np.arange(20) < i).astype(np.uint8).reshape(4, 5)  # one more pixel is wrong in every frame
        by_position.update('v', i, pred, gt)
        by_name.update('v', name.format(i), pred, gt)
    assert by_name.compute() == by_position.compute()
    assert by_name.compute()['VC8'] == pytest.approx(13 / 20)


def test_videos_are_listed_in_natural_order():
    metrics = StreamingMetrics(2)
    for video in ('v10', 'v9', 'city/v1'):
        metrics.update(video, 0, np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    assert [row['video'] for row in metrics.results().videos] == ['city/v1', 'v9', 'v10']


def test_two_means_differ_where_a_class_is_only_predicted():
    gt = np.array([[0, 0, 255]], np.uint8)
    pred = np.array([[0, 1, 2]], np.uint8)  # class 1 is not in the ground truth; class 2 stands on void and is free
    metrics = StreamingMetrics(4)
    metrics.update('v', 0, pred, gt)
    assert metrics.compute()['mIoU'] == pytest.approx(0.25)
    assert metrics.compute()['mIoU_vspw'] == pytest.approx(0.5)
    assert math.isnan(metrics.results().classes[2]['IoU'])


def test_nothing_counted_is_nan():
    metrics = StreamingMetrics(3)
    metrics.update('v', 0, np.zeros((4, 5), np.uint8), np.full((4, 5), 255, np.uint8))
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert json.loads(json.dumps(metrics.results().as_dict(), allow_nan=False))['mIoU'] is None


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_joint_histogram_counts_every_pixel(seed, height, width):
    rng = np.random.default_rng(seed)
    gt, pred = rng.integers(0, 256, (2, height, width), dtype=np.uint8)
    want = np.zeros((256, 256), np.int64)
    np.add.at(want, (gt, pred), 1)
    assert (joint_histogram(gt, pred) == want).all()


def test_joint_histogram_is_exact_beyond_float32():
    gt = np.zeros((4097, 4099), np.uint8)  # an odd number of pixels in one bin, beyond 2**24
    assert joint_histogram(gt, gt)[0, 0] == 4097 * 4099


@pytest.mark.parametrize('bad, message', [
    (dict(gt=200), r'v/00000007.*ground truth holds label 200'),
    (dict(pred=3), r'v/00000007.*prediction holds label 3'),
    (dict(shape=(4, 6)), r'v/00000007.*4x6|6x4'),
])
def test_bad_labels_name_the_frame(bad, message):
    gt, pred = np.zeros((4, 5), int), np.zeros(bad.get('shape', (4, 5)), int)
    gt[0, 0], pred[0, 1] = bad.get('gt', 0), bad.get('pred', 0)
    with pytest.raises(ValueError, match=message):
        StreamingMetrics(3).update('v', '00000007', pred, gt)


def test_labels_out_of_range_are_named_as_in_the_file():
    gt = np.full((4, 5), 125, np.uint8)
    with pytest.raises(ValueError, match=r'holds label 125; expected 1\.\.124'):
        StreamingMetrics(124, reduce_zero_label=True).update('v', 0, np.zeros_like(gt), gt)


def test_a_frame_counts_once():
    metrics = StreamingMetrics(3)
    frame = np.zeros((2, 2), np.uint8)
    metrics.update('v', 0, frame, frame)
    with pytest.raises(ValueError, match='v/0: the frame has come before'):
        metrics.update('v', 0, frame, frame)
    metrics.finish('v')
    with pytest.raises(ValueError, match='finished'):
        metrics.update('v', 1, frame, frame)


def test_ignore_index_inside_the_range_is_not_scored():
    gt = np.array([[0, 1, 1, 1]], np.uint8)
    metrics = StreamingMetrics(3, ignore_index=1)
    metrics.update('v', 0, np.array([[0, 0, 2, 1]], np.uint8), gt)
    assert metrics.compute()['aAcc'] == 1


def test_files(tmp_path, capsys):
    classes, reduce, gts, preds = recorded_case(0)
    metrics = StreamingMetrics(classes, reduce_zero_label=reduce, class_names=[f'c{i}' for i in range(classes)])
    for i, (gt, pred) in enumerate(zip(gts, preds)):
        metrics.update('video', i, pred, gt)
    results = metrics.results()
    results.to_json(tmp_path / 'out.json')
    stored = json.loads((tmp_path / 'out.json').read_text())
    assert stored['mIoU'] == results.summary['mIoU']
    assert stored['VC8'] is None
    assert [row['class'] for row in stored['per_class']] == list(metrics.class_names)
    assert stored['per_video'][0]['frames'] == 6
    results.to_csv(tmp_path / 'csv')
    assert (tmp_path / 'csv' / 'classes.csv').read_text().splitlines()[0] == 'class,IoU,Acc,Dice,pixels'
    results.print(per_class=True, per_video=True)
    assert f'{100 * results.summary["mIoU"]:.2f}' in capsys.readouterr().out


def test_scores_of_an_empty_class_are_nan():
    confusion = np.array([[2, 1], [0, 0]])
    assert class_scores(confusion)['Acc'].tolist()[0] == pytest.approx(2 / 3)
    assert math.isnan(class_scores(confusion)['Acc'][1])
    assert mean_scores(confusion)['mAcc'] == pytest.approx(2 / 3)


def test_import_is_light():
    code = 'import sys, mmseg.core.evaluation; print([m for m in ("torch", "mmengine", "scipy") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_consistency_options_are_frozen():
    with pytest.raises(AttributeError):
        ConsistencyOptions().lengths = (4,)
