"""tools/browse_dataset.py as a process, and the sheet it draws."""

import sys

import cv2
import numpy as np
import pytest
import torch

from mmseg.config import load_config
from mmseg.datasets import build_dataset
from tests.tiny_config import write_tiny_config
from tests.tool_process import run_tool
from tests.vspw_fixture import write_vspw
from tools import browse_dataset


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('browse')
    return write_tiny_config(folder / 'tiny.py', write_vspw(folder / 'data'), base='video_themask_mit_b0')


def test_process(config, tmp_path):
    done = run_tool('browse_dataset', config, '--out', tmp_path / 'sheets', '--number', 2, '--height', 90,
                    '--options', 'data.train.dataset.dilation=[-3]')
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / 'sheets').glob('*.jpg'))
    assert done.stdout.split() == [str(path) for path in files] and len(files) == 2
    assert cv2.imread(str(files[0])).shape[0] > 4 * 90  # files, their labels, input, input labels


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['browse_dataset.py', *map(str, args)])
    return browse_dataset.main()


def test_test_clips_of_one_video(config, tmp_path, monkeypatch):
    call(monkeypatch, config, '--part', 'test', '--videos', 'v1', '--number', 99, '--out', tmp_path,
         '--options', 'data.test.test_size=4')
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all('_v1_' in name for name in names)  # 5 frames: a clip of 4, and one that is left


def test_split_without_masks(config, tmp_path, monkeypatch):
    call(monkeypatch, config, '--part', 'test', '--number', 1, '--out', tmp_path, '--options', 'data.test.split=test')
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_video(config, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, config, '--part', 'test', '--videos', 'v9', '--out', tmp_path) == 1
    assert capsys.readouterr().err == "error: --videos: the split has no video 'v9'\n"


@pytest.mark.parametrize('place,what', [
    ('data', 'the data set'), ('data/data/v1/origin', "the folder of the frames of 'v1'"),
    ('link', "the folder of the masks of 'v1'"), ('data/val.txt/x', 'Not a directory')])
def test_sheets_do_not_lie_among_the_frames(config, monkeypatch, capsys, place, what):
    link = config.parent / 'link'
    if not link.exists():
        link.symlink_to(config.parent / 'data/data/v1/mask')
    before = sorted(config.parent.rglob('*'))
    assert call(monkeypatch, config, '--part', 'val', '--out', config.parent / place) == 1
    said = capsys.readouterr().err
    assert said.startswith('error: ') and what in said and said.count('\n') == 1
    assert sorted(config.parent.rglob('*')) == before


def test_names_with_slashes_and_long_suffixes(tmp_path, monkeypatch):
    root = write_vspw(tmp_path / 'data', {'val': {'city/a': 3}, 'train': {'x': 5}})
    for path in list((root / 'data/city/a').rglob('*.*')):
        path.rename(path.with_name(f'{path.stem}_{path.parent.name}{path.suffix}'))
    config = write_tiny_config(tmp_path / 'tiny.py', root, extra="""
        data['val']['layout'] = dict(frame_suffix='_origin.jpg', mask_suffix='_mask.png')""")
    assert call(monkeypatch, config, '--part', 'val', '--number', 9, '--out', tmp_path / 'sheets') == 0
    assert [path.name for path in sorted((tmp_path / 'sheets').iterdir())] == [
        f'val_{i:05d}_city_a_{i + 1:08d}.jpg' for i in range(3)]


def test_a_config_without_that_part(tmp_path, monkeypatch, capsys):
    (tmp_path / 'c.py').write_text('data = dict(workers_per_gpu=0)')
    assert call(monkeypatch, tmp_path / 'c.py', '--part', 'val') == 1
    assert 'has no data.val' in capsys.readouterr().err


def test_the_input_is_turned_back_into_the_picture():
    norm = dict(mean=np.array([120, 110, 100], np.float32), std=np.array([50, 60, 70], np.float32), to_rgb=True)
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy((picture[..., ::-1] - norm['mean']) / norm['std']).permute(2, 0, 1)
    assert (browse_dataset.denormalise(tensor, norm) == picture).all()


def test_concatenated_sets_are_walked(config):
    train = load_config(config).data.train
    dataset = build_dataset([train, train])
    assert [part.split for part in browse_dataset.video_datasets(dataset)] == ['train', 'train']
