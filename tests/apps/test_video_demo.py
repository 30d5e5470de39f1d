"""The video tool: every input and output on real files, interruption, and memory that does not grow."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmseg.apis import init_segmentor
from mmseg.apps.video_io import VideoWriter, open_source
from mmseg.utils.errors import DataError
from tests.apps.test_video_io import FakeCamera, files_of_at_most
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, command, environment, run_tool
from tests.vspw_fixture import write_vspw

pytest.importorskip('av')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Config and checkpoint of a tiny model, and a folder of frames."""
    root = tmp_path_factory.mktemp('demo')
    data = write_vspw(root / 'vspw', {'val': {'v0': 7}, 'train': {'a': 3}, 'test': {'t': 1}})
    config = write_tiny_config(root / 'config.py', data, base='video_themask_mit_b0')
    torch.manual_seed(0)
    torch.save({'meta': {}, 'state_dict': init_segmentor(config).state_dict()}, root / 'model.pth')
    return config, root / 'model.pth', data / 'data' / 'v0' / 'origin'


def write_input(path, frames, fps=Fraction(24), height=61, width=33):
    writer = VideoWriter(path, fps)
    background = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (width, height))
    for i in range(frames):
        writer.write(np.roll(background, 3 * i, axis=1), i / fps)
    writer.close()
    return path


@pytest.fixture
def demo(model, monkeypatch):
    """Runs the tool in this process; for many combinations of input and output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several that wait for each other on a busy machine take minutes for these small frames
    spec = importlib.util.spec_from_file_location('video_demo', ROOT / 'tools' / 'video_demo.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['video_demo.py', str(model[0]), str(model[1]), *map(str, args)])
        return tool.main()

    yield run
    torch.set_num_threads(threads)


def test_as_a_process(model, tmp_path):
    source = write_input(tmp_path / 'portrait.mp4', 20)
    done = run_tool('video_demo', *model[:2], source, '--out', tmp_path / 'out.mp4', '--view', 'side-by-side',
                    '--legend', '--labels', tmp_path / 'labels', '--json', tmp_path / 'summary.json')
    assert done.returncode == 0, done.stderr
    assert 'frame 20/20' in done.stderr and 'frames/s' in done.stderr
    read = open_source(tmp_path / 'out.mp4')
    frames = list(read)
    assert len(frames) == 20 and read.fps == 24 and frames[0].image.shape[1] == 2 * 34
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['frames'] == 20 and summary['broken'] == 0 and not summary['interrupted']
    names = sorted(path.name for path in (tmp_path / 'labels').iterdir())
    assert names == [f'{i:06d}.png' for i in range(20)]
    with Image.open(tmp_path / 'labels' / names[0]) as image:
        assert image.mode == 'P' and image.size == (34, 62) and np.array(image).max() < 124
    assert 'examples:' in run_tool('video_demo', '--help').stdout


def test_folder_to_pictures_and_pattern_to_video(model, demo, tmp_path):
    folder = model[2]
    names = sorted(path.stem for path in folder.iterdir())
    assert demo(folder, '--out', tmp_path / 'pictures', '--image-format', 'png', '--view', 'labels') == 0
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == [f'{name}.png' for name in names]
    assert demo(f'{folder}/*.jpg', '--fps', 12.5, '--out', tmp_path / 'out.mkv', '--clip-len', 2, '--overlap', 1,
                '--stride', 1) == 0
    read = open_source(tmp_path / 'out.mkv')
    assert len(list(read)) == 7 and read.fps == Fraction(25, 2)


def test_camera_online_and_a_limit(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', FakeCamera)
    assert demo('0', '--online', '--clip-len', 2, '--out', tmp_path / 'out.mp4', '--max-frames', 3) == 0
    assert 1 <= len(list(open_source(tmp_path / 'out.mp4'))) <= 3


def test_a_broken_frame_is_skipped_and_reported(model, demo, tmp_path):
    for i, path in enumerate(sorted(model[2].iterdir())):
        data = path.read_bytes()
        (tmp_path / 'in').mkdir(exist_ok=True)
        (tmp_path / 'in' / path.name).write_bytes(data[:50] if i == 3 else data)
    assert demo(tmp_path / 'in', '--labels', tmp_path / 'labels', '--json', tmp_path / 's.json', '--out',
                tmp_path / 'out.mp4') == 0
    summary = json.loads((tmp_path / 's.json').read_text())
    assert summary['frames'] == 6 and summary['broken'] == 1 and 'truncated' in summary['broken_names'][0]
    assert len(list((tmp_path / 'labels').iterdir())) == 6
    times = [round(frame.time * 15) for frame in open_source(tmp_path / 'out.mp4')]
    assert times == [0, 1, 2, 4, 5, 6], 'the others keep their time'


def test_the_default_output_and_one_line_errors(model, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert demo(write_input(tmp_path / 'street.mp4', 3)) == 0
    assert len(list(open_source(tmp_path / 'street_themask.mp4'))) == 3
    (tmp_path / 'all_broken').mkdir()
    (tmp_path / 'all_broken' / 'a.jpg').write_bytes(b'\xff\xd8')
    capsys.readouterr()
    for args, message in ((('nowhere',), 'no file, folder'), (('street.mp4', '--overlap', 9), 'overlap'),
                          (('street.mp4', '--opacity', 2), 'opacity'), (('all_broken',), 'no frame could be read'),
                          (('street.mp4', '--fps', 'nan'), 'positive number, got nan'),
                          (('street.mp4', '--fps', 'inf'), 'positive number, got inf'),
                          (('street.mp4', '--fps', 0), 'positive number, got 0'),
                          (('street.mp4', '--fps', -1), 'positive number, got -1'),
                          (('street.mp4', '--max-frames', 0), '--max-frames: expected at least 1, got 0'),
                          (('street.mp4', '--crf', 99), 'crf: expected 0 (lossless) to 51, got 99'),
                          (('street.mp4', '--out', 'o.wmv'), "o.wmv: '.wmv' cannot be written"),
                          (('street.mp4', '--device', 'gpu'), "got 'gpu'")):
        before = sorted(os.listdir())
        assert demo(*args) == 1
        errors = capsys.readouterr().err
        assert message in errors and errors.count('error: ') == 1 and 'Traceback' not in errors
        assert sorted(os.listdir()) == before
    assert demo('street.mp4', '--max-frames', 1, '--out', 'o.v1/', '--labels', '~/l') == 0
    assert os.listdir('o.v1') == ['000000.jpg']
    assert os.listdir(tmp_path / 'l') == ['000000.png']


@pytest.fixture
def inputs(model, tmp_path, monkeypatch):
    """A folder with a video, frames and links to them."""
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / 'in.mp4', 3)
    shutil.copy('in.mp4', 'half.part.mp4')
    for folder, suffix, frames in (('jpg', 'jpg', 2), ('png', 'png', 2), ('six', 'png', 6)):
        (tmp_path / folder).mkdir()
        for i in range(frames):
            cv2.imwrite(f'{folder}/{i}.{suffix}', np.full((32, 32, 3), 9 * i, np.uint8))
    for name, target in (('link.mp4', 'in.mp4'), ('png_link', 'png')):
        os.symlink(target, name)
    os.link('in.mp4', 'hard.mp4')
    (tmp_path / 'farm').mkdir()
    for i in range(2):
        os.symlink(f'../png/{i}.png', f'farm/{i}.png')
    return tmp_path


@pytest.mark.parametrize('arguments', [
    'in.mp4 --out in.mp4',
    'in.mp4 --out link.mp4',
    'link.mp4 --out in.mp4',
    'in.mp4 --out hard.mp4',
    'in.mp4 --json in.mp4',
    'half.part.mp4 --out half.mp4',
    'jpg --out jpg',
    'jpg --out ./jpg/',
    'jpg/*.jpg --out jpg',
    'jpg --json jpg/0.jpg',
    'png --labels png',
    'png_link --labels png',
    'png --out png_link --image-format png',
    'farm --labels png',
    'in.mp4 --out new --labels new --image-format png',
    'in.mp4 --out new.mp4 --json new.mp4',
])  # fmt: skip
def test_no_output_overwrites_an_input_or_another_output(demo, inputs, capsys, arguments):
    files = {path: path.read_bytes() for path in inputs.rglob('*') if path.is_file()}
    assert demo(*arguments.split()) == 1
    assert 'would be overwritten' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in inputs.rglob('*') if path.is_file()} == files


def test_config_and_checkpoint_are_inputs_too(demo, model, inputs, capsys):
    for path in model[:2]:
        assert demo('in.mp4', '--json', path) == 1
        assert 'would be overwritten' in capsys.readouterr().err


def test_frames_that_differ_in_their_suffix_have_outputs_of_their_own(demo, inputs):
    shutil.copy('png/0.png', 'jpg/0.png')
    assert demo('jpg', '--out', 'out', '--labels', 'labels') == 0
    assert sorted(os.listdir('out')) == ['0.jpg.jpg', '0.png.jpg', '1.jpg.jpg']
    assert sorted(os.listdir('labels')) == ['0.jpg.png', '0.png.png', '1.jpg.png']


@pytest.mark.parametrize('output', ['--out=o.mp4', '--out=o.mkv', '--out=o', '--labels=o'])
def test_a_full_disk_is_one_line(demo, inputs, capsys, output):
    rng = np.random.default_rng(0)
    (inputs / 'noise').mkdir()
    for i in range(24):
        cv2.imwrite(f'noise/{i}.jpg', rng.integers(0, 256, (64, 64, 3), np.uint8))
    assert demo('jpg', '--labels', 'labels') == 0  # builds native code, if need be
    capsys.readouterr()
    with files_of_at_most(100):
        assert demo('noise', output, '--image-format=png') == 1
    errors = capsys.readouterr().err
    assert 'File too large' in errors and errors.count('error: ') == 1 and 'Traceback' not in errors
    assert not [name for name in ('o.mp4', 'o.mkv') if os.path.exists(name)]
    assert not os.path.isdir('o') or not os.listdir('o')


def test_a_video_that_an_error_ends_keeps_the_name_of_an_unfinished_one(demo, inputs, monkeypatch, capsys):
    shutil.copy('in.mp4', 'out.mp4')
    before = (inputs / 'out.mp4').read_bytes()

    def fail(*_):
        raise DataError('an error in the middle')

    monkeypatch.setattr(VideoWriter, '_fitted', lambda self, image: image if self._frames < 4 else fail())
    assert demo('six', '--out', 'out.mp4') == 1
    assert 'an error in the middle' in capsys.readouterr().err
    assert (inputs / 'out.mp4').read_bytes() == before
    assert len(list(open_source('out.part.mp4'))) == 4


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_whose_input_has_stalled(demo, inputs, monkeypatch, number, capsys):
    monkeypatch.setattr('mmseg.apps.video_io._PATIENCE', 0.1)
    os.mkfifo('six/6.png')

    def interrupt():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if (inputs / 'labels' / '3.png').exists():
                return os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert demo('six', '--online', '--out', 'out.mp4', '--labels', 'labels', '--json', 's.json') == 128 + number
    finally:
        with open('six/6.png', 'wb'):  # lets the thread that reads it end
            pass
    frames = len(list(open_source('out.mp4')))
    assert json.loads((inputs / 's.json').read_text())['interrupted'] and frames == len(os.listdir('labels')) >= 4
    assert 'interrupted' in capsys.readouterr().out


@pytest.mark.parametrize('number', [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_run_leaves_a_file_that_plays(model, tmp_path, number):
    source = write_input(tmp_path / 'long.mp4', 3000)
    out = tmp_path / 'out.mp4'
    part = tmp_path / 'out.part.mp4'
    with (tmp_path / 'errors.txt').open('w') as file:
        running = subprocess.Popen(
            command('video_demo', *model[:2], source, '--out', out, '--labels', tmp_path / 'labels', '--json',
                    tmp_path / 's.json', '--clip-len', 1), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
            stderr=file)  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / 'labels' / '000100.png').exists():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / 'errors.txt').read_text()
            time.sleep(0.05)
        running.send_signal(number)
        running.wait(90)
    finally:
        running.kill()
    errors = (tmp_path / 'errors.txt').read_text()
    labelled = len(list((tmp_path / 'labels').glob('*.png')))
    if number == signal.SIGKILL:
        assert not out.exists() and labelled - 48 <= len(list(open_source(part))) <= labelled + 1, 'two seconds at most'
    else:
        assert running.returncode == 128 + number, errors
        summary = json.loads((tmp_path / 's.json').read_text())
        assert not part.exists() and summary['interrupted']
        assert len(list(open_source(out))) == summary['frames'] == labelled < 3000
        assert 'Traceback' not in errors


def peak_memory(model, source, out):
    done = run_tool('video_demo', *model[:2], source, '--out', out / 'out.mp4', '--json', out / 's.json')
    assert done.returncode == 0, done.stderr
    return json.loads((out / 's.json').read_text())


@pytest.mark.parametrize(('size', 'short', 'long'), [
    pytest.param((120, 160), 60, 240, marks=pytest.mark.slow),
    pytest.param((480, 854), 300, 3000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
])
def test_memory_does_not_grow(model, tmp_path, size, short, long):
    peaks = {}
    for frames in (short, long):
        summary = peak_memory(model, write_input(tmp_path / f'{frames}.mp4', frames, Fraction(25), *size), tmp_path)
        assert summary['frames'] == frames == len([1 for _ in open_source(tmp_path / 'out.mp4')])
        peaks[frames] = summary['peak_memory_mib']
    print(f'peak memory in MiB by frames: {peaks}')
    assert peaks[long] <= 1.1 * peaks[short], peaks
