"""Fine-tuning: what is loaded, copied, kept fresh, frozen; and what is said about it."""

import pytest
import torch
from mmengine.config import Config

from mmseg.core import FinetuneConfig, freeze, load_for_finetune
from mmseg.core.finetune import freeze_named, frozen_parts, warn_of_unused
from mmseg.models import build_segmentor
from mmseg.registry import build
from mmseg.utils.errors import CheckpointError, ConfigError
from tests.engine import Model
from tests.reference import recipe

COPIES = dict(decoder_norm=['decoder_norm1', 'decoder_norm2'], class_embed='class_embed_aux')


def tiny(stage, **options):
    cfg = Config.fromfile(f'local_configs/themask/{stage}_themask_mit_b0.py')
    cfg.merge_from_dict({
        'model.pretrained': None,
        'model.decode_head.pixel_decoder_cfg': dict(conv_dim=32, mask_dim=32, transformer_enc_layers=1),
        'model.decode_head.transformer_decoder_cfg': dict(
            hidden_dim=32, mask_dim=32, num_queries=8, nheads=4, dec_layers=2),
        'model.decode_head.loss_cfg.train_num_points': 64, **options})
    torch.manual_seed(1)
    return build_segmentor(cfg.model)


@pytest.mark.parametrize('stage', ['1f', 'video'])
def test_what_stays_trainable_equals_the_reference(reference, stage):
    cfg = Config.fromfile(f'local_configs/themask/{stage}_themask_mit_b0.py')
    cfg.model.pretrained = None
    model = build_segmentor(cfg.model)
    _, trained = freeze(model, ('predictor',))
    recorded = reference(f'keys_{stage}_b0.json')['finetune_trainable']
    assert set(trained) == {name for name in recorded if 'reference_points' not in name}
    assert sum(p.requires_grad for p in model.parameters()) == len(trained)


def test_a_synthetic_reference_checkpoint_starts_a_video_model(reference):
    """Stage 1 -> stage 2 with the names and shapes of the reference, its dead tensors included."""
    keys = reference('keys_1f_b0.json')['state_dict']
    weights = {name: torch.from_numpy(v) for name, v in recipe.fill(dict(keys)).items()}
    cfg = Config.fromfile('local_configs/themask/video_themask_mit_b0.py')
    cfg.model.pretrained = None
    model = build_segmentor(cfg.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_for_finetune(model, weights, FinetuneConfig())
    after = model.state_dict()

    shared = [name for name in after if name in weights]
    assert sorted(report.loaded) == sorted(shared)
    assert all(torch.equal(after[name], weights[name]) for name in shared)
    assert sorted(report.missing) == sorted(set(after) - set(weights))
    assert all(torch.equal(after[name], before[name]) for name in report.missing)
    assert {name.rpartition('.')[0] for name in report.unexpected} == {'decode_head.predictor.decoder_norm'}
    text = '\n'.join(report.lines())
    assert 'decoder_norm.* 2' in text and 'backbone.* 176' in text and 'conv_seg' not in text


def test_copies_fill_the_new_twins():
    one_frame, model = tiny('1f'), tiny('video')
    weights = one_frame.state_dict()
    report = load_for_finetune(model, weights, FinetuneConfig(copy=COPIES))
    after = model.state_dict()
    head = 'decode_head.predictor.'
    for source, target in (('decoder_norm', 'decoder_norm1'), ('decoder_norm', 'decoder_norm2'),
                           ('class_embed', 'class_embed_aux')):
        for kind in ('weight', 'bias'):
            assert torch.equal(after[f'{head}{target}.{kind}'], weights[f'{head}{source}.{kind}'])
            assert report.copied[f'{head}{target}.{kind}'] == f'{head}{source}.{kind}'
    assert not report.unexpected
    assert not any('decoder_norm' in name or 'class_embed' in name for name in report.missing)


def test_a_tensor_of_the_checkpoint_goes_before_a_copy():
    weights = tiny('video').state_dict()
    weights['decode_head.predictor.class_embed_aux.bias'] += 5
    model = tiny('video')
    report = load_for_finetune(model, weights, FinetuneConfig(copy=COPIES))
    assert not report.copied
    name = 'decode_head.predictor.class_embed_aux.bias'
    assert torch.equal(model.state_dict()[name], weights[name])


def test_fresh_parts_keep_their_start_values():
    model, weights = tiny('video'), tiny('video').state_dict()
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_for_finetune(model, weights, FinetuneConfig(fresh=('class_embed', 'query_feat')))
    after = model.state_dict()
    assert report.fresh and all('class_embed' in name or 'query_feat' in name for name in report.fresh)
    for name in after:
        assert torch.equal(after[name], before[name] if name in report.fresh else weights[name]), name


def test_another_number_of_classes_is_reported_and_left_out():
    weights = tiny('1f').state_dict()
    model = tiny('1f', **{'model.decode_head.num_classes': 7})
    report = load_for_finetune(model, weights, FinetuneConfig())
    assert [text for text in report.mismatched if 'class_embed.bias (125,) there, (8,) here' in text]
    assert 'class_embed.bias (125,) there, (8,) here' in '\n'.join(report.lines())


def test_a_frozen_part_without_weights_is_an_error():
    weights = tiny('1f', **{'model.backbone.type': 'mit_b1'}).state_dict()
    with pytest.raises(CheckpointError, match=r'frozen.*another backbone.*backbone\.patch_embed1'):
        load_for_finetune(tiny('1f'), weights, FinetuneConfig())
    load_for_finetune(tiny('1f'), {}, FinetuneConfig(train=('',)))  # nothing is frozen


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match=r"'predictr'"):
        load_for_finetune(Model(), Model().state_dict(), FinetuneConfig(train='predictr'))


def test_frozen_parts_build_no_graph_and_trained_ones_get_their_gradients():
    model = tiny('video')
    load_for_finetune(model, tiny('1f').state_dict(), FinetuneConfig())
    model.train()
    graphs = {}
    model.backbone.register_forward_hook(lambda m, args, out: graphs.update(backbone=[o.requires_grad for o in out]))
    model.decode_head.pixel_decoder.register_forward_hook(
        lambda m, args, out: graphs.update(pixel=[out[0].requires_grad, *(o.requires_grad for o in out[1])]))
    losses = model.loss(torch.randn(1, 1, 3, 64, 64), torch.randint(0, 5, (1, 1, 64, 64)), 0)
    sum(losses.values()).backward()
    assert not any(graphs['backbone']) and not any(graphs['pixel'])
    assert all((p.grad is not None) == ('predictor' in name) for name, p in model.named_parameters())


def test_frozen_parts_are_the_largest_modules_without_training():
    model = tiny('video')
    freeze(model, ('predictor',))
    assert frozen_parts(model) == [model.backbone, model.decode_head.pixel_decoder]


@pytest.mark.parametrize('section, said', [(None, False), ({}, False), ({'frozen_eval': True}, True)])
def test_a_section_without_its_start_weights_is_a_warning(caplog, section, said):
    warn_of_unused(section)
    assert ('--finetune-from' in caplog.text) == said


@pytest.mark.parametrize('section, key', [
    ({'trains': ['x']}, "trains: .*did you mean 'train'"), ({'train': 3}, 'train: expected str or list of str'),
    ({'fresh': [1]}, 'fresh'), ({'copy': ['a']}, 'copy: expect'), ({'copy': {'a': {}}}, r'copy\.a'),
    ({'frozen_eval': 1}, 'frozen_eval: expected bool')])
def test_wrong_keys_and_values_are_refused(section, key):
    with pytest.raises(ConfigError, match=f'finetune.{key}'):
        build(FinetuneConfig, section, 'finetune')


def test_parts_may_be_frozen_in_any_training():
    model = Model()
    assert freeze_named(model, ['backbone', 'norm.bias']) == ['backbone.weight', 'backbone.bias', 'norm.bias']
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        'norm.weight', 'predictor.weight', 'predictor.bias']
    assert freeze_named(model, []) == []
    with pytest.raises(ConfigError, match="freeze: no parameter name holds 'bakbone'"):
        freeze_named(model, ['bakbone'])
    with pytest.raises(ConfigError, match='leaves nothing to train'):
        freeze_named(model, ['.'])
