"""The segmentor: parity with the reference, properties of tiny models, errors."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

from mmseg.models import build_segmentor
from mmseg.models.segmentors.label_map import ScoreView, label_map, resize_matrix, window_matrix, window_starts
from mmseg.utils.errors import CheckpointError, ConfigError
from tests.reference import recipe

SIZE = (90, 150)


def config(stage, variant, **options):
    cfg = Config.fromfile(f'local_configs/themask/{stage}_themask_mit_{variant}.py')
    cfg.merge_from_dict({'model.pretrained': None, **options})
    return cfg


def filled(model):
    """The model with the reference's deterministic weights, as a synthetic reference checkpoint."""
    values = {k: torch.from_numpy(v) for k, v in recipe.fill(model.state_dict()).items()}
    values['decode_head.criterion.empty_weight'] = model.state_dict()['decode_head.criterion.empty_weight']
    model.load_state_dict(values)
    return model.eval()


def frames(seed, count, height=96, width=160):
    return torch.stack([torch.from_numpy(recipe.image(seed + i, 1, 3, height, width)[0]) for i in range(count)])[None]


@pytest.fixture(scope='module', params=['1f', 'video'])
def reference_model(request):
    return request.param, filled(build_segmentor(config(request.param, 'b0').model))


def share_equal(gold, name, labels):
    assert tuple(gold[f'{name}/shape']) == tuple(labels.shape)
    return float((gold[f'{name}/sub'] == labels.numpy().reshape(-1)[:: int(gold[f'{name}/stride'])]).mean())


@pytest.mark.parametrize('length', [1, 2, 4])
def test_whole_inference_equals_the_reference(reference, reference_model, length):
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    clip = frames(60, length)
    with torch.no_grad():
        low, full = model.scores(clip), model.scores(clip, SIZE)
    assert recipe.check(gold, f't{length}/head_eval', low[0].numpy())[0] <= 1e-3
    assert recipe.check(gold, f't{length}/scores', full[0].numpy())[0] <= 1e-3
    assert recipe.check(gold, f't{length}/softmax', full[0].softmax(1).numpy())[0] <= 1e-3
    labels = model.predict([clip], [None], SIZE)
    assert labels.dtype == torch.uint8
    assert share_equal(gold, f't{length}/argmax', labels[0]) >= 0.999


def test_views_equal_the_reference(reference, reference_model):
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    clip, small = frames(60, 2), frames(70, 2, 64, 96)
    views, flips = [clip, clip.flip(-1), small, small.flip(-1)], [None, 'horizontal', None, 'horizontal']
    assert share_equal(gold, 't2/aug_argmax', model.predict(views[:2], flips[:2], SIZE)[0]) >= 0.999
    assert share_equal(gold, 't2/aug4_argmax', model.predict(views, flips, SIZE)[0]) >= 0.999
    with torch.no_grad():
        flipped = model.scores(clip.flip(-1), SIZE).softmax(2).flip(-1)[0]
    assert recipe.check(gold, 't2/flip_softmax', flipped.numpy())[0] <= 1e-3


def test_slide_equals_the_reference(reference, reference_model):
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    whole = model.inference
    model.inference = type(whole)('slide', (64, 96), (48, 64))
    clip = frames(60, 2)
    with torch.no_grad():
        assert recipe.check(gold, 't2/slide_scores', model.scores(clip, SIZE)[0].numpy())[0] <= 1e-3
    labels = model.predict([clip], [None], SIZE)[0]
    model.inference = whole
    assert share_equal(gold, 't2/slide_argmax', labels) >= 0.999
