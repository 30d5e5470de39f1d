"""The decode head: scores, losses, names, and the errors of its config."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg.models.backbones.mit import mit_b0
from mmseg.models.structures import ClipTarget
from mmseg.registry import HEADS, build
from mmseg.utils.errors import ConfigError
from tests.reference import recipe

CHANNELS = (8, 12, 16, 20)
SHAPE = {f'res{i + 2}': dict(channels=c, stride=4 << i) for i, c in enumerate(CHANNELS)}
KINDS = {'1f': ('THEMask1fHead', ''), 'video': ('THEMaskHead', 'Video')}
BOTH = pytest.mark.parametrize('kind', list(KINDS))


def tiny_cfg(kind, **overrides):
    head, decoder = KINDS[kind]
    cfg = dict(
        type=head,
        num_classes=5,
        input_shape=SHAPE,
        loss_cfg=dict(train_num_points=64, warmup_iters=10, deep_supervision=True, dec_layers=10),
        pixel_decoder_cfg=dict(
            type='MSDeformAttnPixelDecoder', conv_dim=32, mask_dim=16, transformer_nheads=4,
            transformer_dim_feedforward=48, transformer_enc_layers=1),
        transformer_decoder_cfg=dict(
            type=f'{decoder}MultiScaleMaskedTransformerDecoder', hidden_dim=32, num_queries=8, nheads=4,
            dim_feedforward=48, dec_layers=2, num_frames=2))
    for dotted, value in overrides.items():
        *parents, key = dotted.split('__')
        place = cfg
        for parent in parents:
            place = place[parent]
        place[key] = value
    return cfg


def tiny(kind, **overrides):
    return build(HEADS, tiny_cfg(kind, **overrides), 'model.decode_head')


def features(frames, seed=0, size=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(frames, c, size // s, size // s, generator=generator) for c, s in zip(CHANNELS, (4, 8, 16, 32))]


def label_maps(clips, frames, size=64, seed=0):
    return torch.from_numpy(recipe.labels(seed, clips * frames, size, size, n_classes=5, n_regions=3)).view(
        clips, frames, size, size)


def scores(head, maps, num_frames):
    return head.scores_of(head.encode(maps), num_frames)[0]


@pytest.fixture(scope='module')
def models(reference):
    """Backbone and head of the b0 models, built from the reference's own configs, with the weights of the recipe."""
    built = {}
    for kind in KINDS:
        cfg = copy.deepcopy(reference('config_values.json')[f'{kind}_themask_mit_b1']['model']['decode_head'])
        for shape, channels in zip(cfg['input_shape'].values(), (32, 64, 160, 256)):
            shape['channels'] = channels
        before = copy.deepcopy(cfg)
        parts = torch.nn.ModuleDict({'backbone': mit_b0(), 'decode_head': build(HEADS, cfg, 'model.decode_head')})
        assert cfg == before
        weights = {name: torch.from_numpy(value) for name, value in recipe.fill(parts.state_dict()).items()}
        weights['decode_head.criterion.empty_weight'] = parts['decode_head'].criterion.empty_weight
        parts.load_state_dict(weights)
        built[kind] = parts.eval()
    return built


@BOTH
@pytest.mark.parametrize('frames', [1, 2, 4])
@torch.no_grad()
def test_scores_equal_the_reference(models, reference, kind, frames):
    parts, gold = models[kind], reference(f'segmentor_{kind}_b0.npz')
    clip = torch.cat([torch.from_numpy(recipe.image(60 + i, 1, 3, 96, 160)) for i in range(frames)])
    got = scores(parts['decode_head'], parts['backbone'](clip), frames)
    assert got.shape == (1, frames, 124, 24, 40)
    assert recipe.check(gold, f't{frames}/head_eval', got[0].numpy())[0] < 2e-4


@BOTH
def test_a_reference_checkpoint_loads_strictly_and_comes_back_without_dead_tensors(models, reference, kind):
    recorded = {
        name.removeprefix('decode_head.'): shape
        for name, shape in reference(f'keys_{kind}_b0.json')['state_dict']
        if name.startswith('decode_head.')
    }
    head = copy.deepcopy(models[kind]['decode_head'])
    head.load_state_dict({name: torch.rand(shape) for name, shape in recorded.items()})
    living = {name: shape for name, shape in recorded.items() if 'conv_seg' not in name and 'reference_' not in name}
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == living
    assert len(recorded) - len(living) == (4 if kind == 'video' else 2)


@BOTH
@torch.no_grad()
def test_scores_are_the_mean_over_levels_of_class_times_mask(kind):
    head = tiny(kind).eval()
    output = head(features(6), 3, all_layers=True)

    def plain(prediction):
        classes, masks = prediction.logits.softmax(-1)[..., :-1], prediction.masks.sigmoid()
        return torch.einsum('nqk,nqthw->ntkhw', classes, masks)

    expected = plain(output.clip[-1])
    if kind == 'video':
        expected = (expected + plain(output.frame[-1]).view_as(expected)) / 2
    torch.testing.assert_close(scores(head, features(6), 3), expected, rtol=1e-5, atol=1e-6)


@BOTH
@torch.no_grad()
def test_batched_clips_equal_single_clips(kind):
    head, maps = tiny(kind).eval(), features(4)
    batch = scores(head, maps, 2)
    for b in range(2):
        single = scores(head, [x[2 * b : 2 * b + 2] for x in maps], 2)
        torch.testing.assert_close(single[0], batch[b], rtol=1e-4, atol=1e-5)


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations whose result the host must wait for: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique_dim', '_unique2', 'equal'), name
        return func(*args, **(kwargs or {}))


@BOTH
@torch.no_grad()
def test_scores_need_no_host_synchronisation(kind):
    head, maps = tiny(kind).eval(), features(2)
    with NoSynchronisation():
        scores(head, maps, 2)
        with pytest.raises(AssertionError, match='_local_scalar_dense'):
            maps[0].sum().item()


@BOTH
def test_losses_wait_for_the_device_once(kind, monkeypatch):
    """All cost matrices of all stages and clips come to the host together, and nothing else does."""
    head = tiny(kind, transformer_decoder_cfg__num_frames=2).train()
    targets = ClipTarget.from_labels(label_maps(2, 2), 5)
    output = head(features(4), 2)
    fetched, fetch = [], torch.Tensor.cpu

    def cpu(tensor):
        if tensor.is_floating_point():  # indices are made on the host
            fetched.append(tensor.numel())
        return fetch(tensor)

    monkeypatch.setattr(torch.Tensor, 'cpu', cpu)
    with NoSynchronisation():
        head.criterion(output, targets, iteration=20)
    assert len(fetched) == 1


@BOTH
def test_loss_names_and_the_warm_up_of_the_one_frame_stage(kind):
    head = tiny(kind).train()
    warm, full = (set(head.loss(features(4), label_maps(2, 2), iteration=i)) for i in (9, 10))
    names = ['loss_ce', 'r0_loss_mask', 'r0_loss_dice', 'r1_loss_mask_unmatched', 'r1_loss_dice_unmatched']
    levels = ['', '_aux'] if kind == 'video' else ['']
    assert full == {f'decode.{name}{stage}{level}' for name in names for stage in ('', '_0', '_1') for level in levels}
    early = [f'decode.{name}{stage}' for name in ('loss_ce', 'loss_mask', 'loss_dice') for stage in ('', '_0', '_1')]
    assert warm == (full if kind == 'video' else set(early))


@BOTH
def test_every_trainable_parameter_gets_a_gradient(kind):
    head = tiny(kind).train()
    losses = head.loss(features(4), label_maps(2, 2), iteration=20)
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]


@BOTH
def test_losses_stay_in_float32_under_autocast(kind):
    head = tiny(kind).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = head.loss(features(4), label_maps(2, 2), iteration=20)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


@BOTH
def test_a_void_clip_trains_classes_only(kind):
    head = tiny(kind).train()
    losses = head.loss(features(2), torch.full((1, 2, 64, 64), 255), iteration=20)
    assert all((value == 0) == ('mask' in name or 'dice' in name) for name, value in losses.items())
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_loss_weight_scales_every_loss():
    head = tiny('1f').eval()
    torch.manual_seed(1)
    once = head.loss(features(2), label_maps(1, 2))
    head.loss_weight = 3.0
    torch.manual_seed(1)
    thrice = head.loss(features(2), label_maps(1, 2))
    assert once.keys() == thrice.keys()
    for name in once:
        torch.testing.assert_close(thrice[name], 3 * once[name])


def test_maps_are_taken_by_index():
    torch.manual_seed(0)
    head = tiny('1f').eval()
    chosen = tiny('1f', in_index=[1, 2, 4, 3]).eval()
    chosen.load_state_dict(head.state_dict())
    maps = features(2)
    shuffled = [maps[0], maps[0], maps[1], maps[3], maps[2]]
    assert torch.equal(scores(head, maps, 2), scores(chosen, shuffled, 2))


@given(seed=st.integers(0, 999), clips=st.integers(1, 3), frames=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_targets_list_the_labels_that_are_present(seed, clips, frames):
    labels = torch.from_numpy(recipe.labels(seed, clips * frames, 12, 16)).view(clips, frames, 12, 16)
    targets = ClipTarget.from_labels(labels, 124)
    assert all(
        torch.equal(target.labels, other.labels) and torch.equal(target.classes, other.classes)
        for target, other in zip(targets, ClipTarget.from_labels(labels.to(torch.uint8), 124), strict=True))
    for target, clip in zip(targets, labels):
        assert target.classes.tolist() == sorted(set(clip.flatten().tolist()) - {255})
        assert torch.equal(target.masks.sum(0) == 1, clip != 255)
        assert torch.equal((target.masks * target.classes.view(-1, 1, 1, 1)).sum(0)[clip != 255], clip[clip != 255])


def test_a_label_beyond_the_classes_is_named():
    labels = label_maps(1, 2)
    labels[0, 0, -1, -1] = 200
    with pytest.raises(ValueError, match=r'labels \[200\].*5 classes.*reduce_zero_label'):
        tiny('1f').train().loss(features(2), labels)


@BOTH
def test_a_training_clip_of_another_length_is_an_error(kind):
    with pytest.raises(ConfigError, match='num_frames=3'):
        tiny(kind).train().loss(features(3), label_maps(1, 3))


@pytest.mark.parametrize(
    'kind, overrides, message',
    [
        ('1f', dict(loss_cfg__warmup_iter=3), r"decode_head.loss_cfg.warmup_iter: .*did you mean 'warmup_iters'"),
        ('1f', dict(loss_cfg__deep_supervision=False), r'loss_cfg.deep_supervision: .*supports only True'),
        ('1f', dict(loss_cfg__matcher_cfg=dict(mask_weigth=1.0)), r"matcher_cfg.mask_weigth: .*'mask_weight'"),
        ('1f', dict(pixel_decoder_cfg__conv_dims=3), r"pixel_decoder_cfg.conv_dims: .*'conv_dim'"),
        ('1f', dict(transformer_decoder_cfg__type='MaskDecodr'), r"transformer_decoder_cfg.type: unknown .*MaskDecodr"),
        ('1f', dict(transformer_decoder_cfg__num_classes=7), r'num_classes: 7 here, but the head has num_classes=5'),
        ('1f', dict(transformer_decoder_cfg__mask_dim=8), r'mask_dim: 8 here, but pixel_decoder_cfg has mask_dim=16'),
        ('1f', dict(type='THEMaskHead'), r"THEMaskHead needs type='VideoMultiScale"),
        ('video', dict(type='THEMask1fHead'), r"THEMask1fHead needs type='MultiScale"),
        ('1f', dict(in_index=[0, 1]), r'in_index \[0, 1\].*differ in length'),
        ('1f', dict(input_shape=None), r'input_shape: .*missing res2, res3, res4, res5'),
        ('1f', dict(num_clases=3), r"decode_head.num_clases: .*did you mean 'num_classes'"),
    ],
)
def test_config_errors_name_key_place_and_remedy(kind, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(kind, **overrides)


@BOTH
@torch.no_grad()
def test_mask_decoder_may_be_narrower_than_the_pixel_decoder(kind):
    head = tiny(kind, transformer_decoder_cfg__hidden_dim=16).eval()
    assert [p.weight.shape[:2] for p in head.predictor.input_proj] == [(16, 32)] * 3
    assert scores(head, features(2), 2).shape == (1, 2, 5, 16, 16)
