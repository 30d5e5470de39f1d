"""tools/browse_dataset.py as a process, and the sheet it draws."""

import sys

import cv2
import numpy as np
import pytest
import torch

from mmseg.datasets import build_dataset
from mmseg.utils.config import load_config
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
    browse_dataset.main()


def test_test_clips_of_one_video(config, tmp_path, monkeypatch):
    call(monkeypatch, config, '--part', 'test', '--videos', 'v1', '--number', 99, '--out', tmp_path,
         '--options', 'data.test.test_size=4')
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all('_v1_' in name for name in names)  # 5 frames: a clip of 4, and one that is left


def test_split_without_masks(config, tmp_path, monkeypatch):
    call(monkeypatch, config, '--part', 'test', '--number', 1, '--out', tmp_path, '--options', 'data.test.split=test')
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_video(config, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no video 'v9'"):
        call(monkeypatch, config, '--part', 'test', '--videos', 'v9', '--out', tmp_path)


def test_the_input_is_turned_back_into_the_picture():
    norm = dict(mean=np.array([120, 110, 100], np.float32), std=np.array([50, 60, 70], np.float32), to_rgb=True)
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy((picture[..., ::-1] - norm['mean']) / norm['std']).permute(2, 0, 1)
    assert (browse_dataset.denormalise(tensor, norm) == picture).all()


def test_concatenated_sets_are_walked(config):
    train = load_config(config).data.train
    dataset = build_dataset([train, train])
    assert [part.split for part in browse_dataset.video_datasets(dataset)] == ['train', 'train']
