"""``python -m mmseg.core.evaluation`` on folders of PNG files."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmseg.apis.test import metrics_for
from mmseg.apps.evaluate import main
from mmseg.config import load_config
from mmseg.core.evaluation import StreamingMetrics
from mmseg.datasets import build_dataset
from mmseg.utils.visual import write_label_png
from tests.reference import recipe
from tests.vspw_fixture import write_vspw

KEYS = ['mIoU', 'mIoU_vspw', 'fwIoU', 'aAcc', 'mAcc', 'VC8', 'VC16']


@pytest.fixture
def score(capsys):
    def run(*args, status=0):
        capsys.readouterr()
        returned = main(list(map(str, args)))
        out, err = capsys.readouterr()
        assert returned == status, out + err
        return SimpleNamespace(stdout=out, stderr=err)

    return run


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
    Image.new('L', (32, 24)).save(tmp_path / 'gt' / 'unpredicted' / 'mask' / '00000001.png')
    return tmp_path


def test_scores_equal_streaming(folders, score):
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


def test_list_of_videos_and_variants(folders, score):
    (folders / 'val.txt').write_bytes(b'\xef\xbb\xbfb \r\n\r\n')
    score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label',
          '--videos', folders / 'val.txt', '--vc', 4, 8, '--vc-last-window', '--json', folders / 'out.json')
    stored = json.loads((folders / 'out.json').read_text())
    assert [row['video'] for row in stored['per_video']] == ['b']
    assert 'VC4' in stored and 'VC16' not in stored


def test_optional_measures(folders, score):
    for name, n in (('a', 20), ('b', 9)):
        (folders / 'frames' / name / 'origin').mkdir(parents=True)
        for i in range(n):
            Image.fromarray(recipe.frame(n, i, 24, 32)).save(folders / 'frames' / name / 'origin' / f'{3 + i:08d}.jpg')
    common = (folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--extras', 'VEC4', 'TC')
    score(*common, '--images', folders / 'frames', '--json', folders / 'out.json')
    stored = json.loads((folders / 'out.json').read_text())
    assert 0 < stored['VEC4'] < 1 and 0 < stored['TC'] < 1
    assert '--images DIR' in score(*common, status=1).stderr


def write_narrow(path, labels, bits):
    """A grey PNG with ``bits`` a pixel, which Pillow reads but does not write."""
    data = io.BytesIO()
    Image.fromarray(labels).convert('P').save(data, 'PNG', bits=bits)
    content = bytearray(data.getvalue())
    content[25] = 0  # colour type: grey
    at = 8
    while content[at + 4:at + 8] != b'IEND':
        end = at + 8 + int.from_bytes(content[at:at + 4], 'big')
        content[end:end + 4] = zlib.crc32(content[at + 4:end]).to_bytes(4, 'big')
        at = end + 4
        if content[at + 4:at + 8] == b'PLTE':
            del content[at:at + 12 + int.from_bytes(content[at:at + 4], 'big')]
    path.write_bytes(content)


@pytest.mark.parametrize('bits', [2, 4])
def test_grey_values_of_few_bits_are_read_as_stored(tmp_path, score, bits):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2**bits
    for name in ('pred', 'gt'):
        (tmp_path / name / 'v').mkdir(parents=True)
        write_narrow(tmp_path / name / 'v' / '1.png', labels, bits)
    score(tmp_path / 'pred', tmp_path / 'gt', '--num-classes', 16, '--csv', tmp_path)
    rows = (tmp_path / 'classes.csv').read_text(encoding='utf-8').splitlines()[1:]
    assert sum(not row.endswith(',0') for row in rows) == min(12, 2**bits)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(b'IDAT') + 20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('harm, message', [
    (lambda f: (f / 'pred/a/00000004.png').unlink(), r'1 of 20 frames are missing, the first is 00000004.png'),
    (lambda f: (f / 'gt/a/mask/00000004.png').write_bytes(b''), 'gt/a/mask/00000004.png'),
    (lambda f: flip_a_bit(f / 'gt/a/mask/00000004.png'), 'gt/a/mask/00000004.png'),
    (lambda f: Image.fromarray(np.full((24, 32), 200, np.uint8)).save(f / 'pred/a/00000005.png'),
     r'a/00000005: the prediction holds label 200; expected 0..123'),
    (lambda f: Image.new('RGB', (32, 24)).save(f / 'pred/a/00000005.png'), r'pred/a/00000005.png: expected an 8-bit'),
    (lambda f: Image.new('L', (32, 25)).save(f / 'pred/a/00000005.png'), r'a/00000005: the prediction is 32x25'),
    (lambda f: (f / 'pred').rename(f / 'moved'), 'no such file or directory'),
    (lambda f: [p.unlink() for p in (f / 'pred').rglob('*.png')], 'pred holds no videos'),
    (lambda f: [p.write_bytes((f / 'gt/unpredicted/mask/00000001.png').read_bytes()) and None
                for p in [*(f / 'pred').rglob('*.png'), *(f / 'gt').rglob('*.png')]], 'nothing was scored: 2 videos'),
])
def test_bad_files_are_named(folders, score, harm, message):
    harm(folders)
    done = score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--jobs', 1, status=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert message.lower() in line.lower() and not done.stdout


@pytest.mark.parametrize('options, message', [
    (['--class-names', 'gone.txt'], 'gone.txt: No such file'),
    (['--class-names', 'names.txt'], 'expected 124 class names, got 2'),
    (['--videos', 'gone.txt'], 'gone.txt: No such file'),
    (['--videos', 'utf16.txt'], 'utf16.txt: is UTF-16 text; save it as UTF-8'),
    (['--videos', 'names.txt'], "video 'x' is not in pred, whose videos are a, b"),
    (['--jobs', '0'], '--jobs: expected at least 1'),
    (['--vc', '1'], 'a window needs at least 2 frames'),
    (['--vc-min-frames', '-1'], 'min_frames: expected'),
    (['--num-classes', '0'], '1..255 classes'),
    (['--num-classes', '300'], '1..255 classes'),
    (['--extras', 'VEC1'], "'VEC1' is no measure"),
    (['--extras', 'TC'], '--images DIR'),
    (['--json', 'gt/a/mask/00000004.png'], '--json: .* is the label map'),
    (['--json', 'link.txt', '--videos', 'names.txt'], '--json: .* is the list of --videos'),
    (['--csv', 'csv', '--class-names', 'csv/classes.csv', '--num-classes', '1'], 'is the list of --class-names'),
    (['--json', 'names.txt/x.json'], 'names.txt'),
    (['--csv', 'names.txt'], 'names.txt'),
])
def test_wrong_options_are_one_line(folders, score, options, message, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / 'names.txt').write_text('x\ny\n')
    (folders / 'link.txt').symlink_to('names.txt')
    (folders / 'utf16.txt').write_text('a\n', encoding='utf-16')
    (folders / 'csv').mkdir()
    (folders / 'csv' / 'classes.csv').write_text('x\n')
    if '--videos' not in options or 'link.txt' in options:
        (folders / 'names.txt').write_text('a\nb\n')
    kept = {path: path.read_bytes() for path in folders.rglob('*') if path.is_file()}
    common = ('--reduce-zero-label', '--num-classes', 124, '--jobs', 1)
    done = score('pred', 'gt', *common, *options, status=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert re.search(message, line)
    assert kept == {path: path.read_bytes() for path in folders.rglob('*') if path.is_file()}


def test_one_output_that_cannot_be_written_does_not_cost_the_others(folders, score):
    (folders / 'file').touch()
    done = score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--jobs', 1,
                 '--json', folders / 'file' / 'x.json', '--csv', folders / 'csv', status=1)
    assert 'error: ' in done.stderr and str(folders / 'file') in done.stderr
    assert 'VC8' in done.stdout and len(list((folders / 'csv').iterdir())) == 3


def test_frames_count_in_natural_order_and_videos_may_lie_deeper(folders, score):
    flat = score(folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--json',
                 folders / 'flat.json')
    assert 'unpredicted' in flat.stderr
    for root, inside in (('pred', ''), ('gt', 'mask')):
        for name in ('a', 'b'):
            for i, path in enumerate(sorted((folders / root / name / inside).glob('*.png'))):
                new = folders / f'{root}.deep' / 'city' / name / inside / f'frame_{i + 1}.png'
                new.parent.mkdir(parents=True, exist_ok=True)
                path.rename(new)
    (folders / 'gt.deep' / 'city' / 'loop').symlink_to('..')
    done = score(folders / 'pred.deep', folders / 'gt.deep', '--num-classes', 124, '--reduce-zero-label', '--json',
                 folders / 'deep.json')
    assert not done.stderr.strip()
    first, second = (json.loads((folders / f'{name}.json').read_text()) for name in ('flat', 'deep'))
    assert [row['video'] for row in second['per_video']] == ['city/a', 'city/b']
    assert {key: first[key] for key in KEYS} == {key: second[key] for key in KEYS}
    wrong = score(folders / 'pred.deep' / 'city', folders / 'gt.deep', '--num-classes', 124, status=1)
    assert "video 'a' is not in" in wrong.stderr and 'whose videos are city/a, city/b' in wrong.stderr


@pytest.mark.parametrize('jobs', [1, 2])
def test_a_signal_ends_the_command(folders, capsys, jobs):
    pipe = folders / 'gt' / 'b' / 'mask' / '00000004.png'
    pipe.unlink()
    os.mkfifo(pipe)
    done = threading.Event()

    def signal_a_reader():
        with pipe.open('wb'):  # as soon as somebody reads it
            os.kill(os.getpid(), signal.SIGTERM)
            done.wait(60)

    thread = threading.Thread(target=signal_a_reader)
    thread.start()
    try:
        args = (folders / 'pred', folders / 'gt', '--num-classes', 124, '--reduce-zero-label', '--jobs', jobs)
        assert main(list(map(str, args))) == 128 + signal.SIGTERM
    finally:
        done.set()
        thread.join()
    out, err = capsys.readouterr()
    assert not out and 'Traceback' not in err and not multiprocessing.active_children()


def test_names_are_no_markup_and_files_are_utf8_whatever_the_locale(folders):
    names = [f'{name} {i}' for i in range(42) for name in ('road [/main]', '[void]', 'caf\u00e9')][:124]
    (folders / 'names.txt').write_text('\n'.join(names), encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-m', 'mmseg.core.evaluation', folders / 'pred', folders / 'gt', '--num-classes', '124',
         '--reduce-zero-label', '--class-names', folders / 'names.txt', '--per-class', '--csv', folders / 'csv'],
        capture_output=True, text=True, env={**os.environ, 'PYTHONUTF8': '0', 'LC_ALL': 'C'})
    assert done.returncode == 0, done.stderr
    for name in ('road [/main]', '[void]', r'caf\xe9'):
        assert f'| {name} ' in done.stdout
    assert 'caf\u00e9' in (folders / 'csv' / 'classes.csv').read_text(encoding='utf-8')


def test_help_has_examples(score, capsys):
    with pytest.raises(SystemExit):
        score('--help')
    assert 'examples:' in capsys.readouterr().out


def test_ground_truth_may_be_a_data_set(tmp_path, score):
    """With its label map and its frames without labels; the scores are those that the test of the data set gives."""
    root = write_vspw(tmp_path / 'set')
    for path in (root / 'data/v0/mask').glob('*[345].png'):
        path.unlink()
    config = tmp_path / 'c.py'
    config.write_text(
        f"data = dict(test=dict(type='VSPWDataset', data_root='{root}', split='val', test_size=1, pipeline=[], "
        "unlabelled='ignore', classes=['low', 'high'], label_map={**{i: 0 for i in range(1, 60)}, 'other': 'high', "
        '0: None}))\n')
    dataset = build_dataset(load_config(config).data.test, 'data.test')
    rng = np.random.default_rng(0)
    metrics = metrics_for(dataset, ['VC2'])
    for video in dataset.videos:
        for frame in video.frames:
            pred = rng.integers(0, 2, (60, 107)).astype(np.uint8)
            write_label_png(tmp_path / 'pred' / video.name / f'{frame}.png', pred, dataset.PALETTE)
            mask = dataset.mask_of(video.name, frame)
            metrics.update(video.name, frame, pred, mask and dataset.labels.read(mask)[0])
    common = (tmp_path / 'pred', '--data', config)
    score(*common, '--vc', 2, '--json', tmp_path / 'scores.json', '--per-class')
    stored = json.loads((tmp_path / 'scores.json').read_text())
    assert {key: stored[key] for key in ('mIoU', 'VC2')} == {key: metrics.compute()[key] for key in ('mIoU', 'VC2')}
    assert [row['class'] for row in stored['per_class']] == ['low', 'high']
    assert 'leave out GT_DIR' in score(*common, '--num-classes', 2, status=1).stderr
    assert 'expected PRED_DIR GT_DIR' in score(tmp_path / 'pred', status=1).stderr
    done = score(*common, '--vc', 7)
    assert 'VC7 has no value: no video has 8 labelled frames in a row' in done.stdout
