"""Mask decoder with and without its temporal part, its layers, and the names of its weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmseg.core import load_weights
from mmseg.models.decode_heads.layers import MultiHeadAttention
from mmseg.models.decode_heads.mask_decoder import MaskDecoder
from mmseg.models.decode_heads.temporal import TemporalAggregation
from mmseg.registry import TRANSFORMER_DECODERS, build
from mmseg.utils.errors import CheckpointError, ConfigError
from mmseg.utils.state_dict_alias import alias_state_dict, reference_names
from tests.reference import recipe

PREFIX = 'decode_head.predictor.'
BOTH = pytest.mark.parametrize('temporal', [False, True], ids=['one_frame', 'video'])


def tiny(temporal, **overrides):
    sizes = dict(hidden_dim=32, num_queries=8, nheads=4, dim_feedforward=48, dec_layers=4, mask_dim=16, num_frames=2)
    return MaskDecoder(5, temporal=temporal, **{**sizes, **overrides})


def inputs(frames, seed=0, channels=32):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(frames, channels, 2 << i, 3 << i, generator=generator) for i in range(3)]
    return maps, torch.randn(frames, 16, 16, 24, generator=generator)


def tensors(output):
    """Every tensor of an output, in a fixed order."""
    levels = [level for level in (output.clip, output.frame) if level is not None]
    return [t for level in levels for prediction in level for t in (prediction.logits, prediction.masks)]


def assert_equal(a, b, tolerance=2e-5):
    a, b = tensors(a), tensors(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def filled(decoder):
    weights = recipe.fill({PREFIX + name: tensor for name, tensor in decoder.state_dict().items()})
    decoder.load_state_dict({name[len(PREFIX) :]: torch.from_numpy(value) for name, value in weights.items()})
    return decoder


@pytest.fixture(scope='module')
def full():
    """The decoders of the b0 models with the weights of the recipe."""
    return {
        'decoder_1f.npz': filled(MaskDecoder(124)),
        'decoder_video.npz': filled(MaskDecoder(124, temporal=True, temporal_dropout=0.0)),
    }


@pytest.mark.parametrize('file', ['decoder_1f.npz', 'decoder_video.npz'])
@pytest.mark.parametrize(
    'mode, num_frames, total', [('eval', 1, 1), ('eval', 2, 2), ('eval', 4, 4), ('train', 2, 4), ('train', 1, 2)]
)
@torch.no_grad()
def test_every_stage_equals_the_reference(full, reference, file, mode, num_frames, total):
    gold, decoder = reference(file), full[file]
    decoder.num_frames = num_frames
    decoder.train(mode == 'train')
    maps = [
        torch.from_numpy(recipe.image(51 + i, total, 256, -(-96 // (32 >> i)), -(-160 // (32 >> i)))) for i in range(3)
    ]
    output = decoder(maps, torch.from_numpy(recipe.image(54, total, 256, 24, 40)), num_frames, all_layers=True)
    recorded = f'{mode}_nf{num_frames if mode == "train" else 1}_bt{total}/'
    levels = {'': output.clip} if output.frame is None else {'video/': output.clip, 'frame/': output.frame}
    for level, stages in levels.items():
        assert len(stages) == 10
        for i, stage in enumerate(stages):
            name = recorded + level + (f'aux{i}/' if i < 9 else '')
            assert recipe.check(gold, name + 'pred_logits', stage.logits.numpy())[0] < 2e-4, name
            assert recipe.check(gold, name + 'pred_masks', stage.masks.numpy())[0] < 2e-4, name


@BOTH
def test_names_and_shapes_equal_the_reference(reference, temporal):
    recorded = reference(f'keys_{"video" if temporal else "1f"}_b0.json')['state_dict']
    recorded = {name: shape for name, shape in recorded if name.startswith(PREFIX) and 'reference_points' not in name}
    decoder = MaskDecoder(124, temporal=temporal)
    assert {PREFIX + name: list(t.shape) for name, t in decoder.state_dict().items()} == recorded


def test_a_reference_checkpoint_with_dead_tensors_loads_strictly_and_comes_back():
    model = nn.ModuleDict({'decode_head': nn.ModuleDict({'predictor': tiny(True)})})
    saved = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    dead = {
        f'{PREFIX}deformabel_transformer_cross_attention_layers.reference_points.{kind}': torch.zeros(2)
        for kind in ('weight', 'bias')
    }
    assert not any('reference_points' in name for name in saved)
    model.load_state_dict({**saved, **dead})
    again = model.state_dict()
    assert set(again) == set(saved)
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    with pytest.raises(RuntimeError, match='reference_pints'):
        model.load_state_dict({**saved, f'{PREFIX}reference_pints': torch.zeros(2)})
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({name: saved[name] for name in saved if 'norm2_box.weight' not in name})


def test_names_in_the_code_say_what_a_part_is_and_map_to_reference_names():
    decoder = tiny(True)
    names = reference_names(decoder)
    assert names['temporal.frame_self.self_attn.in_proj_weight'] == (
        'deformabel_transformer_cross_attention_layers.self_attn_box.in_proj_weight'
    )
    assert names['frame_head.norm.weight'] == 'decoder_norm2.weight'
    assert set(names) == {name for name, _ in decoder.named_parameters()}
    assert set(names.values()) == set(decoder.state_dict())
    for local, saved in names.items():
        assert ('norm' in local) == ('norm' in saved), 'optimizer groups must not depend on the side'


def test_what_does_not_fit_is_told_in_the_names_of_checkpoints():
    with pytest.raises(CheckpointError, match=r'missing: decoder_norm1\..*unexpected: decoder_norm\.weight') as error:
        load_weights(tiny(True), tiny(False).state_dict(), 'one_frame.pth')
    assert 'clip_head' not in str(error.value) and 'temporal' not in str(error.value)


def test_a_model_can_be_pickled_and_copied():
    decoder = tiny(True)
    for twin in (pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder)):
        assert set(twin.state_dict()) == set(decoder.state_dict())
        twin.load_state_dict(decoder.state_dict())


def test_aliases_may_swap_names_and_must_be_one_to_one():
    pair = nn.ModuleDict({'a': nn.Linear(1, 1), 'b': nn.Linear(1, 1)})
    alias_state_dict(pair, {'a': 'b', 'b': 'a'})
    state = pair.state_dict()
    assert torch.equal(state['b.weight'], pair['a'].weight)
    state = {name: torch.full_like(value, i) for i, (name, value) in enumerate(state.items())}
    pair.load_state_dict(state)
    assert torch.equal(pair['a'].bias, state['b.bias'])
    nested = nn.ModuleDict({'a': nn.Linear(1, 1)})
    alias_state_dict(nested, {'a': 'x', 'a.bias': 'y.shift'})
    assert set(nested.state_dict()) == {'x.weight', 'y.shift'}, 'the longest name that applies wins'
    nested.load_state_dict(nested.state_dict())
    with pytest.raises(ValueError, match='share one name'):
        alias_state_dict(pair, {'a': 'c', 'b': 'c'})


def test_attention_equals_torch_multihead_attention():
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    expected, _ = theirs(query, key, value, attn_mask=~allowed.expand(-1, 4, -1, -1).flatten(0, 1))
    torch.testing.assert_close(ours(query, key, value, allowed), expected, rtol=1e-5, atol=1e-6)
    bias = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(ours(query, key, value, bias), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='heads'):
        MultiHeadAttention(30, 4)


@given(height=st.integers(1, 9), width=st.integers(1, 9), frames=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_attention_masks_from_resized_features_are_resized_mask_logits(height, width, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, 6, 7, 10, generator=generator, dtype=torch.float64)
    embedding = torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)
    logits = torch.einsum('bqc,tchw->tqhw', embedding, features)
    logits = F.interpolate(logits, (height, width), mode='bilinear', align_corners=False).flatten(2)
    resized = F.interpolate(features, (height, width), mode='bilinear', align_corners=False).flatten(2)
    torch.testing.assert_close(embedding @ resized, logits)
    for temporal in (False, True):
        expected = logits.sigmoid() >= 0.5
        if not temporal:
            expected = expected.transpose(0, 1).flatten(1)[None]
        expected = expected.masked_fill(~expected.any(-1, keepdim=True), True)
        mask = tiny(temporal)._attention_mask(embedding, resized[None])
        assert torch.equal(mask[:, 0], expected)


def test_a_query_with_nothing_left_attends_everywhere_judged_over_the_clip_or_over_its_frame():
    features = torch.tensor([[[[1.0, -1.0]], [[-1.0, -1.0]]]])  # B=1, T=2, C'=1, S=2: frame 1 is empty
    embedding = torch.ones(1, 1, 1)
    one_frame = tiny(False)._attention_mask(embedding, features)
    video = tiny(True)._attention_mask(embedding, features)
    assert one_frame.tolist() == [[[[True, False, False, False]]]]
    assert video.tolist() == [[[[True, False]]], [[[True, True]]]]


@BOTH
def test_skipping_early_heads_keeps_the_final_prediction(temporal):
    decoder = tiny(temporal).eval()
    maps, features = inputs(4)
    full, last = (decoder(maps, features, 2, all_layers=all_layers) for all_layers in (True, False))
    assert [len(output.clip) for output in (full, last)] == [5, 1]
    assert (full.frame is not None) == (last.frame is not None) == temporal
    assert_equal(
        last, type(last)(full.clip[-1:], None if full.frame is None else full.frame[-1:]), tolerance=0
    )
    assert len(decoder(maps, features, 2).clip) == 1
    assert len(decoder.train()(maps, features, 2).clip) == 5


@BOTH
@pytest.mark.parametrize('frames', [1, 2, 3])
@torch.no_grad()
def test_clips_of_a_batch_are_independent(temporal, frames):
    decoder = tiny(temporal).eval()
    maps, features = inputs(2 * frames)
    batch = decoder(maps, features, frames, all_layers=True)
    for b in range(2):
        own = slice(b * frames, (b + 1) * frames)
        single = decoder([x[own] for x in maps], features[own], frames, all_layers=True)
        part = type(batch)(
            [p.of(b) for p in batch.clip],
            None if batch.frame is None else [type(p)(*(x[own] for x in p)) for p in batch.frame],
        )
        assert_equal(single, part)


@torch.no_grad()
def test_the_order_of_frames_matters_to_the_one_frame_decoder_only():
    maps, features = inputs(3)
    order = [2, 0, 1]
    video, one_frame = tiny(True).eval(), tiny(False).eval()

    before, after = (video([x[o] for x in maps], features[o], 3) for o in (slice(None), order))
    torch.testing.assert_close(after.clip[-1].logits, before.clip[-1].logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.clip[-1].masks, before.clip[-1].masks[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.frame[-1].masks, before.frame[-1].masks[order], rtol=1e-4, atol=1e-4)

    before, after = (one_frame([x[o] for x in maps], features[o], 3) for o in (slice(None), order))
    assert not torch.allclose(after.clip[-1].logits, before.clip[-1].logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_frames_that_repeat_one_image_change_nothing_in_the_video_decoder():
    maps, features = inputs(1)
    decoder = tiny(True).eval()
    once = decoder(maps, features, 1)
    thrice = decoder([x.expand(3, -1, -1, -1) for x in maps], features.expand(3, -1, -1, -1), 3)
    torch.testing.assert_close(thrice.clip[-1].logits, once.clip[-1].logits, rtol=1e-5, atol=1e-5)
    for t in range(3):
        torch.testing.assert_close(thrice.clip[-1].masks[:, :, t], once.clip[-1].masks[:, :, 0], rtol=1e-5, atol=1e-5)


@BOTH
@torch.no_grad()
def test_permuted_queries_permute_predictions(temporal):
    decoder = tiny(temporal).eval()
    maps, features = inputs(2)
    before = decoder(maps, features, 2, all_layers=True)
    order = torch.randperm(8)
    decoder.query_feat.weight.copy_(decoder.query_feat.weight[order].clone())
    decoder.query_embed.weight.copy_(decoder.query_embed.weight[order].clone())
    after = decoder(maps, features, 2, all_layers=True)
    for x, y in zip(tensors(before), tensors(after)):
        torch.testing.assert_close(y, x[:, order], rtol=1e-4, atol=1e-4)


def test_combining_the_mean_equals_the_mean_of_combined_frames():
    temporal = TemporalAggregation(32, 4, 48).eval()
    clip, frames = torch.randn(2, 8, 32), torch.randn(2, 3, 8, 32)
    weight = temporal.frame_weight(frames).softmax(dim=1)
    expected = temporal.combine_norm(clip + (weight * temporal.frame_value(frames)).sum(dim=1))
    torch.testing.assert_close(temporal.combine(clip, frames), temporal.combine_ffn(expected), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize('in_channels', [None, 24])
def test_every_parameter_gets_a_gradient(temporal, in_channels):
    decoder = tiny(temporal, in_channels=in_channels).train()
    output = decoder(*inputs(4, channels=in_channels or 32), 2)
    sum((t * torch.randn_like(t)).sum() for t in tensors(output)).backward()
    idle = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Keys shift every score of a softmax row alike by their bias: its gradient is zero up to rounding, not absent.
    assert not [name for name in idle if not name.endswith('in_proj_bias')]
    assert bool(decoder.input_proj) == (in_channels is not None)


def test_frozen_inputs_need_no_graph():
    decoder = tiny(True).train()
    maps, features = inputs(2)
    output = decoder(maps, features, 2)
    assert all(not x.requires_grad for x in (*maps, features))
    assert all(t.requires_grad for t in tensors(output))


def test_dropout_acts_in_the_temporal_part_and_in_training_only():
    maps, features = inputs(2)
    decoder = tiny(True).train()
    first, second = (decoder(maps, features, 2).clip[-1].logits for _ in range(2))
    assert not torch.equal(first, second)
    decoder.eval()
    assert torch.equal(*(decoder(maps, features, 2).clip[-1].logits for _ in range(2)))
    still = tiny(True, temporal_dropout=0.0).train()
    assert torch.equal(*(still(maps, features, 2).clip[-1].logits for _ in range(2)))


@BOTH
def test_a_training_clip_of_another_length_is_an_error_that_says_so(temporal):
    decoder = tiny(temporal).train()
    maps, features = inputs(3)
    with pytest.raises(ConfigError, match=r'3 frames.*num_frames=2.*num_frames=3'):
        decoder(maps, features, 3)
    assert decoder.eval()(maps, features, 3).clip[-1].masks.shape == (1, 8, 3, 16, 24)
    with pytest.raises(ValueError, match='3 frames cannot be cut into clips of 2'):
        decoder(maps, features, 2)
    with pytest.raises(ValueError, match='takes 3 maps, got 2'):
        decoder(maps[:2], features, 3)


def test_registered_names_select_the_temporal_part_and_check_arguments():
    sizes = dict(num_classes=5, hidden_dim=32, num_queries=8, nheads=4, dec_layers=1, pre_norm=False, CONVS_DIM=256)
    one_frame = build(TRANSFORMER_DECODERS, dict(type='MultiScaleMaskedTransformerDecoder', **sizes), 'model')
    video = build(TRANSFORMER_DECODERS, dict(type='VideoMultiScaleMaskedTransformerDecoder', **sizes), 'model')
    assert one_frame.temporal is None and isinstance(video.temporal, TemporalAggregation)
    for wrong, message in (
        (dict(pre_norm=True), 'model.pre_norm: .* supports only False'),
        (dict(num_querys=3), "model.num_querys: .*did you mean 'num_queries'"),
        (dict(nheads=5), 'multiple of 4 and of nheads=5'),
        (dict(dec_layers=0), 'at least 1'),
    ):
        cfg = dict(type='VideoMultiScaleMaskedTransformerDecoder', **{**sizes, **wrong})
        with pytest.raises(ConfigError, match=message):
            build(TRANSFORMER_DECODERS, cfg, 'model')


def test_start_values_are_those_of_the_contract():
    decoder = MaskDecoder(124, temporal=True)
    for name, parameter in decoder.named_parameters():
        spread = parameter.detach().std().item() if parameter.numel() > 1 else 0.0
        if name in ('query_feat.weight', 'query_embed.weight', 'level_embed.weight'):
            assert spread == pytest.approx(1.0, abs=0.1), name
        elif 'head.' not in name and parameter.dim() == 2 and parameter.numel() > 256:
            fan_out, fan_in = parameter.shape
            assert spread == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02), name
        elif name.endswith(('in_proj_bias', 'out_proj.bias')):
            assert spread == 0.0, name


@BOTH
@pytest.mark.parametrize('training', [False, True])
def test_the_decoder_compiles_to_one_graph(temporal, training):
    decoder = tiny(temporal, temporal_dropout=0.0, dec_layers=1).train(training)
    maps, features = inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, backend='eager', fullgraph=True)
    assert_equal(compiled(maps, features, 2), decoder(maps, features, 2))


@BOTH
@torch.no_grad()
def test_bfloat16_autocast_stays_close(temporal):
    decoder = tiny(temporal).eval()
    maps, features = inputs(2)
    exact = decoder(maps, features, 2).clip[-1]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = decoder(maps, features, 2).clip[-1]
    assert half.masks.dtype == torch.bfloat16
    assert (half.logits.float() - exact.logits).abs().mean() < 0.05 * exact.logits.std()
