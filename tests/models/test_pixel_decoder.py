"""Positions, deformable attention module and pixel decoder."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmseg.models.decode_heads import pixel_decoder as msdeformattn
from mmseg.models.decode_heads.mask2former.pixel_decoder.ops import ms_deform_attn_fused
from mmseg.models.decode_heads.pixel_decoder import MSDeformAttn, MSDeformAttnPixelDecoder
from mmseg.models.decode_heads.position_encoding import pixel_centres, sine_position_2d, sine_position_3d
from mmseg.registry import PIXEL_DECODERS, build
from mmseg.utils.errors import ConfigError
from tests.reference import recipe


def assert_close(gold, name, array, tolerance):
    difference, _ = recipe.check(gold, name, array.detach().numpy())
    assert difference <= tolerance, f'{name}: {difference}'


def test_positions_equal_the_reference(reference):
    gold = reference('position.npz')
    assert_close(gold, 'pe2d_6x10', sine_position_2d(6, 10, 256, 'cpu').expand(2, -1, -1, -1), 1e-5)
    assert_close(gold, 'pe2d_7x5', sine_position_2d(7, 5, 256, 'cpu')[None], 1e-5)
    for frames in (1, 2, 4):
        assert_close(gold, f'pe3d_t{frames}_4x6', sine_position_3d(frames, 4, 6, 256, 'cpu')[None], 1e-5)
    assert_close(gold, 'pe3d_b2_t2_4x6', sine_position_3d(2, 4, 6, 256, 'cpu').expand(2, -1, -1, -1, -1), 1e-5)


def test_positions_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        sine_position_2d(3, 9, 8, 'cpu')
    weight = torch.ones(8, 3, 9, requires_grad=True)
    (weight * sine_position_2d(3, 9, 8, 'cpu')).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_only_real_positions_are_kept_and_not_too_many():
    with FakeTensorMode():
        assert isinstance(sine_position_2d(5, 13, 8, 'cpu'), FakeTensor)
    first = sine_position_2d(5, 13, 8, 'cpu')
    assert type(first) is torch.Tensor and first.isfinite().all()
    assert sine_position_2d(5, 13, 8, 'cpu').data_ptr() == first.data_ptr()
    for width in range(20, 60):
        sine_position_2d(5, width, 8, 'cpu')
    again = sine_position_2d(5, 13, 8, 'cpu')
    assert again.data_ptr() != first.data_ptr() and torch.equal(again, first)


def test_position_rejects_odd_channels():
    with pytest.raises(ValueError, match='multiple of 4'):
        sine_position_2d(3, 3, 6, 'cpu')


def test_pixel_centres():
    centres = pixel_centres(((1, 2), (2, 1)), torch.device('cpu'))
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert pixel_centres(((1, 2), (2, 1)), torch.device('cpu')) is centres and not centres.requires_grad


B0_SHAPE = {f'res{i + 2}': dict(channels=c, stride=4 << i) for i, c in enumerate((32, 64, 160, 256))}
TINY_SHAPE = {f'res{i + 2}': dict(channels=c, stride=4 << i) for i, c in enumerate((8, 12, 16, 20))}
TINY = dict(conv_dim=32, mask_dim=16, transformer_nheads=4, transformer_dim_feedforward=40, transformer_enc_layers=2)


def filled(module, prefix):
    """The module with the reference's deterministic weights."""
    values = recipe.fill({f'{prefix}.{k}': v for k, v in module.state_dict().items()})
    module.load_state_dict({k[len(prefix) + 1:]: torch.from_numpy(v) for k, v in values.items()})
    return module.eval()


def tiny_features(n, height, width):
    sizes = [(s['channels'], -(-height // s['stride']), -(-width // s['stride'])) for s in TINY_SHAPE.values()]
    return [torch.randn(n, *size) for size in sizes]


def test_attention_module_equals_the_reference(reference):
    shapes = [(3, 5), (6, 10), (12, 20)]
    tokens = sum(h * w for h, w in shapes)
    module = filled(MSDeformAttn(256, 3, 8), 'decode_head.pixel_decoder.transformer.encoder.layers.0.self_attn')
    query, source = (torch.from_numpy(recipe.image(seed, 2, tokens, 256)) for seed in (22, 23))
    points = torch.from_numpy(np.random.default_rng(24).random((2, tokens, 3, 2), dtype=np.float32))
    with torch.no_grad():
        assert_close(reference('msdeform.npz'), 'module', module(query, points, source, shapes), 1e-5)


def deformable_attention():
    """A module whose offsets depend on queries, and its arguments."""
    shapes = (3, 5), (6, 10), (12, 20)
    module = filled(MSDeformAttn(256, 3, 8), 'attention').train()
    query, source = torch.randn(2, 2, 315, 256)
    return module, (query, pixel_centres(shapes, torch.device('cpu'))[None, :, None].repeat(1, 1, 3, 1), source, shapes)


def test_attention_under_autocast_gives_the_numbers_of_float32_inputs(backend, monkeypatch):
    """Bit for bit what the op's own autocast rule gives, which casts all inputs to float32."""
    module, arguments = deformable_attention()
    types, results = [], []

    def noted(*inputs):
        out = ms_deform_attn_fused(*inputs)
        types.append((inputs[0].dtype, out.dtype))
        return out

    monkeypatch.setattr(msdeformattn, 'ms_deform_attn_fused', noted)
    for context in (msdeformattn.without_autocast, lambda x: contextlib.nullcontext()):
        monkeypatch.setattr(msdeformattn, 'without_autocast', context)
        module.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            out = module(*arguments)
        out.float().square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in module.parameters())])
    assert types == [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    for ours, expected in zip(*results):
        assert expected.any() and torch.equal(ours, expected)


@pytest.mark.parametrize('low', [False, True])
@pytest.mark.usefixtures('backend')
def test_attention_compiles_into_one_graph(low):
    module, arguments = deformable_attention()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    for training in (False, True):
        with torch.set_grad_enabled(training), torch.autocast('cpu', torch.bfloat16, enabled=low):
            out = compiled(*arguments)
            assert out.dtype == (torch.bfloat16 if low else torch.float32)
            torch.testing.assert_close(out, module(*arguments))


@pytest.mark.parametrize('low', [False, True])
def test_attention_knows_devices_without_autocast(low):
    module, (query, points, source, shapes) = deformable_attention()
    with torch.autocast('cpu', torch.bfloat16, enabled=low):
        assert module.to('meta')(query.to('meta'), points.to('meta'), source.to('meta'), shapes).shape == query.shape


@pytest.mark.parametrize('seed, size', [(31, (96, 160)), (41, (100, 150))])
@pytest.mark.usefixtures('backend')
def test_pixel_decoder_equals_the_reference(reference, seed, size):
    gold = reference('pixel_decoder_b0.npz')
    module = filled(MSDeformAttnPixelDecoder(B0_SHAPE), 'decode_head.pixel_decoder')
    features = {
        name: torch.from_numpy(recipe.image(seed + i, 2, s['channels'], *(-(-side // s['stride']) for side in size)))
        for i, (name, s) in enumerate(B0_SHAPE.items())
    }
    with torch.no_grad():
        mask_features, maps = module(features)
    assert_close(gold, f'{size[0]}x{size[1]}/mask_features', mask_features, 5e-5)
    for i, x in enumerate(maps):
        assert_close(gold, f'{size[0]}x{size[1]}/ms{i}', x, 5e-5)


def test_names_and_shapes_equal_the_reference(reference):
    prefix = 'decode_head.pixel_decoder.'
    expected = {k: tuple(s) for k, s in reference('keys_1f_b0.json')['state_dict'] if k.startswith(prefix)}
    module = MSDeformAttnPixelDecoder(B0_SHAPE)
    assert {prefix + k: tuple(v.shape) for k, v in module.state_dict().items()} == expected


def test_images_are_independent_and_a_list_equals_a_mapping():
    module = MSDeformAttnPixelDecoder(TINY_SHAPE, **TINY).eval()
    features = tiny_features(3, 49, 70)
    with torch.no_grad():
        mask_features, maps = module(features)
        one_mask_features, one_maps = module({k: x[1:2] for k, x in zip(TINY_SHAPE, features)})
    for batch, one in zip([mask_features, *maps], [one_mask_features, *one_maps]):
        torch.testing.assert_close(batch[1:2], one, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    plain = filled(MSDeformAttnPixelDecoder(TINY_SHAPE, **TINY), 'tiny').train()  # offsets depend on queries from here
    lean = copy.deepcopy(plain)
    lean.encoder.with_cp = True
    features = tiny_features(1, 64, 64)
    kept = []
    for module in (plain, lean):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            mask_features, maps = module(features)
        kept.append(sum(sizes))
        (mask_features.square().sum() + sum(x.square().sum() for x in maps)).backward()
    assert kept[1] < kept[0]
    for (name, p), q in zip(plain.named_parameters(), lean.parameters()):
        assert p.grad is not None and p.grad.any(), name
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_attention_starts_on_eight_directions():
    offsets = MSDeformAttn(64, 3, 8).sampling_offsets.bias.view(8, 3, 4, 2)
    assert offsets[1, 2].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert offsets.abs().amax(-1)[:, :, 3].eq(4).all()


def test_wrong_configs_are_named():
    def tiny(**changes):
        return build(PIXEL_DECODERS, dict(type='MSDeformAttnPixelDecoder', **{**TINY, **changes}), 'pixel_decoder_cfg',
                     input_shape=TINY_SHAPE)

    tiny(norm='GN')
    with pytest.raises(ConfigError, match=r"pixel_decoder_cfg\.norm: .* supports only 'GN'"):
        tiny(norm='BN')
    with pytest.raises(ConfigError, match='multiple of 32'):
        tiny(conv_dim=48)
    with pytest.raises(ConfigError, match='common_stride=8'):
        tiny(common_stride=8)
    with pytest.raises(ConfigError, match='transformer_nheads'):
        tiny(transformer_nheads=5)
