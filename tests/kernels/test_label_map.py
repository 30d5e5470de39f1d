"""Label maps: both forms against resizing step by step and taking the argmax, and what happens without a compiler."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.kernels import label_map as module
from mmseg.kernels import library
from mmseg.kernels.label_map import ScoreView, label_map, resize_matrix, window_matrix, window_starts
from tests.conftest import instruction_sets, need_native


def forms():
    """The PyTorch form, and the native op with each instruction set."""
    yield lambda scores, rows, columns: module._label_map([ScoreView(scores, rows, columns)])
    if library.instruction_sets():
        for _ in instruction_sets():
            yield torch.ops.themask.label_map


def assert_best(labels, full):
    """The labels are the argmax of ``full``, but for ties up to rounding."""
    best, chosen = full.amax(1), full.gather(1, labels.long()[:, None])[:, 0]
    assert (best - chosen <= 1e-5 * best.abs().clamp(min=1)).all()


def resized(scores, *sizes):
    scores = scores.float()
    for size in sizes:
        scores = F.interpolate(scores, size=size, mode='bilinear', align_corners=False)
    return scores


def matrices(*sizes):
    return [resize_matrix(*axis) for axis in zip(*sizes)]


LAYOUTS = {
    'contiguous': lambda scores: scores,
    'classes last': lambda scores: scores.contiguous(memory_format=torch.channels_last),
    'columns before rows': lambda scores: scores.transpose(2, 3).contiguous().transpose(2, 3),
    'a part': lambda scores: F.pad(scores, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    'frames last': lambda scores: scores.movedim(0, 3).contiguous().movedim(3, 0),
}


@given(
    frames=st.integers(1, 3), classes=st.integers(1, 40),
    source=st.tuples(st.integers(1, 20), st.integers(1, 40)), middle=st.tuples(st.integers(1, 50), st.integers(1, 300)),
    target=st.tuples(st.integers(1, 60), st.integers(1, 300)), seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)), flip=st.booleans())
@settings(max_examples=120, deadline=None)
def test_two_resizes_and_argmax(frames, classes, source, middle, target, seed, dtype, layout, flip):
    scores = torch.randn(frames, classes, *source, generator=torch.Generator().manual_seed(seed)).to(dtype)
    full = resized(scores, middle, target)
    rows, columns = matrices(source, middle, target)
    if flip:
        full, rows, columns = full.flip(2, 3), rows.flip(1), columns.flip(1)
    before = scores.clone()
    for labels_of in forms():
        labels = labels_of(LAYOUTS[layout](scores), rows, columns)
        assert labels.shape == (frames, *target) and labels.dtype == torch.uint8
        assert_best(labels, full)
    assert torch.equal(scores, before)


@given(size=st.integers(1, 40), other=st.integers(1, 40), crop=st.integers(1, 50), stride=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_windows(size, other, crop, stride):
    """Sums of few scores and of many, near each other and far apart."""
    stride = min(stride, crop)
    starts, other_starts = window_starts(size, crop, stride), window_starts(other, crop, 1)
    length = -(-min(crop, size) // 4)
    rows, columns = window_matrix(size, crop, starts, length), window_matrix(other, crop, other_starts, 3)
    for axes in ((rows, columns), (columns, rows), (columns, columns @ resize_matrix(other, 70))):
        scores = torch.randn(2, 7, *(len(axis) for axis in axes))
        for labels_of in forms():
            assert_best(labels_of(scores, *axes), axes[0].T @ scores @ axes[1])


@pytest.mark.parametrize('classes', [1, 2, 254, 255])
def test_the_number_of_classes(classes):
    scores = torch.randn(1, classes, 9, 13)
    full = resized(scores, (40, 53))
    for labels_of in forms():
        labels = labels_of(scores, *matrices((9, 13), (40, 53)))
        assert_best(labels, full)
        assert labels.max() > (classes - 1) * 0.8 or classes < 3


def test_the_first_of_equal_scores_wins():
    scores = torch.randint(0, 3, (2, 20, 33, 130)).float()
    for labels_of in forms():
        assert torch.equal(labels_of(scores, *matrices((33, 130), (33, 130))), scores.argmax(1))
    scores = torch.zeros(1, 7, 4, 4)
    scores[:, 3:5, :, 2:] = 1
    for labels_of in forms():
        labels = labels_of(scores, *matrices((4, 4), (16, 16)))[0]
        assert labels[:, 0].eq(0).all() and labels[:, -1].eq(3).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_scores_that_are_not_finite_spoil_no_pixel_but_their_own(dtype):
    scores = torch.randn(2, 30, 12, 20).to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[scores.element_size()]
    for n, value in enumerate((float('nan'), float('inf'), -float('inf'), torch.finfo(dtype).max)):
        scores[0, 3 + n, 2 + 2 * n, 3 + 4 * n] = value
    scores[1, :, 3, 3] = -float('inf')
    scores[1, :, 8, 8] = float('nan')
    scores[1, 25, 8, 15] = float('nan')
    scores.view(integers)[1, 25, 8, 15] |= torch.iinfo(integers).min  # a NaN with a sign, as processors make it
    limited = scores.float().nan_to_num(1e38).clamp(-1e38, 1e38)
    full = resized(limited, (48, 80), (50, 77))
    for labels_of in forms():
        labels = labels_of(scores, *matrices((12, 20), (48, 80), (50, 77)))
        assert_best(labels, full)
        assert labels[0, 10, 13] == 3 and labels[1, 35, 59] == 25


def test_subnormal_float16_scores():
    steps = torch.randint(0, 1500, (1, 9, 7, 8)).float()  # of the smallest number; 1024 are the first that is normal
    for labels_of in forms():
        labels = labels_of((steps * 2.0**-24).half(), *matrices((7, 8), (28, 32)))
        assert_best(labels, resized(steps, (28, 32)))


def test_frames_strips_bands_and_threads():
    """More scores than a tile takes, and rows and columns that are no multiple of one."""
    scores = torch.randn(2, 150, 27, 151)
    full = resized(scores, (108, 604), (107, 597))
    axes = matrices((27, 151), (108, 604), (107, 597))
    before = torch.get_num_threads()
    try:
        for labels_of in forms():
            torch.set_num_threads(1)
            labels = labels_of(scores, *axes)
            assert_best(labels, full)
            for threads in (2, 3, 100):
                torch.set_num_threads(threads)
                assert torch.equal(labels_of(scores, *axes), labels)
    finally:
        torch.set_num_threads(before)


def test_autocast_is_ignored():
    scores = torch.rand(1, 30, 12, 20)
    axes = matrices((12, 20), (48, 80))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for labels_of in forms():
            assert_best(labels_of(scores, *axes), resized(scores, (48, 80)))


def test_no_frames():
    scores = torch.zeros(0, 3, 4, 5)
    for labels_of in forms():
        assert labels_of(scores, *matrices((4, 5), (8, 9))).shape == (0, 8, 9)


def test_wrong_sizes_are_named():
    axes = matrices((2, 2), (4, 4))
    for classes in (0, 256):
        with pytest.raises(ValueError, match='1 to 255 classes'):
            label_map([ScoreView(torch.zeros(1, classes, 2, 2), *axes)])
    for shape in ((1, 3, 2, 3), (1, 3, 1, 2)):
        with pytest.raises(ValueError, match='do not fit'):
            label_map([ScoreView(torch.zeros(shape), *axes)])


@given(size=st.integers(1, 60), crop=st.integers(1, 70), stride=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_pixel_and_their_weights_sum_to_one(size, crop, stride):
    stride = min(stride, crop)
    starts = window_starts(size, crop, stride)
    assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] + min(crop, size) == size
    length = -(-min(crop, size) // 4)
    torch.testing.assert_close(window_matrix(size, crop, starts, length).sum(0), torch.ones(size))


@pytest.mark.parametrize('spoil', [
    lambda scores, rows, columns: (scores[0], rows, columns),
    lambda scores, rows, columns: (scores, rows[:-1], columns),
    lambda scores, rows, columns: (scores, rows, columns[0]),
    lambda scores, rows, columns: (scores.expand(-1, 300, -1, -1), rows, columns),
])
def test_the_bare_op_checks_too(spoil):
    need_native()
    arguments = torch.randn(2, 1, 6, 7), *matrices((6, 7), (24, 28))
    torch.library.opcheck(torch.ops.themask.label_map, arguments)
    with pytest.raises(RuntimeError, match=r'label_map: (scores|rows|columns)'):
        torch.ops.themask.label_map(*spoil(*arguments))


@pytest.mark.parametrize(('lacking', 'message'), [('compiler', 'set CXX'), ('permission', 'THEMASK_OPS_BUILD=0')])
def test_without_the_native_form_the_other_is_used_and_says_so_once(lacking, message, fresh_library, monkeypatch):
    if lacking == 'compiler':
        monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    else:
        monkeypatch.setenv('CXX', 'sh')  # any command that is there
        monkeypatch.setattr(library, 'output', lambda command: 'its version')
        monkeypatch.setenv('THEMASK_OPS_BUILD', '0')
    scores = torch.randn(2, 9, 6, 7)
    axes = matrices((6, 7), (24, 28))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            assert_best(label_map([ScoreView(scores, *axes)]), resized(scores, (24, 28)))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and 'label maps' in messages[0] and message in messages[0]
    assert caught[0].filename == __file__


def test_single_views_take_the_native_form(monkeypatch):
    need_native()
    monkeypatch.delattr(module, '_label_map')
    scores = torch.randn(2, 9, 6, 7)
    assert_best(label_map([ScoreView(scores, *matrices((6, 7), (24, 28)))]), resized(scores, (24, 28)))
