"""A head of one's own, after the protocol alone: it trains, is tested with views and windows, and labels videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmseg.apis import init_segmentor, segment_video
from mmseg.apis.test import run_test
from mmseg.datasets import build_dataset, build_test_loader
from mmseg.models import build_segmentor
from mmseg.registry import HEADS
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw


class PixelHead(nn.Module):
    """Logits of each pixel from the finest map, plus a memory of the clip before."""

    score_kind = 'logits'

    def __init__(self, num_classes, input_shape):
        super().__init__()
        self.num_classes = num_classes
        self.classify = nn.Conv2d(input_shape['res2']['channels'], num_classes, 1)

    def encode(self, features):
        return self.classify(features[0])

    def scores_of(self, encoded, num_frames, state=None):
        scores = encoded.unflatten(0, (-1, num_frames))
        return scores, scores.mean((0, 1)) + (0 if state is None else state)

    def loss(self, features, labels, iteration=0):
        logits = F.interpolate(self.encode(features), labels.shape[2:], mode='bilinear')
        return {'decode.loss_ce': F.cross_entropy(logits, labels.flatten(0, 1).long(), ignore_index=255)}

    def statistics(self):
        return {}

    def compiled_parts(self):
        return [self.classify]


@pytest.fixture
def model_cfg():
    HEADS.register_module(name='PixelHead', module=PixelHead, force=True)
    yield dict(
        type='EncoderDecoder_clips', backbone=dict(type='mit_b0'), decode_head=dict(type='PixelHead', num_classes=124))
    HEADS.module_dict.pop('PixelHead')


def test_it_trains_and_compiles(model_cfg):
    clip, label = torch.randn(1, 2, 3, 64, 64), torch.randint(0, 124, (1, 2, 64, 64))
    plain = build_segmentor(model_cfg)
    compiled = build_segmentor({**model_cfg, 'compile_cfg': dict(backend='eager')})
    compiled.load_state_dict(plain.state_dict())
    plain.eval()
    compiled.eval()
    (loss,), (other,) = plain(clip, label).values(), compiled(clip, label).values()
    loss.backward()
    torch.testing.assert_close(loss, other)
    assert all(parameter.grad is not None for parameter in plain.decode_head.parameters())


def test_clips_may_have_a_memory(model_cfg):
    model = build_segmentor({**model_cfg, 'test_cfg': dict(mode='slide', crop_size=64, stride=32)}).eval()
    with torch.no_grad():
        encoded = model.encode(torch.randn(2, 3, 64, 96))
        scores, state = model.scores_of(encoded, 2)
        _, later = model.scores_of(encoded, 2, state)
    assert scores.maps.shape == (1, 2, 124, 16, 32) and len(state) == 2
    torch.testing.assert_close(later[0], 2 * state[0])


@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), dict(mode='slide', crop_size=64, stride=32)])
def test_it_is_tested_and_labels_videos(model_cfg, test_cfg, tmp_path):
    write_vspw(tmp_path / 'data')
    config = write_tiny_config(tmp_path / 'c.py', tmp_path / 'data', extra=(
        f"model['decode_head'] = dict(_delete_=True, type='PixelHead', num_classes=124)\nmodel['test_cfg'] = {test_cfg}"
        "\ndata['test']['test_size'] = 2"))
    model = init_segmentor(config)
    dataset = build_dataset(model.cfg.data.test, where='data.test')
    assert 0 <= run_test(model, dataset, build_test_loader(dataset, 0), progress=False)['mIoU'] <= 1
    frames = [np.random.default_rng(i).integers(0, 256, (60, 107, 3), dtype=np.uint8) for i in range(4)]
    for overlap in (0, 1):
        labels = [label for _, label in segment_video(model, frames, 2, 1, overlap)]
        assert [label.shape for label in labels] == [(60, 107)] * 4
