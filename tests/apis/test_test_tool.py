"""``tools/test.py`` as a process with 1 and 2 ranks, and the streamed test beneath it."""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn

from mmseg.apis.sinks import VideoFiles, join_parts, load_results
from mmseg.apis.test import check_model, metrics_for, run_test, stream_test
from mmseg.config import load_config
from mmseg.core.evaluation import Results, StreamingMetrics
from mmseg.datasets import build_dataset, build_test_loader
from mmseg.models import build_segmentor
from mmseg.models.segmentors import EncoderDecoder
from mmseg.utils.checkpoint import save_checkpoint
from mmseg.utils.dist import close_dist, gather_objects, init_dist
from mmseg.utils.errors import ConfigError, DataError, OtherRankError
from mmseg.utils.logger import get_logger
from tests.processes import free_port, start
from tests.vspw_fixture import test_config as dataset_config
from tests.vspw_fixture import write_vspw
from tools import test as test_tool
from tools.test import main, parse_args, run

ROOT = Path(__file__).resolve().parents[2]
VIDEOS = {'val': {'v0': 19, 'v1': 7, 'city/v2': 11}, 'test': {'t0': 5}}  # clips that two ranks cannot share evenly
CONFIG = '''
_base_ = ['{root}/local_configs/themask/mini_video.py']
model = dict(
    backbone=dict(type='mit_b0'),
    decode_head=dict(
        num_classes=124,
        pixel_decoder_cfg=dict(conv_dim=32, mask_dim=32, transformer_dim_feedforward=32, transformer_enc_layers=1),
        transformer_decoder_cfg=dict(hidden_dim=32, mask_dim=32, num_queries=8, dim_feedforward=32, dec_layers=2)))
data = dict(workers_per_gpu=0, test=dict(_delete_=True, **{test!r}))
'''


class Thresholds(nn.Module):
    """A model whose labels depend on the frame alone: its brightness in steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.largest_batch = 0

    def predict(self, views, flips, size):
        assert not self.training
        frames = views[0]
        self.largest_batch = max(self.largest_batch, frames.shape[1])
        grey = nn.functional.interpolate(frames.mean(2), size=size, mode='nearest')
        return ((grey * 3).floor().clamp(-20, 20) + 20).to(torch.uint8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('vspw'), VIDEOS)


@pytest.fixture(scope='module')
def experiment(data, tmp_path_factory):
    """A config file and a checkpoint of a small video model with random weights."""
    folder = tmp_path_factory.mktemp('experiment')
    config = folder / 'tiny.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(data, test_size=2)))
    torch.manual_seed(3)
    model = build_segmentor(load_config(config).model)
    save_checkpoint({'meta': {}, 'state_dict': model.state_dict()}, folder / 'iter_1.pth')
    return config, folder / 'iter_1.pth'


@pytest.fixture(scope='module')
def small(experiment, tmp_path_factory):
    """The same on four clips."""
    folder = tmp_path_factory.mktemp('small')
    data = write_vspw(folder / 'data', {'val': {'v0': 3, 'city/v1': 3}})
    config = folder / 'small.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(data, test_size=2)))
    return config, experiment[1]


def tool(*args, ranks=1, status=0):
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        command += ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', f'--master_port={port}']
    command += [str(ROOT / 'tools' / 'test.py'), *map(str, args)]
    command += ['--launcher', 'pytorch'] if ranks > 1 else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert (done.returncode != 0) == bool(status), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here():
    """Runs the tool in this process, which spares the start of an interpreter."""
    yield lambda *args: run(parse_args(list(map(str, args))))
    for handler in list(get_logger().handlers):
        get_logger().removeHandler(handler)


@pytest.fixture(scope='module')
def two_runs(experiment, tmp_path_factory):
    """The same test with one rank and with two."""
    folder = tmp_path_factory.mktemp('runs')
    common = ('--eval', 'mIoU', 'VC8')
    output = tool(*experiment, '--work-dir', folder / 'one', '--out', folder / 'one.npz', *common)
    assert 'VC8' in output and 'mIoU_vspw' in output
    tool(*experiment, '--work-dir', folder / 'two', '--out', folder / 'two.npz', *common,
         '--tmpdir', folder / 'shared', ranks=2)
    return folder


def scores(folder):
    stored = json.loads((folder / 'metrics.json').read_text())
    del stored['test']
    return stored


def test_two_ranks_give_the_metrics_of_one_to_the_last_digit(two_runs):
    one = scores(two_runs / 'one')
    assert one == scores(two_runs / 'two')
    assert 0 <= one['mIoU'] < 1 and one['VC8'] is not None and 'VC16' not in one
    assert not list((two_runs / 'shared').iterdir())

    first, second = ({(v, f): m for v, f, m in load_results(two_runs / f'{name}.npz')} for name in ('one', 'two'))
    assert len(first) == sum(VIDEOS['val'].values())
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    assert not list(two_runs.glob('*.parts'))


def test_saved_maps_give_the_printed_metrics(two_runs, data):
    metrics = StreamingMetrics(124, reduce_zero_label=True)
    for video, frame, labels in load_results(two_runs / 'two.npz'):
        assert labels.dtype == np.uint8 and labels.shape == (60, 107)
        gt = np.array(Image.open(data / 'data' / video / 'mask' / f'{frame}.png'))
        metrics.update(video, int(frame), labels, gt)
    stored, computed = scores(two_runs / 'two'), metrics.compute()
    assert [stored[key] for key in ('mIoU', 'fwIoU', 'VC8')] == [computed[key] for key in ('mIoU', 'fwIoU', 'VC8')]
    assert (two_runs / 'two' / 'videos.csv').read_text().count('\n') == 1 + len(VIDEOS['val'])


def test_split_without_masks(experiment, tmp_path, here):
    options = ('--options', 'data.test.split=test')
    with pytest.raises(ConfigError, match='no masks'):
        here(*experiment, *options)
    with pytest.raises(DataError, match='no masks'):
        here(*experiment, *options, '--eval', 'mIoU')
    here(*experiment, *options, '--format-only', '--out', tmp_path / 'png', '--show-dir', tmp_path / 'show')
    files = sorted(path.relative_to(tmp_path / 'png') for path in (tmp_path / 'png').rglob('*.png'))
    assert files == [Path('t0') / f'{i:08d}.png' for i in range(1, 6)]
    with Image.open(tmp_path / 'png' / files[0]) as image:
        assert image.mode == 'P' and image.size == (107, 60)
        assert np.array(image).max() < 124
    assert len(list((tmp_path / 'show').rglob('*.jpg'))) == 5


def test_aug_test_averages_twelve_views(experiment, tmp_path, here, monkeypatch):
    views = []
    predict = EncoderDecoder.predict

    def spy(self, clips, flips, size):
        views.append([(tuple(clip.shape[3:]), flip) for clip, flip in zip(clips, flips)])
        return predict(self, clips, flips, size)

    monkeypatch.setattr(EncoderDecoder, 'predict', spy)
    here(*experiment, '--aug-test', '--out', tmp_path / 'maps', '--options', 'data.test.split=test')
    assert len(views) == 3 and all(len(clip) == 12 for clip in views)
    assert views[0][0] == ((32, 64), None) and views[0][1] == ((32, 64), 'horizontal')
    assert views[0][-1] == ((128, 192), 'horizontal')


def test_wrong_usage_is_one_line(experiment):
    output = tool(*experiment, '--eval', 'mIuO', status=1)
    assert "error: metric 'mIuO' is not known (did you mean 'mIoU'?)" in output and 'Traceback' not in output


@pytest.mark.parametrize('args, message', [
    (('--eval', 'mIoU', '--format-only'), '--format-only'),
    (('--out', 'results.txt'), r'\.npz or \.pkl'),
    (('--eval-options', 'vc_lastwindow=True'), "did you mean 'vc_last_window'"),
    (('--options', 'data.test.test_sise=4'), 'test_size'),
    (('--opacity', '2', '--show-dir', 'x'), '--opacity'),
    (('--show',), '--show-dir'),
    (('--tmpdir', 'x', '--gpu-collect'), 'give one'),
    (('--cfg-options', 'data.test.test_sise=4'), 'test_size'),
])
def test_wrong_usage(experiment, here, args, message):
    with pytest.raises(ConfigError, match=message):
        here(*experiment, *args)


@pytest.fixture
def status(capsys):
    """Runs the command line in this process; returns its status, its error lines and all that it printed."""

    def call(*args):
        capsys.readouterr()
        returned = main(list(map(str, args)))
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err
        return returned, [line for line in err.splitlines() if line.startswith('error: ')], out

    yield call
    for handler in list(get_logger().handlers):
        get_logger().removeHandler(handler)


def test_an_output_that_cannot_be_written_is_one_line(small, tmp_path, status):
    (tmp_path / 'file').touch()
    returned, (line,), _ = status(*small, '--work-dir', tmp_path, '--out', tmp_path / 'file' / 'maps.npz')
    assert returned == 1 and str(tmp_path / 'file') in line


@pytest.mark.parametrize('name, written', [
    ('work_dir', {'page/index.html', 'maps.npz'}),
    ('report', {'metrics.json', 'maps.npz'}),
    ('join_parts', {'metrics.json', 'page/index.html'}),
    ('table', {'metrics.json', 'page/index.html', 'maps.npz'}),
])
def test_an_output_that_fails_does_not_cost_the_others(small, tmp_path, status, monkeypatch, name, written):
    def fail(*_, **__):
        raise OSError(28, 'No space left on device', name)

    target = {'work_dir': (test_tool, 'write_metrics'), 'report': (test_tool, 'write_report'),
              'join_parts': (test_tool, 'join_parts'), 'table': (Results, 'print')}[name]
    monkeypatch.setattr(*target, fail)
    returned, lines, out = status(*small, '--work-dir', tmp_path, '--out', tmp_path / 'maps.npz', '--report',
                                  tmp_path / 'page')
    assert returned == 1 and lines == [f'error: {name}: No space left on device']
    assert ('mIoU_vspw' in out) == (name != 'table')
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*') if path.is_file()}
    assert written == files & {'metrics.json', 'page/index.html', 'maps.npz'}


@pytest.mark.parametrize('option', [
    ['--out', 'maps'], ['--out', 'maps.npz'], ['--out', 'maps.pkl'], ['--format-only', '--out', 'png'],
    ['--show-dir', 'pictures'], ['--report', 'page'], ['--work-dir', 'scores'],
])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small, tmp_path, status, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # the size of a file that can be written
        return stream_test(*args, **kwargs)

    monkeypatch.setattr(test_tool, 'stream_test', full)
    try:
        returned, lines, _ = status(*small, *option)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = 'maps|png|pictures|page|scores|metrics'
    assert returned == 1 and lines
    assert all(re.match(f'error: .*({names}).*: File too large', line) for line in lines)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.fixture
def flat(tmp_path, experiment):
    """A data set whose frames and masks lie directly in folders of their own, and its config."""
    source = write_vspw(tmp_path / 'vspw', {'val': {'v0': 2, 'v1': 2}})
    for kind, name in (('origin', 'frames'), ('mask', 'labels')):
        for video in ('v0', 'v1'):
            (tmp_path / 'data' / name).mkdir(parents=True, exist_ok=True)
            (source / 'data' / video / kind).rename(tmp_path / 'data' / name / video)
    (source / 'val.txt').rename(tmp_path / 'data' / 'val.txt')
    (tmp_path / 'link').symlink_to('data/labels')
    layout = dict(frames='frames/{video}', masks='labels/{video}')
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(tmp_path / 'data', test_size=2, layout=layout)))
    return tmp_path, config


@pytest.mark.parametrize('options, message', [
    (['--format-only', '--out', 'data/labels'], "--format-only, 'v0': .* is the folder of the masks of 'v0'"),
    (['--format-only', '--out', 'link'], "is the folder of the masks of 'v0'"),
    (['--format-only', '--eval-options', 'imgfile_prefix=data/labels'], "is the folder of the masks of 'v0'"),
    (['--show-dir', 'data/frames'], "--show-dir, 'v0': .* is the folder of the frames of 'v0'"),
    (['--out', 'model.pkl'], '--out: .* is the checkpoint'),
    (['--work-dir', 'scores'], r'metrics: .* is the config'),
    (['--work-dir', 'csv'], r'--work-dir \(videos.csv\): .* is the checkpoint'),
])
def test_an_output_that_is_an_input_is_refused(flat, experiment, status, monkeypatch, options, message):
    folder, config = flat
    monkeypatch.chdir(folder)
    checkpoint = folder / 'model.pkl'
    checkpoint.write_bytes(experiment[1].read_bytes())
    (folder / 'csv').mkdir()
    (folder / 'csv' / 'videos.csv').symlink_to(checkpoint)
    (folder / 'scores').mkdir()
    (folder / 'scores' / 'metrics.json').symlink_to(config)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    returned, (line,), _ = status(config, checkpoint, *options)
    assert returned == 1 and re.search(message, line)
    assert before == {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_what_lies_in_the_folder_of_parts_stays(small, tmp_path, status):
    parts = tmp_path / 'maps.npz.parts'
    (parts / 'city').mkdir(parents=True)
    (parts / 'old.npz').touch()
    (parts / 'city' / '.v.npz.part').touch()
    assert status(*small, '--work-dir', tmp_path, '--out', tmp_path / 'maps.npz')[0] == 0
    assert not parts.exists() and len(list(load_results(tmp_path / 'maps.npz'))) == 6
    parts.mkdir()
    (parts / 'mine.txt').touch()
    returned, (line,), _ = status(*small, '--work-dir', tmp_path, '--out', tmp_path / 'maps.npz')
    assert returned == 1 and 'maps.npz.parts' in line and (parts / 'mine.txt').exists()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_after_the_clip(small, tmp_path, status, monkeypatch, number):
    write = VideoFiles.write

    def write_and_signal(self, item, labels):
        write(self, item, labels)
        if item['video'] == 'city/v1':
            signal.raise_signal(number)

    monkeypatch.setattr(VideoFiles, 'write', write_and_signal)
    returned, lines, out = status(*small, '--work-dir', tmp_path / 'scores', '--out', tmp_path / 'maps')
    assert returned == 128 + number and not lines and 'finished stay in' in out
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['city', 'maps', 'v0.npz']


def test_a_signal_ends_the_wait_for_a_file_that_does_not_come(tmp_path, experiment, status):
    data = write_vspw(tmp_path / 'data', {'val': {'v0': 2, 'v1': 2}})
    mask = data / 'data' / 'v1' / 'mask' / '00000002.png'
    mask.unlink()
    os.mkfifo(mask)
    config = tmp_path / 'tiny.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(data, test_size=2)))
    done = threading.Event()

    def signal_a_reader():
        with mask.open('wb'):  # as soon as the test reads it
            os.kill(os.getpid(), signal.SIGINT)
            done.wait(60)

    threading.Thread(target=signal_a_reader, daemon=True).start()
    returned, lines, _ = status(config, experiment[1], '--out', tmp_path / 'maps')
    done.set()
    assert returned == 130 and not lines
    assert [path.name for path in (tmp_path / 'maps').iterdir()] == ['v0.npz']


@pytest.mark.slow
def test_a_signal_ends_two_ranks_of_which_one_waits_for_the_other(tmp_path, experiment):
    data = write_vspw(tmp_path / 'data', {'val': {f'v{i}': 4 for i in range(4)}})
    mask = data / 'data' / 'v3' / 'mask' / '00000002.png'
    mask.unlink()
    os.mkfifo(mask)
    config = tmp_path / 'tiny.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(data, test_size=2)))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(free_port())}
    command = [sys.executable, 'tools/test.py', config, experiment[1], '--out', tmp_path / 'maps',
               '--launcher', 'pytorch']
    ranks = [subprocess.Popen(command, cwd=ROOT, env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    with mask.open('wb'):
        for _ in range(600):
            if len(list((tmp_path / 'maps').glob('*.npz'))) == 3:
                break
            time.sleep(0.1)
        for rank in ranks:
            rank.terminate()
        printed = ''.join(rank.communicate(timeout=60)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [143, 143], printed
    assert 'Traceback' not in printed and 'interrupted: no results are written' in printed
    assert {path.name for path in (tmp_path / 'maps').iterdir()} == {'v0.npz', 'v1.npz', 'v2.npz'}


class FailingSink:
    """Fails at the second clip of the rank that it is told."""

    def __init__(self, fails):
        self.fails, self.clips, self.closed = fails, 0, False

    def write(self, item, labels):
        self.clips += 1
        if self.fails and self.clips == 2:
            raise OSError(28, 'No space left on device', 'picture.jpg')

    def finish_video(self, video):
        pass

    def close(self):
        self.closed = True


def _test_in_one_of_two_ranks(rank, port, config, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_PORT=str(port))
    init_dist('pytorch', 'gloo')
    dataset = build_dataset(config, where='data.test')
    loader = build_test_loader(dataset, 0, rank, 2)
    said = []
    for failing in (1, 0):
        sink = FailingSink(rank == failing)
        with pytest.raises((OSError, OtherRankError)) as error:
            run_test(Thresholds(), dataset, loader, sinks=[sink], progress=False)
        said.append((type(error.value).__name__, sink.closed))
    said.append(gather_objects(rank))  # the ranks are in step
    (folder / f'rank{rank}').write_text(repr(said))
    close_dist()


def test_a_rank_that_fails_ends_the_others_too(data, tmp_path):
    port = free_port()
    config = dataset_config(data, test_size=2)
    ranks = [start(_test_in_one_of_two_ranks, rank, port, config, tmp_path) for rank in range(2)]
    for rank in ranks:
        rank.join(60)
        rank.kill()
    own, other = ('OSError', True), ('OtherRankError', True)
    assert (tmp_path / 'rank0').read_text() == repr([other, own, [0, 1]])
    assert (tmp_path / 'rank1').read_text() == repr([own, other, [0, 1]])


def test_clips_that_are_left_out_are_listed_and_nothing_scored_is_an_error(tmp_path, experiment, status, caplog):
    data = write_vspw(tmp_path / 'data', {'val': {'v0': 2, 'v1': 2}})
    bad = data / 'data' / 'v1' / 'origin' / '00000001.jpg'
    bad.write_bytes(b'')
    config = dataset_config(data, test_size=2, skip_bad_clips=True)
    dataset = build_dataset(config, where='data.val')
    get_logger().propagate = True
    run_test(Thresholds(), dataset, build_test_loader(dataset), progress=False)
    assert '1 clips were left out' in caplog.text and str(bad) in caplog.text
    bad.with_name('00000002.jpg').unlink()
    (data / 'data' / 'v0' / 'origin' / '00000001.jpg').write_bytes(b'')
    dataset = build_dataset(config, where='data.val')
    with pytest.raises(DataError, match='nothing was scored'):
        run_test(Thresholds(), dataset, build_test_loader(dataset), progress=False)
    file = tmp_path / 'tiny.py'
    file.write_text(CONFIG.format(root=ROOT, test=config))
    returned, (line,), out = status(file, experiment[1], '--work-dir', tmp_path / 'scores')
    assert returned == 1 and 'nothing was scored' in line and '2 clips were left out' in out


def test_bad_frame_is_named_and_finished_videos_stay(experiment, tmp_path):
    config = tmp_path / 'tiny.py'
    data = write_vspw(tmp_path / 'data', {'val': {'v0': 4, 'v1': 8}})
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(data, test_size=2)))
    bad = data / 'data' / 'v1' / 'origin' / '00000003.jpg'
    bad.write_bytes(bad.read_bytes()[:700])
    args = (config, experiment[1], '--work-dir', tmp_path, '--out', tmp_path / 'maps', '--show-dir', tmp_path / 'show')
    output = tool(*args, status=1)
    assert str(bad) in output and 'Traceback' not in output
    assert [path.name for path in (tmp_path / 'maps').iterdir()] == ['v0.npz']
    assert len(list((tmp_path / 'show' / 'v0').iterdir())) == 4

    output = tool(*args, '--gpu-collect', '--options', 'data.test.skip_bad_clips=True', ranks=2)
    assert '1 clips were left out' in output and str(bad) in output
    assert [row['frames'] for row in scores(tmp_path)['per_video']] == [4, 6]


def test_only_one_clip_is_in_memory_and_the_mode_is_put_back(data):
    dataset = build_dataset(dataset_config(data, test_size=4), where='data.test')
    model = Thresholds().train()
    summary = run_test(model, dataset, build_test_loader(dataset), progress=False)
    assert model.training and model.largest_batch == 4
    assert set(summary) == {'mIoU', 'mIoU_vspw', 'fwIoU', 'aAcc', 'mAcc', 'mDice', 'VC8', 'VC16'}
    by_frame = build_dataset(dataset_config(data, test_size=1), where='data.test')
    assert run_test(model, by_frame, build_test_loader(by_frame), progress=False) == summary


def test_validation_needs_masks(data):
    dataset = build_dataset(dataset_config(data, split='test'), where='data.val')
    with pytest.raises(DataError, match=r"'test'.* has no masks"):
        run_test(Thresholds(), dataset, build_test_loader(dataset))


def test_names_of_metrics(data):
    dataset = build_dataset(dataset_config(data), where='data.test')
    assert metrics_for(dataset, ['mIoU', 'VC4']).consistency.lengths == (4,)
    assert metrics_for(dataset, 'mIoU', min_frames=17).consistency.min_frames == 17
    optional = run_test(Thresholds(), dataset, build_test_loader(dataset), metrics=metrics_for(dataset, ['VEC4', 'TC']))
    assert 0 <= optional['VEC4'] < 1 and 0 < optional['TC'] < 1
    assert metrics_for(dataset, None).consistency.lengths == (8, 16)
    for names, message in ((['VC1'], "'VC1' is not known"), ('VC' + 5000 * '9', 'is not known'), (5, 'got 5'),
                           ([None], 'expected a name')):
        with pytest.raises(ConfigError, match=message):
            metrics_for(dataset, names)
    for options in (dict(min_frames='x'), dict(last_window='maybe'), dict(remap_void=2)):
        with pytest.raises(ConfigError, match=next(iter(options))):
            metrics_for(dataset, **options)


@pytest.mark.parametrize('name', ['results.npz', 'results.pkl', 'results'])
def test_forms_of_out(data, tmp_path, name):
    dataset = build_dataset(dataset_config(data, test_size=3), where='data.test')
    out = tmp_path / name
    sink = VideoFiles(out if name == 'results' else f'{out}.parts')
    stream_test(Thresholds(), dataset, build_test_loader(dataset), sinks=[sink], progress=False)
    join_parts(out, [video.name for video in dataset.videos])
    names = [(video.name, frame) for video in dataset.videos for frame in video.frames]
    if name.endswith('.pkl'):
        maps = pickle.loads(out.read_bytes())
        assert json.loads(out.with_suffix('.json').read_text()) == [f'{v}/{f}' for v, f in names]
    else:
        found = {(video, frame): labels for video, frame, labels in load_results(out)}
        maps = [found[key] for key in names]
    assert len(maps) == len(names) and not list(tmp_path.glob('*.parts'))
    single = build_dataset(dataset_config(data, test_size=1), where='data.test')
    for item, labels in zip((single[i] for i in range(len(single))), maps):
        want = Thresholds().eval().predict([item['img'][0][None]], [None], (60, 107))[0, 0]
        assert (labels == want.numpy()).all()


def test_load_results_refuses_other_files(tmp_path):
    (tmp_path / 'x.npz').write_bytes(b'no archive')
    with pytest.raises(DataError, match=r'x\.npz cannot be read'):
        list(load_results(tmp_path / 'x.npz'))
    with pytest.raises(DataError, match='expected a folder'):
        list(load_results(tmp_path / 'none'))


def test_hidden_files_are_no_results(tmp_path):
    np.savez(tmp_path / 'v1.npz', **{'00': np.zeros((2, 3), np.uint8)})
    (tmp_path / '._v1.npz').write_bytes(b'what a Mac adds')
    assert [(video, frame) for video, frame, _ in load_results(tmp_path)] == [('v1', '00')]


def test_results_come_in_natural_order(tmp_path):
    labels = np.zeros((2, 3), np.uint8)
    (tmp_path / 'city').mkdir()
    np.savez(tmp_path / 'v10.npz', frame_10=labels, frame_9=labels)
    np.savez(tmp_path / 'v9.npz', **{'10': labels, '9': labels.astype(np.int64)})
    np.savez(tmp_path / 'city' / 'v1.5.npz', **{'0': labels})
    names = [f'{video}/{frame}' for video, frame, _ in load_results(tmp_path)]
    assert names == ['city/v1.5/0', 'v9/9', 'v9/10', 'v10/frame_9', 'v10/frame_10']
    np.savez(tmp_path / 'all.npz', **dict.fromkeys(reversed(names), labels))
    assert [f'{video}/{frame}' for video, frame, _ in load_results(tmp_path / 'all.npz')] == names


@pytest.mark.parametrize('array', [np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3)), np.full((2, 3), 300), np.array(1)])
def test_an_array_that_is_no_label_map_is_named(tmp_path, array):
    np.savez(tmp_path / 'v.npz', **{'07': array})
    with pytest.raises(DataError, match=r'v\.npz cannot be read: 07: expected'):
        list(load_results(tmp_path))


@pytest.mark.parametrize('seed', range(40))
def test_a_damaged_archive_is_a_data_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    np.savez_compressed(tmp_path / 'v.npz', **{'07': rng.integers(0, 9, (9, 9), np.uint8)})
    content = bytearray((tmp_path / 'v.npz').read_bytes())
    for at in rng.integers(0, len(content), 3):
        content[at] ^= 1 << rng.integers(8)
    (tmp_path / 'v.npz').write_bytes(content)
    try:
        list(load_results(tmp_path))
    except DataError as error:
        assert 'v.npz' in str(error)


@pytest.mark.parametrize('slip', ['model.test_cfg.strides', 'model.decode_head.loss_cfg.warmup_iter'])
def test_a_slip_is_named_before_data_and_checkpoint_are_read(tmp_path, here, slip):
    config = tmp_path / 'tiny.py'
    config.write_text(CONFIG.format(root=ROOT, test=dataset_config(tmp_path / 'no_data')))
    with pytest.raises(ConfigError, match=f'{slip}: '):
        here(config, 'gone.pth', '--options', f'{slip}=1')


def test_a_part_that_cannot_be_built_without_memory_is_left_to_its_real_building():
    class Own(nn.Module):
        def __init__(self, width=3):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(width)).sum().item()  # meta tensors have no values

    check_model(Config({'model': {'type': Own}}))
    with pytest.raises(ConfigError, match=r"model.widht: .*did you mean 'width'"):
        check_model(Config({'model': {'type': Own, 'widht': 3}}))


@pytest.mark.parametrize('code, ends', [(errno.ENOSPC, True), (errno.EACCES, False), (errno.EROFS, False)])
def test_metrics_beside_a_checkpoint_are_lost_to_a_full_disk_never_in_silence(monkeypatch, caplog, code, ends):
    """A folder of models may be read-only, and nobody has asked for a file there; a full disk is an error."""

    def refuse(path, content):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(test_tool, 'write_atomically', refuse)
    args = parse_args(['config.py', 'x.pth'])
    results = StreamingMetrics(2, consistency=None).results()
    outcome = test_tool.TestOutcome(results=results, skipped=[], frames=1, seconds=1.0)
    with pytest.raises(OSError, match='space') if ends else contextlib.nullcontext():
        test_tool.write_metrics(args, outcome, Path('x.pth'))
    assert ('not written beside the checkpoint' in caplog.text) is not ends
