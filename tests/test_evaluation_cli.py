"""``python -m mmseg.core.evaluation`` as a process, on folders of PNG files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmseg.core.evaluation import StreamingMetrics
from tests.reference import recipe

KEYS = ['mIoU', 'mIoU_vspw', 'fwIoU', 'aAcc', 'mAcc', 'VC8', 'VC16']


def score(*args, status=0):
    done = subprocess.run([sys.executable, '-m', 'mmseg.core.evaluation', *map(str, args)], capture_output=True,
                          text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def folders(tmp_path):
    """Predictions as ``<video>/<frame>.png`` (palette), ground truth in VSPW's layout with raw labels."""
    for name, n in (('a', 20), ('b', 9)):
        raw = recipe.raw_mask(n, n, 24, 32)
        pred = np.clip(raw.astype(int) - 1, 0, 123).astype(np.uint8)
        pred[::3, :8] = 7
        for folder in (tmp_path / 'pred' / name, tmp_path / 'gt' / name / 'mask'):
            folder.mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(pred[i]).convert('P')
            image.putdata(pred[i].ravel().tolist())
            image.putpalette(list(range(256)) * 3)
            image.save(tmp_path / 'pred' / name / f'{3 + i:08d}.png')
            Image.fromarray(raw[i]).save(tmp_path / 'gt' / name / 'mask' / f'{3 + i:08d}.png')
    (tmp_path / 'gt' / 'unpredicted' / 'mask').mkdir(parents=True)
    return tmp_path


def test_scores_equal_streaming(folders):
    metrics = StreamingMetrics(124, reduce_zero_label=True)
    for name in ('a', 'b'):
        for i, path in enumerate(sorted((folders / 'pred' / name).glob('*.png'))):
            gt = np.array(Image.open(folders / 'gt' / name / 'mask' / path.name))
            metrics.update(name, i, np.array(Image.open(path)), gt)
    common = (folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label')
    done = score(*common, '--json', folders / 'two.json', '--csv', folders / 'csv', '--jobs', 2)
    assert 'VC16' in done.stdout
    assert '1 videos of' in done.stderr
    score(*common, '--json', folders / 'one.json', '--jobs', 1)
    stored = json.loads((folders / 'two.json').read_text())
    assert stored == json.loads((folders / 'one.json').read_text())
    assert {key: stored[key] for key in KEYS} == {key: metrics.compute()[key] for key in KEYS}
    assert 0 < stored['VC8'] < 1
    assert (folders / 'csv' / 'videos.csv').read_text().count('\n') == 3


def test_list_of_videos_and_variants(folders):
    (folders / 'val.txt').write_text('b\r\n')
    score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label',
          '--videos', folders / 'val.txt', '--vc', 4, 8, '--vc-last-window', '--json', folders / 'out.json')
    stored = json.loads((folders / 'out.json').read_text())
    assert [row['video'] for row in stored['per_video']] == ['b']
    assert 'VC4' in stored and 'VC16' not in stored


def test_optional_measures(folders):
    for name, n in (('a', 20), ('b', 9)):
        (folders / 'frames' / name / 'origin').mkdir(parents=True)
        for i in range(n):
            Image.fromarray(recipe.frame(n, i, 24, 32)).save(folders / 'frames' / name / 'origin' / f'{3 + i:08d}.jpg')
    common = (folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--extras', 'VEC4', 'TC')
    score(*common, '--images', folders / 'frames', '--json', folders / 'out.json')
    stored = json.loads((folders / 'out.json').read_text())
    assert 0 < stored['VEC4'] < 1 and 0 < stored['TC'] < 1
    assert '--images DIR' in score(*common, status=1).stderr


@pytest.mark.parametrize('harm, message', [
    (lambda f: (f / 'pred/a/00000004.png').unlink(), r'1 of 20 frames are missing, the first is 00000004.png'),
    (lambda f: (f / 'gt/a/mask/00000004.png').write_bytes(b''), r'gt/a/mask/00000004.png cannot be read'),
    (lambda f: Image.fromarray(np.full((24, 32), 200, np.uint8)).save(f / 'pred/a/00000005.png'),
     r'a/00000005: the prediction holds label 200; expected 0..123'),
    (lambda f: Image.new('RGB', (32, 24)).save(f / 'pred/a/00000005.png'), r'pred/a/00000005.png: expected an 8-bit'),
    (lambda f: Image.new('L', (32, 25)).save(f / 'pred/a/00000005.png'), r'a/00000005: the prediction is 32x25'),
])
def test_bad_files_are_named(folders, harm, message):
    harm(folders)
    done = score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', status=1)
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


def test_help_has_examples():
    assert 'examples:' in score('--help').stdout
