"""MiT: parity with the reference, state-dict names, options."""

import copy

import pytest
import torch

from mmseg.models.backbones import VARIANTS, MixTransformer, mit_b0
from mmseg.registry import BACKBONES, build
from mmseg.utils.errors import ConfigError
from tests.reference import recipe

TINY = dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


def filled(module, prefix):
    """The module with the reference's deterministic weights."""
    values = recipe.fill({f'{prefix}.{k}': v for k, v in module.state_dict().items()})
    module.load_state_dict({k[len(prefix) + 1:]: torch.from_numpy(v) for k, v in values.items()})
    return module.eval()


@pytest.mark.parametrize('seed, size', [(11, (96, 160)), (12, (100, 150))])
def test_b0_equals_the_reference(reference, seed, size):
    gold = reference('backbone_b0.npz')
    images = torch.from_numpy(recipe.image(seed, 2, 3, *size))
    with torch.no_grad():
        maps = filled(mit_b0(), 'backbone')(images)
    for i, x in enumerate(maps, 1):
        difference, _ = recipe.check(gold, f'{size[0]}x{size[1]}/c{i}', x.numpy())
        assert difference <= 1e-5


@pytest.mark.parametrize('name', ['b0', 'b1', 'b2', 'b5'])
def test_names_and_shapes_equal_the_reference(reference, name):
    expected = {k: tuple(s) for k, s in reference(f'keys_1f_{name}.json')['state_dict'] if k.startswith('backbone.')}
    with torch.device('meta'):
        model = build(BACKBONES, dict(type=f'mit_{name}', style='pytorch'), 'backbone')
    assert {f'backbone.{k}': tuple(v.shape) for k, v in model.state_dict().items()} == expected


def test_every_variant_states_its_maps():
    for name, row in VARIANTS.items():
        with torch.device('meta'):
            model = build(BACKBONES, dict(type=name), 'backbone')
        assert model.out_channels == row['embed_dims']
        assert model.out_strides == (4, 8, 16, 32)


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match=r"backbone\.embed_dim: mit_b0 .*did you mean 'embed_dims'"):
        build(BACKBONES, dict(type='mit_b0', embed_dim=(8, 8, 8, 8)), 'backbone')
    with pytest.raises(ConfigError, match='style'):
        build(BACKBONES, dict(type='mit_b0', style='caffe'), 'backbone')
    with pytest.raises(ValueError, match='depths'):
        MixTransformer(embed_dims=(8, 8, 8, 8), depths=(1, 1))
    with pytest.raises(ValueError, match='heads'):
        MixTransformer(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 3, 1, 1))


def test_maps_follow_odd_sizes_and_images_are_independent():
    model = mit_b0(**TINY).eval()
    images = torch.randn(3, 3, 61, 87)
    with torch.no_grad():
        batch = model(images)
        single = model(images[1:2])
    assert [tuple(x.shape[1:]) for x in batch] == [(8, 16, 22), (16, 8, 11), (20, 4, 6), (32, 2, 3)]
    for b, s in zip(batch, single):
        torch.testing.assert_close(b[1:2], s, atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_memory_only():
    plain = mit_b0(**TINY, drop_path_rate=0.5).train()
    lean = copy.deepcopy(plain)
    lean.with_cp = True
    images = torch.randn(2, 3, 64, 64)
    saved = []
    for model in (plain, lean):
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total = sum(x.square().mean() for x in model(images))
        saved.append(kept)
        total.backward()
    assert saved[1] < saved[0]
    for (name, p), q in zip(plain.named_parameters(), lean.parameters()):
        assert p.grad is not None and p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_drop_path_rises_over_all_blocks_and_keeps_the_mean():
    model = mit_b0(**TINY, drop_path_rate=0.4)
    rates = [m.drop_path.rate for m in model.modules() if hasattr(m, 'drop_path')]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop = [m.drop_path for m in model.modules() if hasattr(m, 'drop_path')][-1].train()
    out = drop(torch.ones(4000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (out.flatten(1).amax(1) == out.flatten(1).amin(1)).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert (drop.eval()(torch.ones(3, 2)) == 1).all()


def test_start_values():
    model = mit_b0()
    weight = model.block4[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    depthwise = model.block4[0].mlp.dwconv.dwconv
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.patch_embed4.proj.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith('bias'))
