"""tools/check_dataset.py as a real process on a data set with one of each fault."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.reference import recipe
from tests.tool_process import command, environment
from tests.vspw_fixture import write_vspw
from tools.check_dataset import main

ROOT = Path(__file__).parents[2]


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


def test_an_order_that_programs_may_disagree_about_is_a_warning(tmp_path, capsys):
    root = write_vspw(tmp_path, {'val': {'x': 3, 'y': 12, 'z': 3}})
    for folder in ('origin', 'mask'):
        for path in sorted((root / 'data/x' / folder).iterdir()):
            path.rename(path.with_stem({1: '1', 2: '01', 3: '2'}[int(path.stem)]))
        for path in sorted((root / 'data/y' / folder).iterdir()):
            path.rename(path.with_stem(f'frame_{int(path.stem)}'))
    assert main([str(root), '--json', str(tmp_path / 'r.json')]) == 0
    report = json.loads((tmp_path / 'r.json').read_text())['val']
    assert [(w['kind'], w['video']) for w in report['warnings']] == [('ambiguous order', v) for v in 'xy']
    assert report['problems'] == []
    out = capsys.readouterr().out
    assert "frames '01' and '1' have the same number" in out and "'frame_1' to 'frame_12'" in out


def test_turned_frames_other_suffixes_and_names_with_slashes(tmp_path, capsys):
    root = write_vspw(tmp_path, {'val': {'city/a': 2, 'city/b': 3}})
    exif = Image.Exif()
    exif[274] = 3
    path = root / 'data/city/a/origin/00000001.jpg'
    Image.open(path).save(path, exif=exif)
    for path in list((root / 'data/city/b/origin').iterdir()):
        path.rename(path.with_suffix('.JPG'))
    assert main([str(root)]) == 1
    out = capsys.readouterr().out
    assert 'unreadable frame: ' in out and 'EXIF orientation 3' in out
    assert "short video: " in out and "no file ends in '.jpg' (layout.frame_suffix), there are .JPG (3)" in out


def test_a_folder_without_permission_is_a_problem(clean, monkeypatch, capsys):
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith(('v0/origin', 'v1/mask')):
            raise PermissionError(13, 'Permission denied', str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, 'listdir', refuse)
    assert main([str(clean), '--splits', 'val']) == 1
    out = capsys.readouterr().out
    assert out.count('unreadable folder: ') == 2 and 'v1/mask: cannot be read: Permission denied' in out


@pytest.mark.parametrize('place,what', [
    ('val.txt', "the list of split 'val'"), ('data/v1/origin/00000002.jpg', "the file of the frames of 'v1'"),
    ('link.png', "the file of the masks of 'v1'"), ('c.py', 'the config'), ('data', 'Is a directory'),
    ('val.txt/r.json', 'val.txt: File exists')])
def test_a_report_in_the_place_of_an_input(tmp_path, capsys, place, what):
    root = write_vspw(tmp_path, {'val': {'v1': 2}})
    (root / 'c.py').write_text(f'data = dict(val=dict(type="VSPWDataset", data_root={str(root)!r}, split="val"))')
    (root / 'link.png').symlink_to(root / 'data/v1/mask/00000002.png')
    before = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    assert main([str(root / 'c.py'), '--json', str(root / place)]) == 2
    said = capsys.readouterr().err.lstrip('\n')  # of the progress bar
    assert said.startswith('error: ') and what in said and said.count('\n') == 1
    assert {path: path.read_bytes() for path in root.rglob('*') if path.is_file()} == before


def test_names_of_classes_are_no_markup(tmp_path, capsys):
    root = write_vspw(tmp_path, {'val': {'v1': 2}})
    for path in (root / 'data/v1/mask').iterdir():
        Image.fromarray(np.array(Image.open(path)) % 2).save(path)
    names = ['road [/main] :car:', '[void]']
    (root / 'c.py').write_text(f"""
data = dict(val=dict(type='VideoDataset', data_root={str(root)!r}, split='val', classes={names},
                     palette=[[0, 0, 0], [1, 1, 1]]))""")
    assert main([str(root / 'c.py')]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize('config,splits,message', [
    ('', (), 'no split to check; it has none'),
    ('val=dict(type="VSPWDataset", data_root="x", split="val")', ('vall',), 'no split vall; it has val'),
    ('val=dict(type="VSPWDataset", split="val")', (), 'data.val.data_root: expected the folder'),
    ('val=dict(type="VSPWDataset", data_root="x")', (), 'data.val.split: expected the name'),
])
def test_nothing_checked_is_an_error(tmp_path, capsys, config, splits, message):
    (tmp_path / 'c.py').write_text(f'data = dict({config})')
    assert main([str(tmp_path / 'c.py'), *(('--splits', *splits) if splits else ())]) == 2
    assert message in capsys.readouterr().err


def test_concatenated_splits_of_one_name_are_all_reported(tmp_path):
    roots = [write_vspw(tmp_path / name, {'train': {'v': 3}}) for name in 'ab']
    parts = [dict(type='VSPWDataset', data_root=str(root), split='train', dilation=[0]) for root in roots]
    (tmp_path / 'c.py').write_text(f'data = dict(train={parts!r})')
    assert main([str(tmp_path / 'c.py'), '--json', str(tmp_path / 'r.json')]) == 0
    assert list(json.loads((tmp_path / 'r.json').read_text())) == [f'train of {root}' for root in roots]


def test_what_was_found_is_shown_on_a_full_disk_too(clean, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    (tmp_path / 'r.json').write_text('old')
    assert main([str(clean), '--json', str(tmp_path / 'r.json')]) == 2
    said = capsys.readouterr()
    assert 'val: 3 videos, 18 frames, 0 problems' in said.out
    assert said.err.strip() == f'error: {tmp_path}/r.json: No space left on device'
    assert [path.name for path in tmp_path.iterdir()] == ['r.json'] and (tmp_path / 'r.json').read_text() == 'old'


@pytest.mark.slow
def test_a_check_whose_files_do_not_come_obeys(tmp_path):
    data = write_vspw(tmp_path)
    mask = next((data / 'data/a/mask').iterdir())
    mask.unlink()
    os.mkfifo(mask)
    process = subprocess.Popen(command('check_dataset', data), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and 'SIGINT: stopping' in error and 'Traceback' not in error


def test_frames_without_masks_may_be_as_they_should(tmp_path):
    root = write_vspw(tmp_path / 'data', {'train': {'a': 7, 'b': 7, 'none': 7}})
    for video, kept in (('a', {2}), ('b', {4}), ('none', set())):
        for path in (root / 'data' / video / 'mask').iterdir():
            if int(path.stem) not in kept:
                path.unlink()
    found = {}
    for unlabelled in ('error', 'ignore', 'skip'):
        (tmp_path / 'c.py').write_text(
            f'data = dict(train=dict(type="VSPWDataset", data_root={str(root)!r}, split="train", dilation=[-5], '
            f'unlabelled={unlabelled!r}))')
        main([str(tmp_path / 'c.py'), '--json', str(tmp_path / 'r.json')])
        problems = json.loads((tmp_path / 'r.json').read_text())['train']['problems']
        found[unlabelled] = [(p['kind'], p['video']) for p in problems]
    assert [kind for kind, _ in found['error']] == ['missing mask'] * 19
    assert found['ignore'] == [('short video', 'b')], 'its masked frame is too near to both ends for a clip'
    assert found['skip'] == [('short video', 'a'), ('short video', 'b')]


def test_the_same_picture_in_two_splits_is_a_warning(tmp_path, capsys):
    """Also after another compression; other pictures, and pictures of one grey, are not reported."""
    root = write_vspw(tmp_path / 'set', {'train': {'a': 4}, 'val': {'b': 4, 'c': 4}})
    origin = root / 'data'
    for name in ('00000002', '00000003'):
        cv2.imwrite(str(origin / 'b/origin' / f'{name}.jpg'), cv2.imread(str(origin / f'a/origin/{name}.jpg')),
                    [cv2.IMWRITE_JPEG_QUALITY, 70])
    for video in 'ac':
        cv2.imwrite(str(origin / video / 'origin/00000001.jpg'), np.full((60, 107, 3), 90, np.uint8))
    assert main([str(root), '--json', str(tmp_path / 'report.json')]) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [(w['kind'], w['video'], w['message']) for w in report['val']['warnings']] == [(
        'same picture', 'b', "2 frames of 'b', the first 00000002, show the same as frames of 'a' in split 'train'")]
    assert 'same picture' in capsys.readouterr().out


def test_gaps_and_labels_before_and_after_the_map_are_counted(tmp_path, capsys):
    root = write_vspw(tmp_path / 'set', {'val': {'a': 6, 'b': 6}})
    for video in 'ab':
        for number in (3, 5):
            (root / f'data/{video}/mask/0000000{number}.png').unlink()
    for folder, suffix in (('origin', 'jpg'), ('mask', 'png')):
        for number in (4, 5, 6):
            path = root / f'data/b/{folder}/0000000{number}.{suffix}'
            if path.exists():
                path.rename(path.with_stem(f'000000{number + 10}'))
    (tmp_path / 'c.py').write_text(
        f"data = dict(test=dict(type='VSPWDataset', data_root='{root}', split='val', test_size=1, pipeline=[],"
        "unlabelled='ignore', classes=['low', 'high'], label_map={**{i: 0 for i in range(1, 60)}, 'other': 'high', "
        '0: None}))\n')
    assert main([str(tmp_path / 'c.py'), '--json', str(tmp_path / 'report.json')]) == 0
    report = json.loads((tmp_path / 'report.json').read_text())['val']
    (gap,) = report['warnings']
    assert gap['kind'] == 'gaps' and "jump 1 times, in 1 of 2 videos, first in 'b' after 00000003" in gap['message']
    assert (report['frames'], report['labelled']) == (12, 8) and report['class_videos'] == {'low': 2, 'high': 2}
    for label, name in ((0, 'low'), (1, 'high')):
        assert report['pixels'][name] == sum(row['pixels'] for row in report['raw'] if row['label'] == label) > 0
    assert all((row['raw'] < 60) == (row['label'] == 0) for row in report['raw'] if row['raw'] not in (0, 255))
    out = capsys.readouterr().out
    assert 'val: what masks hold' in out and '12 frames, 8 of them labelled, 0 problems' in out
