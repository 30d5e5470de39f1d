"""The mini data set: format, determinism, and frames that are ambiguous where clips are not."""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg.apps.mini_vspw import CLASS_IDS, SPLITS, _casts, render_video, write_mini_vspw
from mmseg.datasets import VSPWDataset
from tools import make_mini_vspw

TINY = {'train': (1, 2), 'val': (1, 1), 'test': (1, 1)}
SMALL = {'train': (6, 8), 'val': (2, 4), 'test': (1, 2)}


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp('mini')
    write_mini_vspw(root, splits=SMALL)
    return root


def digest(root):
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return hashlib.sha256(b''.join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_seed_decides_everything(mini, tmp_path):
    write_mini_vspw(tmp_path / 'same', splits=SMALL)
    write_mini_vspw(tmp_path / 'other', seed=1, splits=SMALL)
    assert digest(tmp_path / 'same') == digest(mini) != digest(tmp_path / 'other')


def test_the_format_is_that_of_vspw(mini):
    assert (mini / 'train.txt').read_text().split() == [f'train_{i:03d}' for i in range(6)]
    sizes = set()
    for split, (videos, frames) in SMALL.items():
        for name in (mini / f'{split}.txt').read_text().split():
            origin = sorted((mini / 'data' / name / 'origin').iterdir())
            assert len(origin) == frames and all(path.suffix == '.jpg' for path in origin)
            masks = sorted((mini / 'data' / name).glob('mask/*.png'))
            assert [p.stem for p in masks] == ([] if split == 'test' else [p.stem for p in origin])
            shapes = {cv2.imread(str(path)).shape[:2] for path in origin}
            assert len(shapes) == 1
            sizes |= shapes
            for path in masks:
                with Image.open(path) as image:
                    assert image.mode == 'L' and image.size[::-1] in shapes
                    label = np.array(image)
                assert set(np.unique(label)) <= {0, 255, *CLASS_IDS.values()}
                assert (label[0] == 255).all() and (label[:, -1] == 255).all()
        assert len((mini / f'{split}.txt').read_text().split()) == videos
    assert len(sizes) >= 2


def test_classes_are_spread_and_every_split_shows_all():
    assert len(CLASS_IDS) == 12 and min(CLASS_IDS.values()) == 1 and max(CLASS_IDS.values()) == 124
    assert all(VSPWDataset.CLASSES[label - 1] == name for name, label in CLASS_IDS.items())
    colours = np.float32([[VSPWDataset.PALETTE[label - 1] for label in CLASS_IDS.values()]])
    (lab,) = cv2.cvtColor(colours / 255, cv2.COLOR_RGB2LAB)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 40, 'colours can be told apart'
    for seed, (videos, _) in enumerate(SPLITS.values()):
        casts = _casts(np.random.default_rng(seed), videos)
        assert all(3 <= len(set(cast)) == len(cast) <= 6 for cast in casts)
        if videos > 10:
            assert {name for cast in casts for name in cast} == set(CLASS_IDS)
    assert SPLITS['val'][0] >= 12 and SPLITS['val'][1] > 16  # VC16 needs more than 16 frames


def sharpness(frame):
    return cv2.Laplacian(cv2.medianBlur(frame, 5), cv2.CV_32F).var()


def test_bad_frames_are_ambiguous_and_clips_are_not():
    """In bad frames a pair's textures are as good as gone; nearly every clip of two holds a sharp frame."""
    videos = [
        [sharpness(frame) for frame, _ in render_video(np.random.default_rng([3, i]), cast, 16)]
        for i, cast in enumerate(_casts(np.random.default_rng(3), 12))]
    bad = np.array([[s < 0.5 * np.median(scores) for s in scores] for scores in videos])
    assert 0.2 < bad.mean() < 0.5
    scores = np.array([np.array(s) / np.median(s) for s in videos])
    assert np.median(scores[bad]) < 0.2
    both = bad[:, :-3] & bad[:, 3:]
    assert both.mean() < 0.2


def test_labels_move(mini):
    masks = sorted((mini / 'data' / 'train_000' / 'mask').iterdir())
    first, last = (np.array(Image.open(path)) for path in (masks[0], masks[-1]))
    assert 0.02 < (first != last).mean() < 0.9


@pytest.fixture
def small_tool(monkeypatch):
    monkeypatch.setattr(make_mini_vspw, 'SPLITS', TINY)
    monkeypatch.setattr(make_mini_vspw, 'write_mini_vspw', functools.partial(write_mini_vspw, splits=TINY))
    return lambda *args: make_mini_vspw.main(list(map(str, args)))


def test_the_tool_refuses_to_overwrite(small_tool, tmp_path, capsys):
    assert small_tool(tmp_path) == 0
    before = digest(tmp_path)
    assert small_tool(tmp_path) == 1 and 'holds a data set already' in capsys.readouterr().err
    assert digest(tmp_path) == before
    assert small_tool(tmp_path, '--overwrite', '--seed', 3) == 0
    write_mini_vspw(tmp_path / 'fresh', seed=3, splits=TINY)
    fresh = digest(tmp_path / 'fresh')
    shutil.rmtree(tmp_path / 'fresh')
    assert digest(tmp_path) == fresh, 'no frame of the other seed is left'


@pytest.mark.parametrize('name', ['train.txt', 'val.txt'])
def test_the_lists_of_another_data_set_are_never_replaced(small_tool, tmp_path, capsys, name):
    (tmp_path / name).write_text('my_video\n')
    assert small_tool(tmp_path, '--overwrite') == 1
    assert f'{name} names videos that this tool did not make' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == 'my_video\n'


@pytest.mark.parametrize('writes', [0, 5, 8, 9])
def test_what_is_half_written_does_not_look_whole(small_tool, tmp_path, monkeypatch, capsys, writes):
    assert small_tool(tmp_path) == 0
    left = itertools.count(writes, -1)
    replace = os.replace

    def full(source, target):
        if next(left) <= 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', full)
    assert small_tool(tmp_path, '--overwrite', '--seed', 1) == 1
    assert 'No space left on device' in capsys.readouterr().err
    assert not (tmp_path / 'train.txt').exists() and not list(tmp_path.rglob('*.part'))
    monkeypatch.undo()
    write_mini_vspw(tmp_path, 1, TINY)
    assert (tmp_path / 'train.txt').exists()


def test_a_wrong_seed_or_place(small_tool, tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    assert small_tool(tmp_path / 'file') == 1
    assert small_tool(tmp_path / 'x', '--seed', -1) == 1
    assert capsys.readouterr().err.count('error: ') == 2 and (tmp_path / 'file').read_text() == 'mine'
