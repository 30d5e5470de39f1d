"""A published model: weights only, named by their hash, with a card that says what is in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys

import pytest
import torch

from mmseg.apps.convert import read_weights
from mmseg.apps.publish import publish_model
from mmseg.utils import files
from mmseg.utils.errors import CheckpointError
from tests.tool_process import run_tool
from tools import publish_model as publish_model_tool


@pytest.fixture
def checkpoint(tmp_path):
    state = {name: torch.rand(3, 4) for name in ('backbone.w', 'decode_head.predictor.w', 'decode_head.criterion.w')}
    path = tmp_path / 'iter_1200.pth'
    torch.save({'meta': {'iter': 1200, 'CLASSES': ['wall', 'sky'], 'time': 'now'}, 'state_dict': state,
                'optimizer': {'state': {0: torch.rand(1000)}}}, path)
    return path


@pytest.fixture
def publish(monkeypatch, capsys):
    """Runs the tool in this process: its status, and what it printed as errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['publish_model', *map(str, arguments)])
        return publish_model_tool.main(), capsys.readouterr().err

    return run


def test_weights_only_and_the_same_name_for_the_same_weights(checkpoint, tmp_path):
    first = publish_model(checkpoint, tmp_path / 'out' / 'model.pth')
    again = publish_model(checkpoint, tmp_path / 'again' / 'other.pth')
    assert publish_model(tmp_path, tmp_path / 'dir' / 'm.pth').sha256 == first.sha256, 'a work dir'
    assert first.sha256 == again.sha256 == hashlib.sha256(first.weights.read_bytes()).hexdigest()
    assert first.weights.name == f'model-{first.sha256[:8]}.pth' and first.card.name == f'model-{first.sha256[:8]}.md'
    assert sorted(p.name for p in first.weights.parent.iterdir()) == sorted([first.weights.name, first.card.name])
    content = torch.load(first.weights, weights_only=True)
    assert set(content) == {'meta', 'state_dict'} and set(content['meta']) == {'iter', 'CLASSES'}
    state, _ = read_weights(checkpoint)
    assert all(torch.equal(content['state_dict'][name], value) for name, value in state.items())
    with pytest.raises(CheckpointError, match='does not exist'):
        publish_model(tmp_path / 'none.pth', tmp_path / 'x.pth')


def test_tool_and_card(checkpoint, tmp_path, publish):
    metrics = tmp_path / 'metrics.json'
    metrics.write_text(json.dumps({'mIoU': 0.4321, 'VC8': 0.9, 'VC16': None}))
    status, errors = publish(checkpoint, tmp_path / 'm.pth', '--config', 'local_configs/themask/mini_video.py',
                             '--metrics', metrics, '--data', 'mini val')
    assert status == 0, errors
    (card,) = tmp_path.glob('m-*.md')
    text = card.read_text()
    for part in ('| mIoU | 43.21 |', '| VC8 | 90.00 |', '## Results on mini val', '2: wall, sky', '1,200',
                 "type='EncoderDecoder_clips'", card.with_suffix('.pth').name, 'segment_video'):
        assert part in text, part
    assert 'VC16' not in text.split('## Config')[0]
    status, errors = publish(tmp_path / 'none.pth', tmp_path / 'm.pth')
    assert status == 1 and 'does not exist' in errors and len(errors.splitlines()) == 1
    done = run_tool('publish_model', '--help')
    assert done.returncode == 0 and 'examples:' in done.stdout


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('linked', [False, True])
def test_what_is_read_is_never_replaced(checkpoint, tmp_path, publish, linked):
    published = publish_model(checkpoint, tmp_path / 'm.pth')
    folder = tmp_path
    if linked:
        folder = tmp_path / 'linked'
        folder.symlink_to(tmp_path)
    metrics = published.card
    metrics.write_text(json.dumps({'mIoU': 0.4321}))
    before = content(tmp_path)
    for arguments, message in (
        ((published.weights, folder / 'm.pth'), "weights: .* is the checkpoint"),
        ((checkpoint, folder / 'm.pth', '--metrics', metrics), 'card: .* is the file of metrics'),
    ):
        status, errors = publish(*arguments)
        assert status == 1 and re.match(f'error: {message}.*choose another name\n$', errors), errors
    assert content(tmp_path) == before, 'and no other file is left'


@pytest.mark.parametrize(('fault', 'where'), [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 'fsync'),
    (OSError(errno.EROFS, os.strerror(errno.EROFS)), 'mkdtemp'),
    (OSError(errno.EIO, os.strerror(errno.EIO)), 'card'),
])
def test_a_full_disk_or_a_read_only_folder_is_one_line_and_leaves_nothing(
    checkpoint, tmp_path, publish, monkeypatch, fault, where
):
    publish_model(checkpoint, tmp_path / 'm.pth')
    before = content(tmp_path)

    def fail(*args, **kwargs):
        raise fault

    if where == 'fsync':
        monkeypatch.setattr(files.os, 'fsync', fail)
    elif where == 'mkdtemp':
        monkeypatch.setattr('tempfile.mkdtemp', fail)
    else:
        monkeypatch.setattr('mmseg.apps.publish.write_atomically', fail)
    status, errors = publish(checkpoint, tmp_path / 'm.pth')
    assert status == 1 and len(errors.splitlines()) == 1 and fault.strerror in errors and str(tmp_path) in errors
    assert content(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(('text', 'message'), [
    ('{"mIoU"', 'no JSON file'), ('[1]', 'holds a list'), ('{"mIoU": "high"}', "mIoU is 'high'")])
def test_metrics_that_are_none(checkpoint, tmp_path, publish, text, message):
    (tmp_path / 'metrics.json').write_text(text)
    before = content(tmp_path)
    status, errors = publish(checkpoint, tmp_path / 'm.pth', '--metrics', tmp_path / 'metrics.json')
    assert status == 1 and len(errors.splitlines()) == 1 and message in errors and 'metrics.json' in errors
    assert content(tmp_path) == before
