"""Checkpoints: whole or absent, never run code, old layouts, the newest whole one of a work dir."""

import errno
import io
import itertools
import os
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.apps.convert import read_weights
from mmseg.core import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from mmseg.utils.checkpoint import (
    DamagedCheckpointError,
    checkpoint_files,
    point_latest,
    prune_checkpoints,
    unwrapped_names,
)
from mmseg.utils.errors import CheckpointError
from tests.engine import Model

ROOT = Path(__file__).parents[2]


def write(path, value=0.0, **more):
    save_checkpoint({'meta': {'iter': 1}, 'state_dict': {'a': torch.full((1000,), value)}, **more}, path)
    return path


def test_what_is_saved_comes_back(tmp_path):
    write(tmp_path / 'iter_1.pth', 2.0, optimizer={'state': {}, 'param_groups': []})
    checkpoint = read_checkpoint(tmp_path / 'iter_1.pth')
    assert torch.equal(checkpoint['state_dict']['a'], torch.full((1000,), 2.0))
    assert checkpoint['meta'] == {'iter': 1}
    assert checkpoint['optimizer'] == {'state': {}, 'param_groups': []}
    assert os.listdir(tmp_path) == ['iter_1.pth']


class Harmful:
    def __reduce__(self):
        return os.system, ('touch harmed',)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    content = {'state_dict': {'a': torch.zeros(2)}, 'x': Harmful()}
    torch.save(content, 'iter_9.pth', _use_new_zipfile_serialization=not legacy)
    write(tmp_path / 'iter_5.pth')
    with pytest.raises(CheckpointError, match=r'refused.*(posix|nt)\.system') as caught:
        read_checkpoint('iter_9.pth')
    assert not isinstance(caught.value, DamagedCheckpointError)
    with pytest.raises(CheckpointError, match=r'refused'):
        newest_checkpoint(tmp_path)  # an unsafe file is no accident to pass over in silence
    assert not Path('harmed').exists()


def mmcv_checkpoint(weights):
    return {
        'meta': {
            'iter': 160000, 'epoch': 4, 'mmcv_version': '1.3.0', 'CLASSES': ('others', 'wall'),
            'PALETTE': np.arange(6, dtype=np.uint8).reshape(2, 3), 'best_score': np.float64(0.5),
            'names': np.array(['wall']), 'hook_msgs': {}},
        'state_dict': weights,
        'optimizer': {'state': {}, 'param_groups': []},
    }


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_old_mmcv_checkpoints_load(tmp_path, legacy, prefix):
    model = Model()
    weights = {prefix + name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}
    torch.save(mmcv_checkpoint(weights), tmp_path / 'old.pth', _use_new_zipfile_serialization=not legacy)
    meta = load_checkpoint(model, tmp_path / 'old.pth')
    assert meta['iter'] == 160000 and meta['best_score'] == 0.5 and meta['PALETTE'].shape == (2, 3)
    assert all((tensor == 3).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize('wrap', [lambda w: w, lambda w: {'model': w}, lambda w: {'state_dict': w}])
def test_bare_weights_load(tmp_path, wrap):
    weights = Model().state_dict()
    torch.save(wrap(weights), tmp_path / 'weights.pth')
    assert read_checkpoint(tmp_path / 'weights.pth')['state_dict'].keys() == weights.keys()


def flip_byte(data, where):
    position = data.index(where) + len(where) // 2
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize('damage', [
    lambda data: b'',
    lambda data: data[: len(data) // 2],
    lambda data: data[:-10],
    lambda data: b'<html>not found</html>',
    lambda data: flip_byte(data, np.full(500, 7, np.float32).tobytes()),
])
def test_a_damaged_newest_file_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    write(tmp_path / 'iter_8.pth', 1.0)
    write(tmp_path / 'iter_9.pth', 1.0)
    newest = write(tmp_path / 'iter_10.pth', 7.0)
    newest.write_bytes(damage(newest.read_bytes()))
    path, checkpoint = open_checkpoint(tmp_path)
    assert path.name == 'iter_9.pth' and checkpoint['state_dict']['a'][0] == 1
    assert 'iter_10.pth' in caplog.text and 'damaged' in caplog.text
    with pytest.raises(DamagedCheckpointError, match=r'iter_10.pth'):
        read_checkpoint(newest)


def directory_spans(data):
    """Where in a zip file the local header and the directory entry of each file stand, and the directory's end."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        place, entries = archive.start_dir, archive.infolist()
    for entry in entries:
        local = entry.header_offset + 30 + sum(struct.unpack_from('<HH', data, entry.header_offset + 26))
        end = place + 46 + sum(struct.unpack_from('<HHH', data, place + 28))
        yield f'local {entry.filename}', range(entry.header_offset, local)
        yield entry.filename, range(place, end)
        place = end
    yield 'end', range(place, len(data))


@pytest.mark.parametrize('everywhere', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_flipped_bit_beside_the_data_is_found_or_harmless(tmp_path, everywhere):
    """Nothing checks sizes, names and attributes of the entries in a zip file; one makes torch leave the data out."""
    path = write(tmp_path / 'iter_1.pth', 2.0)
    data, expected = path.read_bytes(), read_checkpoint(path)['state_dict']['a']
    refused = set()
    for name, positions in directory_spans(data):
        if not everywhere and name not in ('archive/data/0', 'end'):
            continue
        for position, bit in itertools.product(positions, range(8)):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            try:
                read = read_checkpoint(path)
            except DamagedCheckpointError as error:
                refused.add(str(error).partition('damaged: ')[2])
            else:
                assert torch.equal(read['state_dict']['a'], expected) and read['meta'] == {'iter': 1}, (position, bit)
    assert 'its entry archive/data/0 is marked as a folder' in refused


WRAPPED = {
    'ddp': ('module.{}', '{}'), 'lightning': ('model.{}', '{}'), 'compiled': ('_orig_mod.{}', '{}'),
    'compiled, then ddp': ('module._orig_mod.{}', '{}'), 'ddp, then compiled': ('_orig_mod.module.{}', '{}'),
    'lightning around all': ('model._orig_mod.module.{}', '{}'), 'twice': ('module.module.{}', '{}'),
    'a compiled part': ('backbone._orig_mod.{}', 'backbone.{}'),
    'names of ours': ('backbone.model.{}', 'backbone.model.{}'),
}  # fmt: skip


@pytest.mark.parametrize('case', WRAPPED)
def test_prefixes_of_wrappers_are_stripped_and_said(tmp_path, caplog, case):
    caplog.set_level('INFO', logger='mmseg')
    pattern, expected = WRAPPED[case]
    torch.save({pattern.format(name): torch.zeros(1) for name in ('a.w', 'b.w')}, tmp_path / 'a.pth')
    assert list(read_checkpoint(tmp_path / 'a.pth')['state_dict']) == [expected.format(n) for n in ('a.w', 'b.w')]
    assert ('stripped from 2 of 2 names' in caplog.text) == (pattern != expected)


@pytest.mark.parametrize(('names', 'expected'), [
    (['model.a', 'model.b', 'loss.weight'], ['a', 'b', 'loss.weight']),  # most names have it
    (['model.a', 'b', 'c'], ['model.a', 'b', 'c']),
    (['model.a', 'model.b', 'a'], ['model.a', 'model.b', 'a']),  # two would be one
    (['_orig_mod.a', 'a'], ['_orig_mod.a', 'a']),
    (['module', 'model.module.a'], ['module', 'model.module.a']),
    (['module'], ['module']),
    ([], []),
])
def test_prefixes_go_only_where_nothing_is_lost(names, expected):
    assert list(unwrapped_names(names).values()) == expected


@pytest.mark.parametrize('error', [
    PermissionError(errno.EACCES, 'Permission denied'), OSError(errno.EIO, 'Input/output error')])
@pytest.mark.parametrize('suffix', ['.pth', '.pkl', '.safetensors'])
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, error, suffix):
    write(tmp_path / 'iter_1.pth')
    path = tmp_path / f'iter_9{suffix}'
    path.touch()

    def refuse(self, *args, **kwargs):
        if self == path:
            raise error
        return open(self, *args, **kwargs)

    monkeypatch.setattr(Path, 'open', refuse)
    with pytest.raises(CheckpointError, match=rf"iter_9{suffix}' cannot be read: {error.strerror}") as caught:
        read_weights(path)
    assert not isinstance(caught.value, DamagedCheckpointError)
    if suffix == '.pth':
        with pytest.raises(CheckpointError, match='cannot be read'):
            newest_checkpoint(tmp_path)  # not passed over in silence


def test_a_disk_that_fails_while_reading_is_not_called_damage(tmp_path, monkeypatch):
    path = write(tmp_path / 'iter_1.pth')

    def fail(self):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(zipfile.ZipFile, 'testzip', fail)
    with pytest.raises(CheckpointError, match='cannot be read: Input/output error') as caught:
        read_checkpoint(path)
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize('suffix', ['.pth', '.pkl', '.safetensors'])
def test_folders_and_the_home_folder_in_paths(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(CheckpointError, match=rf'{tmp_path}/a{suffix}.*does not exist'):
        read_weights(f'~/a{suffix}')
    (tmp_path / f'a{suffix}').mkdir()
    if suffix != '.pth':  # a work dir may have any name
        with pytest.raises(CheckpointError, match='Is a directory'):
            read_weights(f'~/a{suffix}')
    write(tmp_path / 'b.pth')
    assert read_checkpoint('~/b.pth')['meta'] == {'iter': 1} and list(read_weights('~/b.pth')[0]) == ['a']
    with pytest.raises(CheckpointError, match='Is a directory'):
        read_checkpoint('~')


@pytest.mark.parametrize('content', [
    [1, 2], {'meta': {}, 'optimizer': {}}, {'state_dict': {}}, {'state_dict': 3}, {'state_dict': {1: torch.zeros(1)}},
    {'state_dict': {'a': torch.zeros(1)}, 'meta': 'text'}])
def test_files_without_weights_are_named(tmp_path, content):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(DamagedCheckpointError, match=r'odd.pth'):
        read_checkpoint(tmp_path / 'odd.pth')


def test_missing_files_and_empty_work_dirs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r'gone.pth.*does not exist'):
        open_checkpoint(tmp_path / 'gone.pth')
    with pytest.raises(CheckpointError, match=r'no complete checkpoint'):
        open_checkpoint(tmp_path)


def test_a_latest_checkpoint_that_stands_alone_is_taken(tmp_path):
    write(tmp_path / 'latest.pth', 3.0)
    path, checkpoint = open_checkpoint(tmp_path)
    assert path.name == 'latest.pth' and checkpoint['state_dict']['a'][0] == 3
    write(tmp_path / 'iter_1.pth', 1.0)
    assert open_checkpoint(tmp_path)[0].name == 'iter_1.pth'


def test_iterations_are_compared_as_numbers_and_other_files_ignored(tmp_path):
    for name in ('iter_900.pth', 'iter_1000.pth', 'best_mIoU_iter_2000.pth', 'iter_x.pth', 'epoch_3.pth'):
        write(tmp_path / name)
    assert [path.name for path in checkpoint_files(tmp_path)] == ['iter_1000.pth', 'iter_900.pth']


def test_pruning_keeps_the_newest_of_this_run_and_spares_later_ones(tmp_path):
    for iteration in (2, 4, 6, 8, 100):
        write(tmp_path / f'iter_{iteration}.pth')
    prune_checkpoints(tmp_path, keep=2, newest=8)
    assert [path.name for path in checkpoint_files(tmp_path)] == ['iter_100.pth', 'iter_8.pth', 'iter_6.pth']


def test_latest_follows(tmp_path):
    for iteration in (2, 4):
        point_latest(write(tmp_path / f'iter_{iteration}.pth', float(iteration)))
    assert read_checkpoint(tmp_path / 'latest.pth')['state_dict']['a'][0] == 4
    assert os.readlink(tmp_path / 'latest.pth') == 'iter_4.pth', 'relative, so that a work dir can be moved'


def test_another_model_is_refused_by_name(tmp_path):
    weights = Model(16).state_dict()
    with pytest.raises(CheckpointError, match=r'backbone.weight is \(16, 3\) there and \(8, 3\) here'):
        load_weights(Model(8), weights, 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth.: extra is a int, expected a tensor'):
        load_weights(Model(), {**Model().state_dict(), 'extra': 3}, 'x.pth')
    weights = Model().state_dict()
    weights['extra.weight'] = weights.pop('norm.weight')
    with pytest.raises(CheckpointError, match=r'x\.pth.*missing: norm.weight; unexpected: extra.weight'):
        load_weights(Model(), weights, 'x.pth')


def limited(code, tmp_path):
    """Runs code in a process that may write files of 64 KiB at most: a disk that is full."""
    setup = f'import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))\n'
    return subprocess.run([sys.executable, '-c', setup + code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'WORK_DIR': str(tmp_path), 'PYTHONPATH': str(ROOT)})


def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path):
    write(tmp_path / 'iter_1.pth', 1.0)
    run = limited('''
import torch
from mmseg.utils.checkpoint import save_checkpoint
from mmseg.utils.errors import CheckpointError
for name in ('iter_2.pth', 'iter_1.pth'):
    try:
        save_checkpoint({'state_dict': {'a': torch.zeros(100000)}}, os.environ['WORK_DIR'] + '/' + name)
    except CheckpointError as error:
        print(error)
''', tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all('File too large' in line and 'free some space' in line for line in lines)
    assert os.listdir(tmp_path) == ['iter_1.pth'], 'no half-written file'
    assert read_checkpoint(tmp_path / 'iter_1.pth')['state_dict']['a'][0] == 1


def test_a_full_disk_ends_the_log_file_with_one_line_and_not_the_printed_log(tmp_path):
    run = limited('''
from mmseg.utils.logger import setup_logger
logger = setup_logger(os.environ['WORK_DIR'] + '/run.log')
for i in range(5):
    logger.info('message %d %s', i, 30000 * '.')
setup_logger()
''', tmp_path)
    assert run.returncode == 0 and run.stdout.count('message') == 5
    assert run.stderr == f'cannot write {tmp_path}/run.log: [Errno 27] File too large\n'


def test_training_goes_on_over_a_full_disk_and_ends_with_an_error(tmp_path):
    run = limited('''
import logging
logging.basicConfig()
from tests.engine import Model, batches, make_runner
from mmseg.core import CheckpointHook
from mmseg.utils.errors import CheckpointError
model = Model(width=4000)
runner = make_runner(os.environ['WORK_DIR'], iters=4, model=model, interval=2)
try:
    runner.run(batches())
except CheckpointError as error:
    print('ended:', error)
print(model.seen)
''', tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'training goes on' in run.stderr and 'iter_2.pth' in run.stderr
    assert 'ended: cannot write' in run.stdout and 'iter_4.pth' in run.stdout
    assert '[0, 1, 2, 3]' in run.stdout
    assert not list(tmp_path.iterdir())


def test_a_kill_during_the_write_leaves_the_earlier_files(tmp_path):
    write(tmp_path / 'iter_1.pth', 1.0)
    run = subprocess.run([sys.executable, '-c', f'''
import os, signal, torch
from mmseg.utils.checkpoint import save_checkpoint
original = torch.save
def save(content, file):
    original(content, file)
    file.flush()
    os.truncate(file.name, 2000)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
save_checkpoint({{'state_dict': {{'a': torch.zeros(1000)}}}}, {str(tmp_path / "iter_2.pth")!r})
'''], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2, 'the half-written file is there, under a name of its own'
    assert open_checkpoint(tmp_path)[0].name == 'iter_1.pth'
    from mmseg.utils.checkpoint import remove_leftovers

    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ['iter_1.pth']


def test_files_carry_checksums(tmp_path):
    """The check of damage relies on torch writing them."""
    buffer = io.BytesIO()
    torch.save({'a': torch.ones(10)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        assert all(entry.CRC for entry in archive.infolist() if entry.filename.endswith('data/0'))
