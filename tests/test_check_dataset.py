"""tools/check_dataset.py as a real process on a data set with one of each fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.reference import recipe
from tests.vspw_fixture import write_vspw
from tools.check_dataset import main

ROOT = Path(__file__).parents[1]


def check(*args):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '200'}
    command = [sys.executable, 'tools/check_dataset.py', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('clean'))


def test_a_clean_data_set(clean, tmp_path, capsys):
    assert main([str(clean), '--json', str(tmp_path / 'report.json')]) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [(s, r['videos'], r['frames'], r['problems']) for s, r in report.items()] == [
        ('train', 3, 24, []), ('val', 3, 18, []), ('test', 1, 4, [])]
    masks = [np.array(Image.open(path)) for v in 'abc' for path in (clean / 'data' / v / 'mask').iterdir()]
    counts = np.bincount(np.stack(masks).ravel(), minlength=256)
    assert list(report['train']['pixels'].values()) == counts[1:125].tolist()
    assert report['train']['void'] == counts[0] + counts[255]
    assert 'train: 3 videos, 24 frames, 0 problems' in capsys.readouterr().out


def test_hidden_files_are_not_checked(tmp_path, capsys):
    root = write_vspw(tmp_path)
    for video, kind, suffix in (('a', 'origin', 'jpg'), ('a', 'mask', 'png'), ('t0', 'mask', 'png')):
        (root / 'data' / video / kind / f'._00000001.{suffix}').write_bytes(b'of macOS')
    assert main([str(root)]) == 0
    assert 'test: 1 videos, 4 frames, 0 problems' in capsys.readouterr().out


def test_every_fault_is_listed_by_file(tmp_path):
    root = write_vspw(tmp_path / 'data', {'train': {'a': 6, 'b': 6, 'gone': 2, 'short': 2}})
    origin, mask = root / 'data' / 'a' / 'origin', root / 'data' / 'a' / 'mask'
    (origin / '00000001.jpg').write_bytes((origin / '00000001.jpg').read_bytes()[:500])
    (origin / '00000002.jpg').write_bytes(b'')
    (mask / '00000003.png').write_bytes(b'')
    (mask / '00000004.png').unlink()
    Image.fromarray(np.full((60, 107), 200, np.uint8)).save(mask / '00000005.png')
    Image.fromarray(recipe.raw_mask(1, 1, 30, 40)[0]).save(mask / '00000006.png')
    Image.fromarray(recipe.raw_mask(1, 1, 60, 107)[0]).save(mask / '00000007.png')
    cv2.imwrite(str(root / 'data' / 'b' / 'origin' / '00000003.jpg'), recipe.frame(1, 0, 64, 100))
    for path in sorted((root / 'data' / 'gone').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / 'data' / 'gone').rmdir()
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = '{ROOT}/local_configs/themask/1f_themask_mit_b0.py'
data = dict(train=dict(dataset=dict(data_root='{root}', dilation=[-3])))
""")
    done = check(config, '--splits', 'train', '--json', tmp_path / 'report.json', '--workers', '2')
    assert done.returncode == 1, done.stdout + done.stderr
    problems = json.loads((tmp_path / 'report.json').read_text())['train']['problems']
    assert [(p['kind'], p['video'], Path(p['path']).name) for p in problems] == [
        ('unreadable frame', 'a', '00000001.jpg'),
        ('unreadable frame', 'a', '00000002.jpg'),
        ('unreadable mask', 'a', '00000003.png'),
        ('missing mask', 'a', '00000004.png'),
        ('label out of range', 'a', '00000005.png'),
        ('size mismatch', 'a', '00000006.png'),
        ('mask without frame', 'a', '00000007.png'),
        ('size mismatch', 'b', '00000003.jpg'),
        ('size mismatch', 'b', '00000003.png'),
        ('missing video', 'gone', 'origin'),
        ('short video', 'short', 'origin'),
    ]
    for words in ('truncated JPEG', 'empty file (0 bytes)', 'label out of range: [200]', '2 frames, a clip needs 4'):
        assert words in done.stdout
    assert '11 problems (3 size mismatch, 2 unreadable frame' in done.stdout
    assert all(p['path'] in done.stdout for p in problems)


def test_a_check_that_cannot_run(tmp_path, clean, capsys):
    assert main([str(tmp_path)]) == 2
    assert 'neither a config file nor a folder' in capsys.readouterr().err
    assert main([str(clean), '--type', 'VSPWDatset']) == 2
    assert "did you mean 'VSPWDataset'" in capsys.readouterr().err


def test_folders_need_no_config(tmp_path, capsys):
    root = write_vspw(tmp_path, {'val': {'x': 3}})
    for path in (root / 'data' / 'x' / 'mask').iterdir():
        path.unlink()
    assert main([str(root)]) == 0  # no masks at all is a test split
    assert main([str(root), '--min-frames', '5']) == 1
    out = capsys.readouterr().out
    assert '3 frames, a clip needs 5' in out and 'val: 1 videos, 3 frames, 1 problems' in out
