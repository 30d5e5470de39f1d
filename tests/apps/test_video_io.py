"""Frames in and out: every kind of source, damage, odd and turned sizes, and files that play."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import threading
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest

from mmseg.apps import video_io
from mmseg.apps.video_io import Background, Display, VideoWriter, open_source, part_of, prefetch
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.signals import Interrupted
from mmseg.utils.visual import write_picture

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


@pytest.mark.parametrize('name, encoder', [
    ('v.MP4', 'h264'), ('v.m4v', 'h264'), ('v.Mkv', 'h264'), ('v.avi', 'h264'), ('v.ts', 'h264'), ('v.webm', 'vp9'),
    ('v.gif', 'gif')])  # fmt: skip
def test_every_container_is_written(tmp_path, name, encoder):
    path = write_video(tmp_path / name, 8, Fraction(10), 47, 64)
    frames = list(open_source(path))
    assert [index_of(frame.image) for frame in frames] == list(range(8))
    assert [round(10 * frame.time) for frame in frames] == list(range(8))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == encoder


@pytest.mark.parametrize('name', ['v.mp4', 'v.mkv', 'v.mov', 'v.webm'])
def test_the_first_frame_is_shown_at_once(tmp_path, name):
    with av.open(str(write_video(tmp_path / name, 40))) as container:
        first = next(container.decode(video=0))
    assert first.pts == 0


@pytest.mark.parametrize('name', ['v.wmv', 'v.jpg', 'v.v1'])
def test_a_suffix_that_cannot_be_written_makes_no_folder(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot be written; a video is one of \.mp4, .*\.gif"):
        VideoWriter(tmp_path / name, Fraction(25))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('crf', [-1, 52, 99])
def test_a_quality_that_does_not_exist(tmp_path, crf):
    with pytest.raises(ConfigError, match=f'0 .lossless. to 51, got {crf}'):
        VideoWriter(tmp_path / 'v.mp4', Fraction(25), crf=crf)
    assert not list(tmp_path.iterdir())


def test_a_video_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / 'v.mp4'
    path.write_bytes(b'of the user')
    for frames, whole in ((0, True), (0, False), (3, False), (3, True)):
        writer = VideoWriter(path, Fraction(25))
        for i in range(frames):
            writer.write(picture(i), Fraction(i, 25))
        assert path.read_bytes() == b'of the user' and (tmp_path / 'v.part.mp4').exists()
        writer.close(whole)
        assert (tmp_path / 'v.part.mp4').exists() == (frames > 0 and not whole)
        assert (path.read_bytes() == b'of the user') != (frames > 0 and whole)
    assert len(list(open_source(path))) == 3


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov', '.webm', '.avi', '.ts', '.gif'])
@pytest.mark.parametrize('fps, frames', [(25, 130), (1, 12), (15, 100), (60, 200), (14, 60), ('live', 12)])
def test_a_kill_loses_less_than_two_seconds(tmp_path, suffix, fps, frames):
    path = tmp_path / f'v{suffix}'
    writer = VideoWriter(path, Fraction(30 if fps == 'live' else fps), Fraction(1, 1000), live=fps == 'live')
    fps = Fraction(2 if fps == 'live' else fps)
    if suffix == '.avi' and fps == 2:
        pytest.skip('AVI has no times')
    for i in range(frames):
        writer.write(picture(0), i / fps)  # the same picture: a few bytes a frame
        if i % 37 == 36 or i == frames - 1:
            shutil.copy(part_of(path), tmp_path / f'copy{suffix}')
            try:
                left = len(list(open_source(tmp_path / f'copy{suffix}')))
            except DataError:  # nothing is in it yet
                left = 0
            assert (i + 1 - left) / fps <= 2, f'{left} of {i + 1} frames are left'
    writer.close()


@contextlib.contextmanager
def files_of_at_most(size):
    """Stands for a full disk: a longer write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_noise(path, frames):
    rng = np.random.default_rng(0)
    writer = VideoWriter(path, Fraction(25))
    whole = False
    try:
        for i in range(frames):
            writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8), Fraction(i, 25))
        whole = True
    finally:
        writer.close(whole)


@pytest.mark.parametrize('name', ['v.mp4', 'v.mkv', 'v.mov', 'v.avi', 'v.webm', 'v.gif', 'v.ts'])
def test_a_full_disk_is_an_error_that_keeps_what_was_written(tmp_path, name, caplog):
    (tmp_path / name).write_bytes(b'of the user')
    with files_of_at_most(150_000), pytest.raises(OSError, match=rf'v\.part{name[1:]}') as error:
        write_noise(tmp_path / name, 400)
    assert error.value.filename == str(tmp_path / f'v.part{name[1:]}')
    assert (tmp_path / name).read_bytes() == b'of the user'
    assert name == 'v.avi' or len(list(open_source(tmp_path / f'v.part{name[1:]}'))) > 10


@pytest.mark.parametrize('name', ['v.mp4', 'v.mkv', 'v.avi', 'v.webm', 'v.gif'])
@pytest.mark.parametrize('frames', [1, 30])
def test_a_disk_without_any_room(tmp_path, name, frames):
    part_of(tmp_path / name).symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left'):
        write_noise(tmp_path / name, frames)
    assert not (tmp_path / name).exists()


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('no folder')
    with pytest.raises(OSError, match='file'):
        VideoWriter(tmp_path / 'file' / 'v.mp4', Fraction(25))
    with pytest.raises(OSError, match='/proc'):
        VideoWriter('/proc/v.mp4', Fraction(25))


def test_a_picture_that_is_too_large_to_encode(tmp_path):
    writer = VideoWriter(tmp_path / 'v.mp4', Fraction(25))
    with pytest.raises(DataError, match=r'v\.mp4: a picture of 17000x2 cannot be written'):
        writer.write(np.zeros((2, 17000, 3), np.uint8), Fraction(0))
    writer.close(False)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def stream_of(path, codec='libx264', pix_fmt='yuv420p', size=(48, 64), rotation=None, options=None, **tags):
    """A function that adds a picture or frame to a video that PyAV itself writes."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = size, pix_fmt
        if rotation is not None and not hasattr(stream, 'set_display_rotation'):
            pytest.skip('this PyAV cannot write a rotation')
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for key, value in tags.items():
            setattr(stream.codec_context, key, value)

        def add(frame):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format='bgr24')
            container.mux(stream.encode(frame))

        yield add
        add(None)


def write_red(path, size, matrix, value_range, tags):
    """A red video: converted with ``matrix``, tagged with ``tags`` alone."""
    red = np.full((*size, 3), RED, np.uint8)
    with stream_of(path, size=size, options={'crf': '1'}, **tags) as add:
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(red, format='bgr24').reformat(
                format='yuv420p', src_colorspace=5, dst_colorspace={6: 5}.get(matrix, matrix),
                dst_color_range=value_range)
            frame.colorspace, frame.color_range = 2, 0
            add(frame)
    return path


RED = [20, 30, 220]


@pytest.mark.parametrize('size, tags, matrix', [
    ((48, 64), {}, 6),
    ((720, 1280), {}, 1),
    ((48, 64), dict(colorspace=1), 1),
    ((48, 64), dict(colorspace=9, color_primaries=9, color_trc=14), 9),
    ((720, 1280), dict(colorspace=5), 5),
    ((48, 64), dict(colorspace=6, color_range=2), 6),
    ((48, 64), dict(colorspace=1, color_range=2, sample_aspect_ratio=Fraction(4, 3)), 1),
])  # fmt: skip
def test_colours_and_pixel_aspect_go_through(tmp_path, size, tags, matrix):
    source = open_source(write_red(tmp_path / 'in.mp4', size, matrix, tags.get('color_range', 1), tags))
    frames = list(source)
    assert np.abs(frames[0].image.astype(int) - RED).max() <= 4
    for name in ('out.mp4', 'out.mkv', 'out.webm'):
        writer = VideoWriter(tmp_path / name, source.fps, source.time_base, 1, source.display)
        for frame in frames:
            writer.write(frame.image, frame.time)
        writer.close()
        with av.open(str(tmp_path / name)) as container:
            stream = container.streams.video[0]
            shown = stream.width * (stream.sample_aspect_ratio or 1) / stream.height
            assert abs(shown - size[1] * tags.get('sample_aspect_ratio', 1) / size[0]) < 0.03
            codec = stream.codec_context
            if name != 'out.webm':
                assert (codec.colorspace, codec.color_range) == (matrix, tags.get('color_range', 1))
                assert codec.color_primaries == tags.get('color_primaries', 2)
                assert codec.color_trc == tags.get('color_trc', 2)
        again = next(iter(open_source(tmp_path / name))).image
        assert np.abs(again.astype(int) - RED).max() <= 8, name  # converted twice


@pytest.mark.parametrize('size, matrix', [((48, 64), 6), ((720, 1280), 1)])
def test_pictures_become_a_tagged_video(tmp_path, size, matrix):
    writer = VideoWriter(tmp_path / 'v.mp4', Fraction(10), crf=1)
    writer.write(np.full((*size, 3), RED, np.uint8), Fraction(0))
    writer.close()
    with av.open(str(tmp_path / 'v.mp4')) as container:
        assert container.streams.video[0].codec_context.colorspace == matrix
        frame = next(container.decode(video=0))
        assert frame.colorspace == matrix and frame.color_range == 1
    assert np.abs(next(iter(open_source(tmp_path / 'v.mp4'))).image.astype(int) - RED).max() <= 4


def test_a_motion_jpeg_has_the_full_range(tmp_path):
    with stream_of(tmp_path / 'v.avi', 'mjpeg', 'yuvj420p') as add:
        for value in (16, 235):  # black and white of the limited range
            add(np.full((48, 64, 3), value, np.uint8))
    source = open_source(tmp_path / 'v.avi')
    assert source.display.value_range == 2
    assert [frame.image.mean() for frame in source] == pytest.approx([16, 235], abs=4)


def test_cover_art_is_no_video(tmp_path):
    cover = np.zeros((32, 32, 3), np.uint8)
    with av.open(str(tmp_path / 'v.mkv'), 'w') as container:
        first, video = container.add_stream('mjpeg', rate=25), container.add_stream('libx264', rate=25)
        first.width, first.height, first.pix_fmt = 32, 32, 'yuvj420p'
        video.width, video.height, video.pix_fmt = 64, 48, 'yuv420p'
        container.mux(first.encode(av.VideoFrame.from_ndarray(cover, format='bgr24')))
        for i in range(9):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i), format='bgr24')))
        container.mux(video.encode(None))
    assert [index_of(frame.image) for frame in open_source(tmp_path / 'v.mkv')] == list(range(9))

    with av.open(str(tmp_path / 'song.mp4'), 'w') as container:
        audio, picture_stream = container.add_stream('aac', rate=44100), container.add_stream('mjpeg', rate=25)
        picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 32, 32, 'yuvj420p'
        picture_stream.disposition = 0x400
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        sound.rate = 44100
        container.mux(audio.encode(sound))
        container.mux(picture_stream.encode(av.VideoFrame.from_ndarray(cover, format='bgr24')))
        container.mux(audio.encode(None))
    with pytest.raises(DataError, match='holds no video stream'):
        open_source(tmp_path / 'song.mp4')


def test_times_of_a_varying_rate_are_kept_and_a_given_rate_replaces_them(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 40, 200, 230, 1000, 1001)]
    path = write_video(tmp_path / 'v.mp4', 6, Fraction(10), times=times, time_base=Fraction(1, 1000))
    assert [frame.time for frame in open_source(path)] == times
    smooth = write_video(tmp_path / 's.mp4', 6, Fraction(30), times=times, time_base=Fraction(1, 1000))
    assert [frame.time for frame in open_source(smooth)] == times
    assert [frame.time for frame in open_source(path, 5)] == [Fraction(i, 5) for i in range(6)]


def test_times_that_do_not_rise_are_moved(tmp_path):
    path = write_video(tmp_path / 'v.mp4', 4, Fraction(10), times=[Fraction(t, 10) for t in (0, 0, 0, 5)])
    assert len(list(open_source(path))) == 4


@pytest.mark.parametrize('rotation', [90, -90, 180])
def test_a_turned_video_stands_upright(tmp_path, rotation):
    with stream_of(tmp_path / 'phone.mp4', rotation=rotation, sample_aspect_ratio=Fraction(4, 3)) as add:
        for _ in range(3):
            add(picture(0))
    source = open_source(tmp_path / 'phone.mp4')
    assert np.abs(next(iter(source)).image.astype(int) - np.rot90(picture(0), rotation // 90)).mean() < 4
    assert source.display == Display(Fraction(4, 3) if rotation == 180 else Fraction(3, 4), 6)


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


@pytest.mark.parametrize('names, want', [
    (['0001.jpg', '0001.png', '2.png'], ['0001.jpg', '0001.png', '2.png']),
    (['a.png', 'A.jpg'], ['A.jpg', 'a.png']),
    (['a/0001.png', 'b/0001.png'], ['a/0001', 'b/0001']),
    (['10.png', '9.jpg', 'x.y.png'], ['9', '10', 'x.y']),
])  # fmt: skip
def test_frames_have_names_of_their_own(tmp_path, names, want):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), picture(names.index(name)))
    source = open_source(f'{tmp_path}/*/*.png' if '/' in names[0] else tmp_path)
    frames = list(source)
    assert [frame.name for frame in frames] == want
    for frame in frames:
        write_picture(tmp_path / 'out' / f'{frame.name}.png', frame.image)
    assert sum(len(files) for _, _, files in os.walk(tmp_path / 'out')) == len(names)


@pytest.mark.parametrize('name', ['a:b.mp4', 'file:c.mp4', 'http:x.mp4', 'pipe:0.mkv', '[1].mp4', '%03d.mp4', '~x.mp4'])
def test_a_file_is_read_and_written_under_its_exact_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(name, 3)
    assert os.listdir() == [name]
    assert len(list(open_source(name))) == 3


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / 'fr[1]', ['1.png', '2.png', '3.jpg'])
    write_frames(tmp_path / 'fr1', ['1.png'])
    patterns = [('fr[1]', 3), ('fr[1]/', 3), ('fr[1]/*.png', 2), (f'{tmp_path}/fr[1]/[12].png', 2), ('*/1.png', 2)]
    for source, want in patterns:
        assert len(list(open_source(source))) == want, source


def test_a_title_in_another_encoding_is_no_reason_to_refuse_a_video(tmp_path):
    with av.open(str(tmp_path / 'v.mkv'), 'w') as container:
        container.metadata['title'] = 'Strasse'
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0), format='bgr24')))
        container.mux(stream.encode(None))
    path = tmp_path / 'v.mkv'
    path.write_bytes(path.read_bytes().replace(b'Strasse', b'Stra\xdfe '))
    assert len(list(open_source(path))) == 1


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
    with stream_of(path, 'mjpeg', 'yuvj420p') as add:
        for i in range(10):
            add(picture(i))
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
    for fps in (0, -1, float('nan'), float('inf')):
        with pytest.raises(DataError, match=f'expected a positive number, got {fps}'):
            open_source(tmp_path / 'empty', fps)
    (tmp_path / 'empty' / '1.ppm').write_bytes(b'')
    with pytest.raises(DataError, match=r'no images .*; there is \.ppm'):
        open_source(tmp_path / 'empty')


@pytest.mark.parametrize('name', ['PatchWelcomeError', 'EOFError', 'UndefinedError', 'InvalidDataError'])
def test_any_error_of_pyav_is_a_data_error(tmp_path, monkeypatch, name):
    def refuse(*_args, **_kwargs):
        raise getattr(av.error, name)(1, 'refused')

    path = write_video(tmp_path / 'v.mp4', 2)
    monkeypatch.setattr(av, 'open', refuse)
    with pytest.raises(DataError, match=r'v\.mp4: cannot be opened as a video: refused'):
        open_source(path)


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


def test_prefetch_gives_up_an_input_that_has_stalled(monkeypatch):
    monkeypatch.setattr(video_io, '_PATIENCE', 0.1)
    release, stopped = threading.Event(), threading.Event()

    def items():
        yield 0
        release.wait(20)

    running = prefetch(items(), 3, stopped=stopped.is_set)
    assert next(running) == 0
    threading.Timer(0.1, stopped.set).start()
    with pytest.raises(Interrupted):
        next(running)
    release.set()


def test_background_keeps_order_and_raises_what_went_wrong():
    done = []
    thread = Background(done.append, 2)
    for i in range(50):
        thread.put(i)
    thread.close()
    assert done == list(range(50))

    tried, gate = [], threading.Event()

    def fail(item):
        gate.wait(5)
        tried.append(item)
        raise OSError('disk full')

    thread = Background(fail, 2)
    for i in range(2):
        thread.put(i)
    gate.set()
    with pytest.raises(OSError, match='disk full'):
        thread.close()
    assert tried == [0], 'later items are dropped'
    thread = Background(fail, 2)
    with pytest.raises(OSError, match='disk full'):
        for i in range(1000):
            thread.put(i)
    thread.close()


def test_without_av_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'av', None)
    with pytest.raises(DataError, match=r'themask\[video\]'):
        video_io.import_av()
