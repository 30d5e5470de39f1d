"""A model on a video: which clips are made, that memory holds a block of frames only, and what the labels are."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict

from mmseg.apis import inference_segmentor, init_segmentor
from mmseg.apis.test import predict_item
from mmseg.apps.video import FrameView, VideoSegmenter, classes_of, segment_video
from mmseg.apps.video_io import open_source
from mmseg.datasets import build_dataset
from mmseg.datasets.clip_sampler import cut_test_clips
from mmseg.datasets.pipelines.loading import read_frame
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.segmentors.encoded import Axis, Encoded, Scores
from mmseg.utils.errors import ConfigError
from mmseg.utils.visual import legend
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw


class Recorder:
    """A model whose frames are numbers; writes down the clips it is asked for and which frames it encodes."""

    num_classes, score_kind = 4, 'mass'
    compiled = False

    def __init__(self, test_size=1):
        self.clips, self.encoded = [], []
        self.cfg = ConfigDict(data=dict(test=dict(test_size=test_size, pipeline=[self.pipeline])))
        self.inference = SimpleNamespace(mode='whole')

    @staticmethod
    def pipeline(results):
        (image,) = results['frames']
        number = float(image[0, 0] @ np.array([1, 256, 65536]))
        return {'img': [torch.full((1, 3, 4, 4), number)], 'img_metas': [{'flip': False}], 'seg_fields': []}

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, images):
        self.encoded += images[:, 0, 0, 0].int().tolist()
        return Encoded([(images, [images + 1])], Axis.of(4), Axis.of(4))

    def scores_of(self, encoded, num_frames):
        ((images, maps),) = encoded.windows
        numbers = images[:, 0, 0, 0].int().tolist()
        assert [m.shape[0] for m in maps] == [num_frames] == [len(numbers)]
        self.clips.append(tuple(numbers))
        votes = torch.nn.functional.one_hot(torch.tensor(numbers) % 4, 4).float()
        maps = votes[None, :, :, None, None].expand(1, num_frames, 4, 2, 2)
        return Scores(maps, Axis.of(4), Axis.of(4)), None

    labels = EncoderDecoder.labels


def numbered(count):
    for i in range(count):
        yield np.full((4, 4, 3), [i % 256, i // 256, 0], np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 5), st.integers(1, 4), st.data())
def test_offline_clips(length, clip_len, stride, data):
    overlap = data.draw(st.integers(0, clip_len - 1))
    model = Recorder()
    labels = [label for _, label in segment_video(model, numbered(length), clip_len, stride, overlap)]
    assert [label[0, 0] for label in labels] == [i % 4 for i in range(length)]
    assert sorted(model.encoded) == list(range(length)), 'a frame is encoded once'
    assert all(list(clip) == sorted(set(clip)) for clip in model.clips)
    counts = defaultdict(int)
    for clip in model.clips:
        assert len(clip) <= clip_len
        for number in clip:
            counts[number] += 1
    assert set(counts) == set(range(length))
    if overlap == 0:
        assert set(counts.values()) <= {1}
    if overlap == 0 and (stride == 3 or clip_len == 1):
        assert model.clips == cut_test_clips(length, clip_len), 'the clips of testing'


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
def test_online_clips_hold_past_frames_only(length, clip_len, stride):
    model = Recorder()
    stream = segment_video(model, numbered(length), clip_len, stride, online=True)
    for i, (_, label) in enumerate(stream):
        assert label[0, 0] == i % 4
        step = stride if clip_len > 1 else 1
        assert model.clips[i] == tuple(n for n in range(i - (clip_len - 1) * step, i + 1, step) if n >= 0)
    assert len(model.clips) == length and model.encoded == list(range(length))


def test_overlapping_clips_share_frames():
    model = Recorder()
    list(segment_video(model, numbered(12), 4, 1, 2))
    assert model.clips[:4] == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (6, 7, 8, 9)]


def test_a_frame_is_labelled_as_soon_as_its_clips_are_done():
    taken = []

    def frames():
        for image in numbered(100):
            taken.append(1)
            yield image

    stream = segment_video(Recorder(), frames(), 2, 3)
    next(stream)
    assert len(taken) <= 6 + 4 + 3
    stream.close()


@pytest.mark.parametrize('options', [dict(clip_len=0), dict(stride=0), dict(clip_len=2, overlap=2), dict(overlap=-1),
                                     dict(clip_len=3, overlap=1, online=True), dict(dtype='float8')])
def test_options_that_do_not_fit(options):
    with pytest.raises(ConfigError):
        VideoSegmenter(Recorder(), **options)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('video')
    data = write_vspw(root / 'vspw', {'val': {'v0': 14, 'v1': 5}, 'train': {'a': 3}, 'test': {'t': 1}})
    torch.manual_seed(0)
    config = write_tiny_config(root / 'config.py', data, base='video_themask_mit_b0')
    return data, config


def spread(model):
    """Makes a random model's predictions differ between frames and pixels, so that a mistake shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'class_embed' in name or 'mask_embed' in name:
                parameter.mul_(6).add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize('test_size', [1, 2, 3])
def test_offline_labels_are_those_of_testing(tiny, test_size):
    data, config = tiny
    model = spread(init_segmentor(config, options={'data.test.test_size': test_size}))
    dataset = build_dataset(model.cfg.data.test)
    want = {}
    for item in dataset:
        for frame, label in zip(item['frames'], predict_item(model, item, torch.device('cpu'))):
            want[item['video'], frame] = label
    assert len(np.unique(np.stack([want['v0', f] for f in dataset.videos[0].frames]))) > 3
    for video in dataset.videos:
        labels = [label for _, label in segment_video(model, data / 'data' / video.name / 'origin')]
        assert all((label == want[video.name, frame]).all() for label, frame in zip(labels, video.frames))
        assert len(labels) == len(video.frames)


def test_online_labels_are_those_of_the_clip(tiny):
    data, config = tiny
    model = spread(init_segmentor(config))
    paths = sorted((data / 'data' / 'v0' / 'origin').iterdir())
    labels = [label for _, label in segment_video(model, data / 'data' / 'v0' / 'origin', 3, 2, online=True)]
    for i in (0, 3, 9):
        clip = [paths[n] for n in (i - 4, i - 2, i) if n >= 0]
        assert (labels[i] == inference_segmentor(model, clip)[-1]).mean() > 0.999


def test_slide_mode_and_flipped_views_and_half_precision(tiny, monkeypatch):
    data, config = tiny
    slide = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 48))}
    folder = data / 'data' / 'v1' / 'origin'
    for options in (slide, {'data.test.pipeline.1.flip': True}):
        model = spread(init_segmentor(config, options=options))
        want = inference_segmentor(model, sorted(folder.iterdir())[:2])
        got = [label for _, label in segment_video(model, folder, 2, 1)][:2]
        assert np.mean([g == w for g, w in zip(got, want)]) > 0.999, options
    full = [label for _, label in segment_video(model, folder, 2, 1)]
    monkeypatch.setattr('mmseg.core.precision.cpu_computes_in', lambda dtype: True)
    half = [label for _, label in segment_video(model, folder, 2, 1, dtype='bfloat16')]
    assert 0.8 < np.mean([a == b for a, b in zip(full, half)]) < 1


@pytest.mark.parametrize('size', [(61, 33), (90, 160), (33, 200)])
def test_any_size_in_memory(tiny, size):
    model = init_segmentor(tiny[1])
    frames = [np.random.randint(0, 256, (*size, 3), np.uint8) for _ in range(3)]
    for (image, label), frame in zip(segment_video(model, frames, 2), frames):
        assert image is frame and label.shape == size and label.dtype == np.uint8


def test_frames_of_one_image_equal_the_file(tiny):
    data, _ = tiny
    folder = data / 'data' / 'v0' / 'origin'
    first = next(iter(open_source(folder)))
    assert (first.image == read_frame(str(folder / f'{first.name}.jpg'))).all()


def test_class_names_come_from_the_data_set(tiny):
    model = init_segmentor(tiny[1])
    names, palette = classes_of(model)
    assert len(names) == len(palette) == 124 and names[0] == 'wall'
    model.cfg.data.test.classes = ['ceiling', 'wall']
    with pytest.raises(ConfigError, match='2 class names and 2 colours for a model of 124 classes'):
        classes_of(model)
    model.decode_head.num_classes = 2
    assert classes_of(model) == (('ceiling', 'wall'), [palette[1], palette[0]])
    model.CLASSES, model.PALETTE = ['x', 'y'], [[1, 2, 3], [4, 5, 6]]  # of a checkpoint
    assert classes_of(model) == (model.CLASSES, model.PALETTE)


def rows_of(*sizes):
    """A picture of 200 x 160 whose label ``i`` fills ``sizes[i]`` rows."""
    return np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)[:, None].repeat(160, axis=1)


def test_a_legend_without_room_for_all_shows_the_largest_and_counts_the_others():
    names, palette = [f'class {i}' for i in range(6)], [[40 * i, 255 - 40 * i, 7] for i in range(6)]
    image = np.zeros((200, 160, 3), np.uint8)
    view = FrameView(names, palette, 'labels', with_legend=True, fps=4)

    def drawn(*sizes):
        strip = view(image, rows_of(*sizes))[200:]
        tiles = np.split(strip, 3)
        counted = [n for n in range(1, 7) if (tiles[2] == legend([], names, palette, 160, n)).all()]
        return view._places, counted[0] if counted else 0

    assert drawn(90, 80, 30) == ({0: 0, 1: 1, 2: 2}, 0)
    assert drawn(85, 15, 95, 5) == ({0: 0, 2: 1}, 2), 'the last place is for the number of the others'
    assert drawn(40, 0, 40, 0, 0, 120) == ({0: 0, 5: 1}, 3), 'a large class is shown in the frame in which it comes'
    for _ in range(20):
        places = drawn(10, 0, 30, 0, 40, 120)
    assert places == ({5: 1, 4: 0}, 2), 'of the other two the larger one, once the mean of a second knows it'
    assert drawn(10, 0, 35, 0, 35, 120) == places, 'and none changes places for one frame'
    for _ in range(5):
        places = drawn(0, 0, 0, 0, 80, 120)
    assert places == ({5: 1, 4: 0}, 0)


def test_views_and_the_legend_that_keeps_places():
    names, palette = [f'class {i}' for i in range(20)], [[10 * i, 255 - 10 * i, 7] for i in range(20)]
    image = np.full((60, 500, 3), 200, np.uint8)
    labels = np.full((60, 500), 255, np.uint8)
    labels[:10], labels[10:30] = 5, 2
    colours = FrameView(names, palette, 'labels')(image, labels)
    assert colours[0, 0].tolist() == palette[5][::-1] and colours[59, 0].tolist() == [0, 0, 0]
    over = FrameView(names, palette, 'overlay', 0.5)(image, labels)
    assert over[59, 0].tolist() == [200] * 3 and abs(int(over[0, 0, 2]) - 125) <= 1
    side = FrameView(names, palette, 'side-by-side')(image, labels)
    assert side.shape == (60, 1000, 3) and (side[:, :500] == image).all() and (side[:, 500:] == over).all()

    view = FrameView(names, palette, 'overlay', 0.5, True, fps=2)
    shown = view(image, labels)
    assert shown.shape[1] == 500 and shown.shape[0] > 60
    second = np.where(labels == 2, 7, labels).astype(np.uint8)
    assert [sorted(view._places.items()), view(image, second).shape] == [[(2, 0), (5, 1)], shown.shape]
    assert view._places == {2: 0, 5: 1, 7: 2}, 'the place of a class that is out of sight is kept for a second'
    for _ in range(3):
        view(image, second)
    assert view._places == {5: 1, 7: 2}
    view(image, labels)
    assert view._places == {5: 1, 7: 2, 2: 0}
    many = np.arange(60 * 500).reshape(60, 500) % 20
    view(image, many.astype(np.uint8))
    assert sorted(view._places.values()) == list(range(8)), 'three rows of three, the last one for what is left out'
    narrow = FrameView(names, palette, 'overlay', 0.5, True)(image[:, :50], labels[:, :50])
    assert narrow.shape[1] == 50
    with pytest.raises(ConfigError):
        FrameView(names, palette, 'nothing')
    with pytest.raises(ConfigError):
        FrameView(names, palette, opacity=2)
