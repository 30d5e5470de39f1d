"""The segmentor: parity with the reference, properties of tiny models, errors."""

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg.config import load_config
from mmseg.core.precision import Precision
from mmseg.kernels.half import ProductLayer
from mmseg.models import build_segmentor
from mmseg.models.segmentors import Encoded
from mmseg.utils.errors import CheckpointError, ConfigError
from tests.reference import recipe
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
SIZE = (90, 150)


def config(stage, variant, **options):
    return load_config(ROOT / f'local_configs/themask/{stage}_themask_mit_{variant}.py', options)


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
@pytest.mark.usefixtures('backend')
def test_whole_inference_equals_the_reference(reference, reference_model, length):
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    clip = frames(60, length)
    with torch.no_grad():
        low, full = model.scores(clip), model.scores(clip, SIZE)
    for name, scores in (('head_eval', low), ('scores', full)):
        # a mask logit that is 0 up to rounding decides whether a position is attended: that moves scores by 2e-4 of
        # the largest (seen on one processor of four kinds, with one kind of kernel; else the difference is 2e-6)
        difference, largest = recipe.check(gold, f't{length}/{name}', scores[0].numpy())
        assert difference <= 3e-4 * largest
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


DEAD = ('decode_head.conv_seg.', 'reference_points.')


@pytest.mark.parametrize('variant', ['b0', 'b1', 'b2', 'b5'])
@pytest.mark.parametrize('stage', ['1f', 'video'])
def test_names_and_shapes_of_the_eight_recorded_configs(reference, stage, variant):
    recorded = reference(f'keys_{stage}_{variant}.json')['state_dict']
    with torch.device('meta'):
        model = build_segmentor(config(stage, variant).model)
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert own == {name: shape for name, shape in recorded if not any(part in name for part in DEAD)}
    everything = {name: torch.empty(shape, device='meta') for name, shape in recorded}
    assert model.load_state_dict(everything, assign=True) == ([], [])


def test_the_same_config_builds_twice_and_stays_as_it_was():
    cfg = config('video', 'b0')
    before = copy.deepcopy(cfg.model.to_dict())
    with torch.device('meta'):
        first, second = build_segmentor(cfg.model), build_segmentor(cfg.model)
    assert cfg.model.to_dict() == before
    assert list(first.state_dict()) == list(second.state_dict())


def test_the_reference_schema_builds(reference):
    """The reference's own model section, with its retired keys; only the path of the weights is ours."""
    for stage in ('1f', 'video'):
        section = reference('config_values.json')[f'{stage}_themask_mit_b1']['model']
        with torch.device('meta'):
            build_segmentor({**section, 'pretrained': None})


def lively(stage):
    """A tiny model in training mode; from its start values alone, offsets would not depend on the image."""
    torch.manual_seed(5)
    model = build_segmentor(tiny_model(stage))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(scope='module', params=['1f', 'video'])
def tiny(request):
    return lively(request.param).eval()


class CastsOf(TorchDispatchMode):
    """The shapes of weights, or parts of them, that are cast; learned queries are inputs of layers and no weights."""

    def __init__(self, model):
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, ProductLayer)]
        weights = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
        self.storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.storages:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('frozen', [False, True])
def test_a_second_clip_casts_no_weight(tiny, frozen, monkeypatch):
    """In one precision context, as a test or a benchmark has it; frozen weights, too, which autocast does not keep."""
    monkeypatch.setattr('mmseg.core.precision.cpu_computes_in', lambda dtype: True)
    model = copy.deepcopy(tiny).requires_grad_(not frozen)
    clip = frames(2, 1)
    with torch.no_grad(), Precision(torch.device('cpu'), 'bfloat16').evaluation(model):
        with CastsOf(model) as casts:
            first = model.scores(clip)
        assert len(casts.shapes) > 20
        with CastsOf(model) as casts:
            assert torch.equal(model.scores(clip), first)
        assert casts.shapes == []
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model.scores(clip), first), 'the numbers of autocast alone'


@pytest.mark.parametrize('length', [1, 2, 3])
def test_clips_of_a_batch_are_independent(tiny, length):
    clips = torch.randn(3, length, 3, 61, 75)
    with torch.no_grad():
        batch = tiny.scores(clips)
        single = torch.cat([tiny.scores(clip[None]) for clip in clips])
    assert batch.shape == (3, length, 5, 16, 19)
    torch.testing.assert_close(batch, single, atol=1e-4, rtol=1e-4)


def test_every_parameter_gets_a_gradient(tiny):
    model = copy.deepcopy(tiny).train()
    length = model.decode_head.predictor.num_frames
    clip = torch.randn(2, length, 3, 64, 64)
    label = torch.randint(0, 5, (2, length, 64, 64))
    label[:, :, :8] = 255
    losses = model(clip, label, iteration=100)
    assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_a_model_in_double_precision_gives_the_losses_of_the_same_one_in_float(tiny):
    model = copy.deepcopy(tiny).eval()
    clip, label = torch.randn(1, 2, 3, 64, 64), torch.randint(0, 5, (1, 2, 64, 64))
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        losses.append(model.to(dtype).loss(clip.to(dtype), label, iteration=100))
    torch.testing.assert_close(*losses, check_dtype=False, rtol=1e-3, atol=1e-3)
    sum(losses[1].values()).backward()
    assert model.backbone.norm1.weight.grad.dtype == torch.float64


@pytest.mark.parametrize('training', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_backbone_pixel_decoder_and_predictor_compile_into_one_graph_each(training):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend('eager')
    compiled = build_segmentor(tiny_model('video', compile_cfg=dict(backend=backend, fullgraph=True))).train(training)
    clip, label = torch.randn(1, 2, 3, 64, 64), torch.randint(0, 5, (1, 2, 64, 64))
    if training:
        sum(compiled(clip, label).values()).backward()
        assert all(parameter.grad is not None for parameter in compiled.parameters())
        assert compiled.statistics()['matched_primary'].tolist() == [5, 8]
    else:
        plain = build_segmentor(tiny_model('video')).eval()
        plain.load_state_dict(compiled.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(compiled.scores(clip), plain.scores(clip))
    assert backend.frame_count == 3  # fullgraph has let no break pass


def test_frames_one_after_the_other_give_what_a_batch_gives(tiny, monkeypatch):
    frames, lengths = torch.randn(3, 3, 61, 75), []
    hook = tiny.backbone.register_forward_hook(lambda _, inputs, __: lengths.append(len(inputs[0])))
    with torch.no_grad():
        encoded, first = tiny.encode(frames), tiny.encode(frames[:1])
    batch = tiny.encode(frames)
    hook.remove()
    assert lengths == [1, 1, 1, 1, 3], 'with gradients a batch stays one'
    assert [len(each) for each in (encoded, encoded[1:], encoded[2], Encoded.join([first, *encoded]))] == [3, 2, 1, 4]
    for ours, theirs, one in zip(*([each.windows[0][0], *each.windows[0][1]] for each in (encoded, batch, first))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert torch.equal(ours[:1], one) and ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('compile_cfg, steps', [
    (None, 0), pytest.param(dict(backend='eager'), 6, marks=pytest.mark.slow)])
def test_every_clip_of_a_compiled_model_begins_a_step(compile_cfg, steps, monkeypatch):
    """CUDA graphs would otherwise take what the last clip left for needed still; windows are clips of their own."""
    begun = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: begun.append(1))
    model = build_segmentor(tiny_model('video', compile_cfg=compile_cfg)).eval()
    clip = torch.randn(1, 2, 3, 64, 96)
    model.predict([clip], [None], (64, 96))
    model.inference = type(model.inference)('slide', (64, 64), (64, 32))
    model.predict([clip], [None], (64, 96))
    assert len(begun) == steps


def test_an_unknown_compile_option_is_named():
    with pytest.raises(ConfigError, match=r"model\.compile_cfg\.modes: .*'mode'"):
        build_segmentor(tiny_model('video', compile_cfg=dict(modes='default')))


def test_prediction_is_the_argmax_of_the_scores(tiny):
    clips = torch.randn(2, 2, 3, 61, 75)
    labels = tiny.predict([clips], [None], (83, 50))
    with torch.no_grad():
        expected = tiny.scores(clips, (83, 50)).argmax(2)
    assert (labels == expected).float().mean() > 0.999


def test_flipped_view_is_flipped_back(tiny):
    clip = torch.randn(1, 2, 3, 64, 75)
    for flip, axis in (('horizontal', -1), ('vertical', -2)):
        with torch.no_grad():
            expected = tiny.scores(clip.flip(axis), (40, 51)).argmax(2).flip(axis)
        assert (tiny.predict([clip.flip(axis)], [flip], (40, 51)) == expected).float().mean() > 0.999


def test_views_are_averaged_after_the_softmax(tiny):
    views = [torch.randn(1, 1, 3, 64, 96), torch.randn(1, 1, 3, 40, 60)]
    with torch.no_grad():
        expected = sum(tiny.scores(view, (50, 70)).softmax(2) for view in views).argmax(2)
    assert (tiny.predict(views, [None, None], (50, 70)) == expected).float().mean() > 0.999


@pytest.mark.parametrize('crop, stride', [((64, 64), (48, 32)), ((200, 64), (200, 64)), ((33, 47), (20, 30))])
def test_windows_are_summed_and_divided_by_their_number(tiny, crop, stride):
    clip = torch.randn(1, 2, 3, 90, 110)
    size = (71, 87)
    total, count = torch.zeros(1, 2, 5, 90, 110), torch.zeros(90, 110)
    for top in range(0, max(90 - crop[0], 0) + stride[0], stride[0]):
        for left in range(0, max(110 - crop[1], 0) + stride[1], stride[1]):
            y, x = min(top, max(90 - crop[0], 0)), min(left, max(110 - crop[1], 0))
            window = clip[..., y : y + crop[0], x : x + crop[1]]
            with torch.no_grad():
                total[..., y : y + crop[0], x : x + crop[1]] += tiny.scores(window, window.shape[-2:])
            count[y : y + crop[0], x : x + crop[1]] += 1
    sliding = copy.deepcopy(tiny)
    sliding.inference = type(tiny.inference)('slide', crop, stride)
    with torch.no_grad():
        torch.testing.assert_close(sliding.scores(clip), total / count, atol=1e-5, rtol=1e-4)
        expected = sliding.scores(clip, size).argmax(2)
    assert (sliding.predict([clip], [None], size) == expected).float().mean() > 0.999


def test_pretrained_weights(tmp_path):
    cfg = tiny_model('1f', pretrained=str(tmp_path / 'mit.pth'))
    model = build_segmentor(cfg)
    with pytest.raises(ConfigError, match=r'--options model\.pretrained=None'):
        model.init_weights()

    weights = {name: torch.randn_like(tensor) for name, tensor in model.backbone.state_dict().items()}
    torch.save({**weights, 'head.weight': torch.zeros(1000, 32), 'head.bias': torch.zeros(1000)}, cfg['pretrained'])
    model.init_weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.backbone.state_dict().items())

    torch.save({name: tensor for name, tensor in weights.items() if 'block2' not in name}, cfg['pretrained'])
    with pytest.raises(CheckpointError, match=r'missing: block2\.0\.norm1\.weight'):
        model.init_weights()
    torch.save({'state_dict': {'x': torch.nn.Module()}}, cfg['pretrained'])
    with pytest.raises(CheckpointError, match='refused'):
        model.init_weights()
    build_segmentor(tiny_model('1f')).init_weights()


def test_wrong_sections_are_named():
    shape = {f'res{i + 2}': dict(channels=c, stride=4 << i) for i, c in enumerate((8, 16, 20, 32))}

    def built(section='1f', **head):
        cfg = tiny_model(section)
        cfg['decode_head'].update(head)
        return build_segmentor(cfg)

    built(input_shape=shape)
    with pytest.raises(ConfigError, match=r'decode_head\.input_shape: the backbone gives'):
        built(input_shape={**shape, 'res3': dict(channels=64, stride=8)})
    with pytest.raises(ConfigError, match='in_index'):
        built(in_index=(0, 1, 2, 4))
    with pytest.raises(ConfigError, match=r"model\.decode_head\.num_class: .*'num_classes'"):
        built(num_class=4)
    for test_cfg, message in [
        (dict(mode='tiles'), r"^model\.test_cfg\.mode: expected 'whole' or 'slide'"),
        (dict(mode='slide', crop_size=(64, 64)), r'^model\.test_cfg\.stride'),
        (dict(mode='slide', crop_size=(64, 64), stride=(64, 65)), 'gaps'),
        (dict(mode='whole', crop=3), r"model\.test_cfg\.crop: .*'crop_size'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_segmentor(tiny_model('1f', test_cfg=test_cfg))
    with pytest.raises(ConfigError, match='train_cfg'):
        build_segmentor(tiny_model('1f', train_cfg=dict(sampler=1)))
    with pytest.raises(ConfigError, match=r"model\.backbone\.type: .*'mit_b0'"):
        build_segmentor(tiny_model('1f', backbone=dict(type='mit_b00')))


def test_wrong_shapes_are_named(tiny):
    with pytest.raises(ValueError, match=r'expected \[B, T, 3, H, W\]'):
        tiny.scores(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match='label: expected'):
        tiny.loss(torch.zeros(1, 1, 3, 64, 64), torch.zeros(1, 1, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match='as many views as flips'):
        tiny.predict([torch.zeros(1, 1, 3, 64, 64)], [], (64, 64))
    with pytest.raises(ValueError, match="'diagonal'"):
        tiny.predict([torch.zeros(1, 1, 3, 64, 64)], ['diagonal'], (64, 64))


@pytest.mark.parametrize('kind', ['1f', 'video'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float64, 1e-4)])
@torch.no_grad()
def test_a_model_of_another_dtype_takes_the_same_frames(kind, dtype, tolerance):
    torch.manual_seed(0)
    model = build_segmentor(tiny_model(kind)).eval()
    clip = torch.randn(1, 2, 3, 64, 96)
    expected = model.scores(clip)
    scores = model.to(dtype).scores(clip)
    assert scores.dtype == dtype
    assert (scores - expected).abs().max() < tolerance * expected.std()
