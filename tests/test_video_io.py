"""Frames in and out: every kind of source, damage, odd and turned sizes, and files that play."""

from __future__ import annotations

import itertools
import threading
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest

from mmseg.apis import video_io
from mmseg.apis.video_io import Background, VideoWriter, open_source, prefetch
from mmseg.utils.errors import DataError

av = pytest.importorskip('av')


def picture(index, height=48, width=64):
    """Smooth, so that coding keeps it, and grey of a value that tells the index."""
    image = np.full((height, width, 3), 20 + 10 * (index % 20), np.uint8)
    image[: height // 4, : width // 4] = 250
    return image


def write_video(path, frames=12, fps=Fraction(25), height=48, width=64, times=None, time_base=None):
    writer = VideoWriter(path, fps, time_base)
    for i in range(frames):
        writer.write(picture(i, height, width), times[i] if times else i / fps)
    writer.close()
    return path


def index_of(image):
    return round((float(image[-8:, -8:].mean()) - 20) / 10)


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov'])
@pytest.mark.parametrize('size', [(48, 64), (61, 33), (47, 96)])
def test_a_written_video_is_read_again(tmp_path, suffix, size):
    path = write_video(tmp_path / f'video{suffix}', 12, Fraction(30000, 1001), *size)
    source = open_source(path)
    frames = list(source)
    assert [index_of(frame.image) for frame in frames] == list(range(12))
    assert [frame.index for frame in frames] == list(range(12))
    assert frames[0].image.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert abs(float(source.fps) - 29.97) < 0.01 and source.num_frames == 12 and not source.broken
    assert abs(frames[11].time - 11 * Fraction(1001, 30000)) < Fraction(1, 900)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == 'h264'
        assert container.streams.video[0].codec_context.pix_fmt == 'yuv420p'


def test_times_of_a_varying_rate_are_kept_and_a_given_rate_replaces_them(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 40, 200, 230, 1000, 1001)]
    path = write_video(tmp_path / 'v.mp4', 6, Fraction(10), times=times, time_base=Fraction(1, 1000))
    assert [frame.time for frame in open_source(path)] == times
    assert [frame.time for frame in open_source(path, 5)] == [Fraction(i, 5) for i in range(6)]


def test_times_that_do_not_rise_are_moved(tmp_path):
    path = write_video(tmp_path / 'v.mp4', 4, Fraction(10), times=[Fraction(t, 10) for t in (0, 0, 0, 5)])
    assert len(list(open_source(path))) == 4


@pytest.mark.parametrize('rotation', [90, -90, 180])
def test_a_turned_video_stands_upright(tmp_path, rotation):
    with av.open(str(tmp_path / 'phone.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
        if not hasattr(stream, 'set_display_rotation'):
            pytest.skip('this PyAV cannot write a rotation')
        stream.set_display_rotation(rotation)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0), format='bgr24')))
        container.mux(stream.encode(None))
    image = next(iter(open_source(tmp_path / 'phone.mp4'))).image
    stored = picture(0)
    assert np.abs(image.astype(int) - np.rot90(stored, rotation // 90)).mean() < 4


def write_frames(folder, names, size=(20, 30)):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), picture(i, *size))


def test_folders_and_patterns_in_natural_order(tmp_path):
    names = ['f1.png', 'f2.png', 'f10.png', 'f11.jpg']
    write_frames(tmp_path / 'clip', names)
    (tmp_path / 'clip' / '.hidden.png').write_bytes(b'')
    (tmp_path / 'clip' / 'notes.txt').write_text('no frame')
    source = open_source(tmp_path / 'clip', 7.5)
    assert [frame.name for frame in source] == ['f1', 'f2', 'f10', 'f11']
    assert source.name == 'clip' and source.fps == Fraction(15, 2) and source.num_frames == 4
    pattern = open_source(f'{tmp_path}/clip/*.png')
    assert [(f.name, f.time) for f in pattern] == [('f1', 0), ('f2', Fraction(1, 15)), ('f10', Fraction(2, 15))]


def test_broken_images_are_named_and_keep_their_time(tmp_path, caplog):
    write_frames(tmp_path / 'clip', [f'{i}.jpg' for i in range(6)])
    whole = (tmp_path / 'clip' / '1.jpg').read_bytes()
    (tmp_path / 'clip' / '1.jpg').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'clip' / '2.jpg').write_bytes(b'')
    cv2.imwrite(str(tmp_path / 'clip' / '4.jpg'), picture(4, 30, 20))
    source = open_source(tmp_path / 'clip', 10)
    frames = list(source)
    assert [(f.name, f.index, f.time * 10) for f in frames] == [('0', 0, 0), ('3', 3, 3), ('5', 5, 5)]
    assert source.broken == 3
    for name, why in (('1.jpg', 'truncated'), ('2.jpg', 'empty'), ('4', 'it is 20x30')):
        assert any(name in text and why in text for text in source.broken_names), name


def test_a_damaged_video_goes_on_after_the_damage(tmp_path):
    path = tmp_path / 'v.mkv'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mjpeg', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuvj420p'
        for i in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format='bgr24')))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    start = [i for i in range(len(data) - 1) if data[i : i + 2] == b'\xff\xd8'][4]
    end = data.index(b'\xff\xd9', start)
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    source = open_source(path)
    frames = list(source)
    assert [f.index for f in frames] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [index_of(f.image) for f in frames] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert source.broken == 1 and '000004' in source.broken_names[0]


def test_a_video_that_is_cut_off_gives_what_is_there(tmp_path):
    path = write_video(tmp_path / 'v.mkv', 300)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = list(open_source(path))
    assert 50 < len(frames) < 300 and [f.index for f in frames] == list(range(len(frames)))


def test_sources_that_are_none(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.mp4').write_text('no video')
    for source, message in (('nowhere', 'no file, folder'), (tmp_path / 'empty', 'no images'),
                            (f'{tmp_path}/*.png', 'no images'), (tmp_path / 'text.mp4', 'cannot be opened'),
                            (97, 'camera 97')):
        with pytest.raises(DataError, match=message):
            open_source(source)
    with pytest.raises(DataError, match='positive'):
        open_source(tmp_path / 'empty', 0)


class FakeCamera:
    """Stands for cv2.VideoCapture: five frames, of which the third fails, then nothing."""

    def __init__(self, number):
        self.left = iter([0, 1, None, 3, 4])
        self.settings = {}
        self.released = False

    def isOpened(self):
        return True

    def set(self, key, value):
        self.settings[key] = value

    def get(self, key):
        return self.settings.get(key, 0)

    def read(self):
        index = next(self.left, None)
        return (False, None) if index is None else (True, picture(index))

    def release(self):
        self.released = True


def test_camera(monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', FakeCamera)
    source = open_source('0', fps=4)
    assert source.live and source.num_frames is None and source.fps == 4
    frames = list(source)
    assert [frame.index for frame in frames] == [0, 1, 3, 4] and frames[0].time == 0
    assert source.broken == 1 + 8 and source._capture.released


def test_prefetch_forwards_items_errors_and_the_end():
    assert list(prefetch(range(100), 3)) == list(range(100))

    def failing():
        yield 1
        raise DataError('in the thread')

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(DataError, match='in the thread'):
        next(items)


def test_prefetch_reads_no_more_than_its_depth_and_stops():
    taken = []
    closed = threading.Event()

    def items():
        try:
            for i in itertools.count():
                taken.append(i)
                yield i
        finally:
            closed.set()

    running = prefetch(items(), 3)
    assert next(running) == 0
    time.sleep(0.3)
    assert len(taken) <= 1 + 3 + 2
    running.close()
    assert closed.is_set() and not any(thread.name == 'prefetch' for thread in threading.enumerate())


def test_prefetch_of_the_newest_drops_old_items():
    release = threading.Event()

    def items():
        yield 0
        release.wait(5)
        yield from range(1, 50)

    running = prefetch(items(), 2, newest=True)
    assert next(running) == 0
    release.set()
    time.sleep(0.3)
    rest = list(running)
    assert rest[-1] == 49 and len(rest) <= 3


def test_background_keeps_order_and_raises_what_went_wrong():
    done = []
    thread = Background(done.append, 2)
    for i in range(50):
        thread.put(i)
    thread.close()
    assert done == list(range(50))

    def fail(_):
        raise OSError('disk full')

    thread = Background(fail, 2)
    with pytest.raises(OSError, match='disk full'):
        for i in range(1000):
            thread.put(i)
    thread.close()
    thread = Background(fail, 2)
    thread.put(1)
    with pytest.raises(OSError, match='disk full'):
        thread.close()


def test_without_av_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'av', None)
    with pytest.raises(DataError, match=r'themask\[video\]'):
        video_io.import_av()
