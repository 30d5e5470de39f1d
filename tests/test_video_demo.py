"""The video tool: every input and output on real files, interruption, and memory that does not grow."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmseg.apis import init_segmentor
from mmseg.apis.video_io import VideoWriter, open_source
from tests.test_video_io import FakeCamera
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
    assert demo(write_input(tmp_path / 'street.mp4', 3)) == 0
    assert len(list(open_source(tmp_path / 'street_themask.mp4'))) == 3
    (tmp_path / 'all_broken').mkdir()
    (tmp_path / 'all_broken' / 'a.jpg').write_bytes(b'\xff\xd8')
    capsys.readouterr()
    for args, message in ((('nowhere',), 'no file, folder'), (('street.mp4', '--overlap', 9), 'overlap'),
                          (('street.mp4', '--opacity', 2), 'opacity'), (('all_broken',), 'no frame could be read')):
        assert demo(*args) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_a_file_that_plays(model, tmp_path, number):
    source = write_input(tmp_path / 'long.mp4', 3000)
    out = tmp_path / 'out.mp4'
    with (tmp_path / 'errors.txt').open('w') as file:
        running = subprocess.Popen(
            command('video_demo', *model[:2], source, '--out', out, '--json', tmp_path / 's.json', '--clip-len', 1),
            cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=file)
    try:
        # A fragment is written for every key frame; a killed process leaves those that are on disk.
        enough = 30_000 if number == signal.SIGKILL else 0
        deadline = time.monotonic() + 200
        while not (out.exists() and out.stat().st_size > enough):
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / 'errors.txt').read_text()
            time.sleep(0.05)
        running.send_signal(number)
        running.wait(90)
    finally:
        running.kill()
    errors = (tmp_path / 'errors.txt').read_text()
    frames = list(open_source(out))
    if number == signal.SIGKILL:
        assert len(frames) > 40
    else:
        assert running.returncode == 130, errors
        summary = json.loads((tmp_path / 's.json').read_text())
        assert summary['interrupted'] and len(frames) == summary['frames'] and 0 < len(frames) < 3000
        assert 'Traceback' not in errors


def peak_memory(model, source, out):
    done = run_tool('video_demo', *model[:2], source, '--out', out / 'out.mp4', '--json', out / 's.json')
    assert done.returncode == 0, done.stderr
    return json.loads((out / 's.json').read_text())


@pytest.mark.parametrize(('size', 'short', 'long'), [
    ((120, 160), 60, 240),
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
