"""VC_n against the recorded reference and a naive window implementation, in any order and over ranks."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.core.evaluation import ConsistencyOptions, StreamingMetrics
from mmseg.core.evaluation.video_consistency import ConstantRuns, WindowCounts
from mmseg.kernels import library, run_lengths
from tests.conftest import instruction_sets, need_native
from tests.reference import recipe


def naive_windows(gt, pred, n, last=False):
    """(pixels constant in both, pixels constant in the ground truth) of each window, by its definition."""
    windows = []
    for i in range(len(gt) - n + (1 if last else 0)):
        g = (gt[i:i + n] == gt[i]).all(0)
        p = (pred[i:i + n] == pred[i]).all(0)
        windows.append((int((g & p).sum()), int(g.sum())))
    return windows


def naive_score(windows):
    ratios = [both / constant for both, constant in windows if constant]
    return float(np.mean(ratios)) if ratios else math.nan


def recorded_video(seed, n):
    gt = recipe.labels(seed, n, 48, 64)
    pred = np.where(gt == 255, 3, gt)
    rng = np.random.default_rng(seed)
    for f in range(n):
        y, x = rng.integers(0, 40), rng.integers(0, 56)
        pred[f, y:y + 8, x:x + 8] = rng.integers(0, 124)
    return gt, pred


def flickering_video(seed, frames, shape=(6, 11), classes=4):
    """Labels that change at few pixels a frame, so that long windows keep some constant pixels."""
    rng = np.random.default_rng(seed)
    gt, pred = rng.integers(0, classes, (2, *shape), dtype=np.uint8)
    gts, preds = [], []
    for _ in range(frames):
        for labels in (gt, pred):
            change = rng.random(shape) < rng.choice([0.0, 0.02, 0.2])
            labels[change] = rng.integers(0, classes, change.sum())
        gt[rng.random(shape) < 0.01] = 255
        gts.append(gt.copy())
        preds.append(pred.copy())
    return np.array(gts).reshape(-1, *shape), np.array(preds).reshape(-1, *shape)


def test_recorded_videos(reference):
    want = reference('metrics.json')['vc']
    metrics = StreamingMetrics(124)
    for video in want['videos']:
        gt, pred = recorded_video(video['seed'], video['n'])
        for i in range(video['n']):
            metrics.update(str(video['seed']), i, pred[i], gt[i])
    results = metrics.results()
    for n in (8, 16):
        assert results.summary[f'VC{n}'] == pytest.approx(want[f'VC{n}'], abs=1e-12)
    for row, video in zip(results.videos, want['videos']):
        assert row['mIoU_vspw'] == pytest.approx(video['video_miou'], abs=1e-12)
        for n in (8, 16):
            expected = np.mean(video[f'vc{n}']) if video[f'vc{n}'] else math.nan
            assert row[f'VC{n}'] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    for ours, name in (('aAcc', 'Acc'), ('mAcc', 'Acc_class'), ('mIoU_vspw', 'mIoU'), ('fwIoU', 'FWIoU')):
        assert results.summary[ours] == pytest.approx(want[name], abs=1e-12)


def test_windows_without_constant_ground_truth_are_left_out():
    gt, pred = recorded_video(905, 12)
    gt = np.stack([np.full((48, 64), 1 + i % 2) for i in range(12)])
    metrics = StreamingMetrics(124)
    for i in range(12):
        metrics.update('alternating', i, pred[i], gt[i])
    assert math.isnan(metrics.compute()['VC8'])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_equals_windows(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    frames = data.draw(st.integers(0, 40))
    lengths = tuple(data.draw(st.sets(st.integers(2, 20), min_size=1, max_size=3)))
    last = data.draw(st.booleans())
    order = data.draw(st.permutations(range(frames)))
    gt, pred = flickering_video(seed, frames)
    metrics = StreamingMetrics(4, consistency=ConsistencyOptions(lengths, last_window=last))
    for i in order:
        metrics.update('v', i, pred[i], gt[i])
    scores = metrics.compute()
    for n in lengths:
        assert scores[f'VC{n}'] == pytest.approx(naive_score(naive_windows(gt, pred, n, last)), abs=1e-12, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_two_ranks_equal_one_to_the_last_digit(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    owner = [data.draw(st.integers(0, 1)) for _ in lengths]
    videos = [flickering_video(seed + i, n) for i, n in enumerate(lengths)]
    one, ranks = StreamingMetrics(4), [StreamingMetrics(4), StreamingMetrics(4)]
    for i, (gt, pred) in enumerate(videos):
        for f in np.random.default_rng(seed).permutation(len(gt)):
            one.update(f'v{i}', int(f), pred[f], gt[f])
        for f in range(len(gt)):
            ranks[owner[i]].update(f'v{i}', f, pred[f], gt[f])
    ranks[1].merge(json.loads(json.dumps(ranks[0].state())))
    np.testing.assert_equal(ranks[1].results().as_dict(), one.results().as_dict())
    for n in (8, 16):
        windows = [w for gt, pred in videos for w in naive_windows(gt, pred, n)]
        assert one.compute()[f'VC{n}'] == pytest.approx(naive_score(windows), abs=1e-12, nan_ok=True)


def test_one_video_on_two_ranks_is_refused():
    frame = np.zeros((2, 2), np.uint8)
    ranks = [StreamingMetrics(2), StreamingMetrics(2)]
    for i, metrics in enumerate(ranks):
        metrics.update('v', i, frame, frame)
    with pytest.raises(ValueError, match='video v was evaluated on two ranks'):
        ranks[0].merge(ranks[1].state())


def clip_order(frames, length):
    """Positions in the order of SPEC's test clips: blocks of 3T as three clips of stride 3, then what is left."""
    order = []
    whole = frames // (3 * length) * 3 * length
    for start in range(0, whole, 3 * length):
        for offset in range(3):
            order += range(start + offset, start + 3 * length, 3)
    return order + list(range(whole, frames))


@pytest.mark.parametrize('form', [run_lengths.RunLengths, ConstantRuns])
def test_memory_does_not_grow_with_the_video(form, monkeypatch):
    if form is ConstantRuns:
        monkeypatch.setattr(library, 'native', lambda kind: library.BuildError('not wanted'))
    else:
        need_native()
    frames, length = 400, 4
    names = [f'{i:08d}' for i in range(frames)]
    gt, pred = flickering_video(5, frames)
    metrics = StreamingMetrics(4, videos={'v': names})
    held = []
    for i in clip_order(frames, length):
        metrics.update('v', names[i], pred[i], gt[i])
        if 'v' in metrics._open:
            video = metrics._open['v']
            held.append(len(video.waiting) + sum(map(np.size, video.stream.runs._runs if video.stream else [])))
            assert video.stream is None or type(video.stream.runs) is form
    assert max(held[100:]) == max(held[:100])
    assert not metrics._open, 'a video whose frames have all come is closed'
    for n in (8, 16):
        assert metrics.compute()[f'VC{n}'] == pytest.approx(naive_score(naive_windows(gt, pred, n)), abs=1e-12)


def test_skipped_frames_are_as_if_absent():
    gt, pred = flickering_video(6, 30)
    metrics = StreamingMetrics(4, videos={'v': range(30)})
    for i in range(30):
        if i in (0, 11, 29):
            metrics.skip('v', i)
        else:
            metrics.update('v', i, pred[i], gt[i])
    kept = [i for i in range(30) if i not in (0, 11, 29)]
    assert metrics.compute()['VC8'] == pytest.approx(naive_score(naive_windows(gt[kept], pred[kept], 8)), abs=1e-12)
    assert metrics.results().videos[0]['frames'] == 27


def test_named_frames_without_a_list_are_taken_in_order_of_their_names():
    gt, pred = flickering_video(7, 20)
    metrics = StreamingMetrics(4)
    for i in np.random.default_rng(0).permutation(20):
        metrics.update('v', f'{7 * i:08d}', pred[i], gt[i])
    assert metrics.compute()['VC16'] == pytest.approx(naive_score(naive_windows(gt, pred, 16)), abs=1e-12)


def test_variant_short_videos():
    videos = {name: flickering_video(i, n) for i, (name, n) in enumerate({'short': 16, 'long': 17}.items())}
    metrics = StreamingMetrics(4, consistency=ConsistencyOptions(min_frames=17))
    for name, (gt, pred) in videos.items():
        for i in range(len(gt)):
            metrics.update(name, i, pred[i], gt[i])
    want = naive_score(naive_windows(*videos['long'], 8))
    assert metrics.compute()['VC8'] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize('remap', [False, True])
def test_variant_remap_void(remap):
    gt, pred = flickering_video(8, 20)
    gt[gt == 255] = 0
    gt[1::2][gt[1::2] == 0] = 255  # the file's two kinds of unlabelled pixels take turns
    metrics = StreamingMetrics(3, reduce_zero_label=True, consistency=ConsistencyOptions(remap_void=remap))
    for i in range(20):
        metrics.update('v', i, np.minimum(pred[i], 2), gt[i])
    compared = np.where(gt == 255, 0, gt) if remap else gt
    want = naive_score(naive_windows(compared, np.minimum(pred, 2), 8))
    assert metrics.compute()['VC8'] == pytest.approx(want, abs=1e-12)


def test_sizes_that_differ_inside_a_video():
    metrics = StreamingMetrics(2)
    metrics.update('v', 0, np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match='v/1: 3x4, but the frames before are 3x2'):
        metrics.update('v', 1, np.zeros((4, 3), np.uint8), np.zeros((4, 3), np.uint8))


def test_the_callers_arrays_may_be_used_again():
    gt, pred = flickering_video(9, 20)
    metrics = StreamingMetrics(4)
    buffer = np.empty((2, *gt.shape[1:]), np.uint8)
    for i in (1, 0, *range(2, 20)):
        buffer[0], buffer[1] = gt[i], pred[i]
        metrics.update('v', i, buffer[1], buffer[0])
    assert metrics.compute()['VC8'] == pytest.approx(naive_score(naive_windows(gt, pred, 8)), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 70), st.integers(2, 33))
def test_constant_runs_for_any_size_and_length(seed, height, width, n):
    gt, pred = flickering_video(seed, n + 3, (height, width))
    runs = ConstantRuns([n])
    for i in range(n + 3):
        runs.push(gt[i], pred[i])
        constant = runs.constant(n)
        assert (constant is None) == (i < n - 1)
        if constant is not None:
            for ours, labels in zip(constant, (gt, pred)):
                assert (ours == (labels[i - n + 1:i + 1] == labels[i]).all(0)).all()


def counted(gt, pred, lengths, last=False):
    """The windows of the NumPy form, and of the native one with each instruction set."""
    yield _counted(WindowCounts(lengths, last, native=False), gt, pred)
    for _ in instruction_sets():
        yield _counted(WindowCounts(lengths, last), gt, pred)


def _counted(stream, gt, pred):
    windows = {n: [] for n in stream.lengths}
    for ready in (*(stream.push(g, p) for g, p in zip(gt, pred)), stream.close()):
        for n, both, constant in ready:
            windows[n].append((both, constant))
    return windows


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_both_forms_equal_windows_to_the_bit(data):
    """Frames of less than a vector, of whole blocks, and with a rest; void flickers like any other label."""
    shape = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 130) | st.sampled_from([128, 256, 512]))
    lengths = data.draw(st.lists(st.integers(2, 40), max_size=4, unique=True))
    last = data.draw(st.booleans())
    gt, pred = flickering_video(data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 60)), shape)
    want = {n: naive_windows(gt, pred, n, last) for n in lengths}
    for counts in counted(gt, pred, lengths, last):
        assert counts == want


def test_long_windows():
    """Run lengths stop where their digits end, and never below a window; a stop too early or a wrap shows here."""
    frames = 1300
    gt = np.zeros((frames, 1, 7), np.uint8)
    for pixel, change in enumerate((1, 2, 255, 256, 1023, 1024)):
        gt[change:, 0, pixel] = 255
    pred = gt.copy()
    pred[700:, 0, 3] = 5
    for lengths in ((255,), (256,), (257,), (2, 128, 129, 255, 256, 257, 258, 1023, 1024, 1025, 1100)):
        want = {n: naive_windows(gt, pred, n, True) for n in lengths}
        for counts in counted(gt, pred, lengths, True):
            assert counts == want


def test_windows_of_one_frame_are_refused():
    for form in (ConstantRuns, run_lengths.RunLengths):
        with pytest.raises(ValueError, match='at least 2 frames'):
            form([8, 1])


def test_the_native_form_checks_sizes():
    need_native()
    runs = run_lengths.RunLengths([8])
    runs.push(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8))
    for gt, pred in (((4, 3), (4, 3)), ((2, 3), (2, 2))):
        with pytest.raises(ValueError, match='maps of one size'):
            runs.push(np.zeros(gt, np.uint8), np.zeros(pred, np.uint8))


@pytest.mark.parametrize('lacking', ['compiler', 'permission', 'cache', 'library', 'source'])
def test_without_the_native_form_the_other_serves_silently(lacking, fresh_library, monkeypatch, tmp_path):
    if lacking == 'compiler':
        monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    elif lacking == 'permission':
        monkeypatch.setenv('THEMASK_OPS_BUILD', '0')
    elif lacking == 'cache':
        (tmp_path / 'cache').touch()
    elif lacking == 'library':
        compiler = tmp_path / 'c++'
        compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n')
        compiler.chmod(0o755)
        monkeypatch.setenv('CXX', str(compiler))
    else:
        monkeypatch.setattr(library, 'SOURCES', tmp_path / 'absent')
    gt, pred = flickering_video(3, 20)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        metrics = StreamingMetrics(4)
        for i in range(20):
            metrics.update('v', i, pred[i], gt[i])
        assert metrics.compute()['VC8'] == pytest.approx(naive_score(naive_windows(gt, pred, 8)), abs=1e-12)
    assert isinstance(metrics._open['v'].stream.runs, ConstantRuns)

