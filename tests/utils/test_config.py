"""Config files: the schema of the reference is accepted, and no wrong key passes in silence."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from PIL import Image

from mmseg.apis.test import check_model
from mmseg.config import OptionsAction, check_config, load_config, override
from mmseg.datasets import build_dataset
from mmseg.models import build_segmentor
from mmseg.utils.cli import ArgumentParser
from mmseg.utils.errors import ConfigError
from tests.vspw_fixture import write_vspw

CONFIGS = Path(__file__).parents[2] / 'local_configs' / 'themask'
TOOLS = Path(__file__).parents[2] / 'tools'
VIDEO_B1 = CONFIGS / 'video_themask_mit_b1.py'


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    load_config(path)


@pytest.mark.parametrize('name', ['1f_themask_mit_b1', 'video_themask_mit_b1'])
def test_reference_schema_is_accepted(reference, tmp_path, caplog, name):
    values = reference('config_values.json')[name]
    path = tmp_path / 'reference_config.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in values.items()))
    cfg = load_config(path)
    assert cfg.model.decode_head.loss_cfg.train_num_points == 12544
    assert not caplog.records, 'its own names at the top level are no slips'


@pytest.mark.parametrize('name', ['1f_themask_mit_b1', 'video_themask_mit_b1'])
def test_ours_has_the_values_of_the_reference(reference, name):
    """Keys that both have are equal; a key we lack is retired or derived, and one of a fixed list."""
    ours = load_config(CONFIGS / f'{name}.py')
    left_out = set()

    def compare(mine, theirs, where):
        if isinstance(theirs, dict):
            for key, value in theirs.items():
                if key not in mine:
                    left_out.add(key)
                elif key not in ('type', 'pretrained'):
                    compare(mine[key], value, f'{where}.{key}')
        elif isinstance(theirs, list):
            assert len(mine) == len(theirs), where
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                compare(a, b, f'{where}[{i}]')
        else:
            assert mine == theirs, where

    reference_values = reference('config_values.json')[name]
    for section in ('data', 'model', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'checkpoint_config'):
        compare(ours[section], reference_values[section], section)
    retired = {
        'style', 'img_dir', 'ann_dir', 'process_clips', 'meta_keys', 'input_shape', 'in_index', 'in_features',
        'loss_weight', 'ignore_value', 'deep_supervision', 'dec_layers', 'norm', 'transformer_in_features',
        'common_stride', 'CONVS_DIM', 'MASK_DIM', 'transformer_in_feature', 'pre_norm', 'enforce_input_project',
        'num_classes', 'warmup_iters', 'reduce_zero_label',
    }  # fmt: skip
    assert left_out <= retired, left_out - retired


@pytest.mark.parametrize(
    'options, said',
    [
        ({'runner.max_iter': 5}, "runner.max_iter: runner takes no argument 'max_iter' (did you mean 'max_iters'?)"),
        ({'modle.pretrained': None}, "unknown key 'modle' at the top level (did you mean 'model'?)"),
        ({'data.test.testsize': 4}, "(did you mean 'test_size'?)"),
        ({'data.train.dataset.dilatoin': [-3]}, "(did you mean 'dilation'?)"),
        ({'model.decode_head.num_query': 3}, "model.decode_head.num_query: THEMaskHead takes no argument 'num_query'"),
        ({'model.decode_head.transformer_decoder_cfg.num_frame': 2}, "(did you mean 'num_frames'?)"),
        ({'checkpoint_config.interval.x': 2}, "'checkpoint_config.interval' is 4000 and has no key 'x'"),
        ({'data.test.pipeline.7.type': 'Resize'}, "'7' is no index of the list data.test.pipeline of 2"),
        ({'optimizer_config.grad_clip.max_nrom': 1}, "(did you mean 'max_norm'?)"),
        ({'fp16.dtpye': 'bfloat16'}, "fp16.dtpye: fp16 takes no argument 'dtpye' (did you mean 'dtype'?)"),
        ({'lr_config.max_iters': 5}, "lr_config.max_iters: lr_config takes no argument 'max_iters'"),
        ({'model.decode_head.loss_cfg.matcher_cfg.dice_wieght': 1}, "(did you mean 'dice_weight'?)"),
        ({'optimizer.paramwise_cfg.custom_keys.norm.lr_mul': 1}, "(did you mean 'lr_mult'?)"),
        ({'model.backbone.type': 'mit_b9'}, "model.backbone.type: unknown backbone 'mit_b9' (did you mean 'mit_b"),
        ({'runner.max_iters': 'many'}, "runner.max_iters: expected int, at least 1, got 'many' (str)"),
    ],
)
def test_wrong_override_names_key_place_and_nearest(options, said):
    with pytest.raises(ConfigError) as error:
        load_config(VIDEO_B1, options)
    assert said in str(error.value)


def test_right_overrides_are_applied():
    cfg = load_config(
        VIDEO_B1,
        {
            'model.decode_head.transformer_decoder_cfg.num_frames': 2,
            'data.train.dataset.dilation': [-3],
            'runner.max_iters': 12000,
            'fp16.dtype': 'bfloat16',
            'evaluation.save_best': 'mIoU',
            'model.backbone.drop_path_rate': 0.2,
            'data.test.pipeline.1.flip': True,
        },
    )
    assert cfg.model.decode_head.transformer_decoder_cfg.num_frames == 2
    assert cfg.data.train.dataset.dilation == [-3]
    assert cfg.fp16.dtype == 'bfloat16'
    assert cfg.data.test.pipeline[1].flip is True


@pytest.mark.parametrize('options, key, value', [
    ({'data.train.dataset.dilation.0': -9}, 'data.train.dataset.dilation', [-9]),
    ({'data.train.dataset.pipeline.3.crop_size.1': 64}, 'data.train.dataset.pipeline.3.crop_size', (480, 64)),
    ({'data.train.dataset.pipeline.9.keys.1': 'x'}, 'data.train.dataset.pipeline.9.keys', ['img', 'x']),
    ({'workflow.0': ['train', 1]}, 'workflow', [['train', 1]]),
    ({'evaluation.metric': ['mIoU', 'x'], 'evaluation.metric.1': 'VC8'}, 'evaluation.metric', ['mIoU', 'VC8']),
    ({'log_config.hooks.0.interval': 5, 'log_config.hooks.0.by_epoch': False}, 'log_config.hooks.0.interval', 5),
    ({'runner': {'max_iters': 3}}, 'runner', {'type': 'IterBasedRunner', 'max_iters': 3}),
    ({'optimizer': {'_delete_': True, 'type': 'SGD', 'lr': 1}}, 'optimizer', {'type': 'SGD', 'lr': 1}),
    ({'finetune.copy.a': ['b']}, 'finetune', {'copy': {'a': ['b']}}),
])
def test_an_override_reaches_every_place(options, key, value):
    cfg = load_config(VIDEO_B1, options)
    found = cfg
    for part in key.split('.'):
        found = found[int(part)] if isinstance(found, (list, tuple)) else found[part]
    assert found == value and type(found) in (type(value), ConfigDict)


def test_an_override_changes_no_other_place_that_shares_a_value():
    cfg = load_config(VIDEO_B1)
    override(cfg, {'data.val.pipeline.0.type': 'LoadAnnotations', 'data.train.dataset.pipeline.9.keys.0': 'x'})
    assert cfg.data.test.pipeline[0].type == cfg.test_pipeline[0].type == 'LoadImageFromFile'
    assert cfg.train_pipeline[9]['keys'][0] == 'img' and cfg.data.train.dataset.pipeline[9]['keys'][0] == 'x'


@pytest.mark.parametrize('options, said', [
    ({'model.decode_head.num_classes': '5'}, "model.decode_head.num_classes: expected int, at least 1, got '5' (str)"),
    ({'model.decode_head.loss_cfg.round_weight': 1.0}, 'loss_cfg.round_weight: expected list of 2 (float, at least 0'),
    ({'model.decode_head.loss_cfg.matcher_cfg.mask_weight': float('nan')}, 'matcher_cfg.mask_weight: expected float'),
    ({'model.backbone.num_heads': (1, 3, 5, 8)}, 'model.backbone: mit_b1: 128 channels cannot be split into 3 heads'),
    ({'model.backbone.depths': 3}, 'model.backbone.depths: expected list of int, at least 1, got 3 (int)'),
    ({'model.test_cfg.crop_size': 'large'}, 'model.test_cfg.crop_size: expected int, at least 0 or list of 2'),
    ({'data.samples_per_gpu': None}, 'data.samples_per_gpu: expected int, at least 1, got None'),
    ({'data.train.times': 1.5}, 'data.train.times: expected int, at least 1, got 1.5 (float)'),
    ({'data.val.pipeline.1.img_scale.0': 'wide'}, 'data.val.pipeline[1].img_scale: expected list of 2'),
    ({'optimizer.betas': 0.9}, 'optimizer.betas: expected list of 2 (float'),
    ({'optimizer.lr': -1}, 'optimizer.lr: expected float, at least 0, got -1'),
    ({'evaluation.metric': None}, 'evaluation.metric: expected str or list of str, got None'),
    ({'lr_config.power': float('nan')}, 'lr_config.power: expected float, at least 0 or None, got nan'),
    ({'dist_params.port': 70000}, 'dist_params.port: expected int, at least 1, at most 65535 or None, got 70000'),
    ({'log_level': 'LOUD'}, "log_level: expected 'DEBUG' or"),
    ({'finetune.copy': {'a': 3}}, 'finetune.copy.a: expected str or list of str, got 3'),
    ({'train_cfg': 5}, 'train_cfg: expected dict'),
    ({'model.decode_head.transformer_decoder_cfg.pre_norm': True}, 'supports only False, got True; remove the key'),
])
def test_a_wrong_value_is_named_with_what_was_expected(options, said):
    with pytest.raises(ConfigError) as error:
        cfg = load_config(VIDEO_B1, {**options, 'fp16.dtype': 'bfloat16'})
        check_model(cfg)
    assert said in str(error.value)


def test_a_section_that_is_none_is_none():
    cfg = load_config(VIDEO_B1, dict.fromkeys(
        ('evaluation', 'dist_params', 'custom_hooks', 'optimizer_config.grad_clip', 'data.val', 'log_config.hooks')))
    assert not {'evaluation', 'dist_params'} & set(cfg) and 'val' not in cfg.data


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'c.py').write_text(f"_base_ = {str(VIDEO_B1)!r}\nwork_dir = '~/runs'\nnotes = '~'")
    cfg = load_config('~/c.py', {'model.pretrained': '~/mit.pth', 'data.test.data_root': '~/a~b'})
    assert (cfg.work_dir, cfg.model.pretrained, cfg.data.test.data_root, cfg.notes) == (
        f'{tmp_path}/runs', f'{tmp_path}/mit.pth', f'{tmp_path}/a~b', '~')
    parser = ArgumentParser()
    parser.add_argument('--out')
    OptionsAction.add_to(parser)
    args = parser.parse_args(['--out=~/o', '--options', 'load_from=~/x', 'y=a~/b'])
    assert (args.out, args.options) == (f'{tmp_path}/o', {'load_from': f'{tmp_path}/x', 'y': 'a~/b'})


def test_the_segmentation_settings_stand_in_one_place():
    cfg = load_config(VIDEO_B1, {'test_cfg.mode': 'slide', 'test_cfg.crop_size': 64, 'test_cfg.stride': 48})
    with pytest.raises(ConfigError, match=r"test_cfg: .*'slide'.* at the top level, but model.test_cfg is .*'whole'"):
        check_model(cfg)
    cfg.model.pop('test_cfg')
    with torch.device('meta'):
        model = build_segmentor(cfg.model, cfg.get('train_cfg'), cfg.test_cfg)
    assert (model.inference.window, model.inference.step) == ((64, 64), (48, 48))


def test_slip_at_the_top_level_is_a_warning_and_own_names_pass(caplog):
    with caplog.at_level(logging.WARNING, logger='mmseg'):
        check_config(Config({'optimizr': {}, 'my_learning_notes': 3, 'runner': {}, 'runnner': {}}))
    assert "'optimizr'" in caplog.text and "'optimizer'" in caplog.text
    assert "'runnner'" in caplog.text, 'a base config has most of the right keys, and the slip beside them'
    assert 'my_learning_notes' not in caplog.text


def parsed(*words):
    parser = argparse.ArgumentParser()
    OptionsAction.add_to(parser)
    return parser.parse_args(words).options


def test_options_are_read_as_by_mmcv():
    words = [
        'a=[-3]', 'b="[-9,-6]"', 'c=-6,-3', 'd=None', 'e=true', 'f=1e-4', 'g=(480,480)', 'h=[(1,2),x]', 'i=u=v', 'j=']
    assert parsed('--options', *words) == {
        'a': [-3], 'b': [-9, -6], 'c': [-6, -3], 'd': None, 'e': True, 'f': 1e-4, 'g': (480, 480), 'h': [(1, 2), 'x'],
        'i': 'u=v', 'j': ''}
    assert parsed('--options', 'a=1', 'b=1', '--cfg-options', 'b=2') == {'a': 1, 'b': 2}


def test_components_are_json_or_python():
    words = ['a=[{"type": "EMAHook", "momentum": 1e-3, "x": null}]', "b={'y': (1, None), 'z': True}", 'c=[1]', 'd=t{e}']
    assert parsed('--options', *words) == {
        'a': [dict(type='EMAHook', momentum=1e-3, x=None)], 'b': {'y': (1, None), 'z': True}, 'c': [1], 'd': 't{e}'}
    options = {'custom_hooks': [dict(type='EMAHook', momentum=1e-3)], 'data.train.dataset.label_map': {1: 0}}
    cfg = load_config(VIDEO_B1, options)
    assert cfg.custom_hooks[0].type == 'EMAHook' and cfg.data.train.dataset.label_map == {1: 0}
    with pytest.raises(ConfigError, match=r"custom_hooks\[0\].momentun.*did you mean 'momentum'"):
        load_config(VIDEO_B1, {'custom_hooks': [dict(type='EMAHook', momentun=1)]})


@pytest.mark.parametrize('word', ['runner.max_iters', '=5', 'a=[1,(2]', 'a={"x": 1', "a=[{'x'}, f()]"])
def test_a_word_that_is_no_option_ends_the_command_with_a_sentence(word, capsys):
    with pytest.raises(SystemExit, match='2'):
        parsed('--options', word)
    assert 'error: argument --options: ' in capsys.readouterr().err


@pytest.mark.parametrize('name, files', {
    'train': ['c.py'], 'test': ['c.py', 'x.pth'], 'benchmark': ['c.py'], 'browse_dataset': ['c.py'],
    'get_flops': ['c.py'], 'print_config': ['c.py'], 'report': ['run'], 'video_demo': ['c.py', 'x.pth', 'v.mp4'],
}.items())
def test_the_tools_take_the_same_options(name, files, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(f'{name}_tool', TOOLS / f'{name}.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for option in ('--options', '--cfg-options'):
        monkeypatch.setattr(sys, 'argv', [name, *files, option, 'data.test.test_size=4', 'runner.max_iters'])
        with pytest.raises(SystemExit, match='2'):
            tool.main()
        assert f"error: argument {option}: expected KEY=VALUE, got 'runner.max_iters'" in capsys.readouterr().err


def test_an_override_inside_a_section_that_is_none_is_an_error():
    cfg = Config({'runner': None})
    with pytest.raises(ConfigError, match='runner'):
        override(cfg, {'runner.max_iters': 3})


def test_step_of_a_pipeline_is_checked_where_it_stands():
    with pytest.raises(ConfigError, match=r'data\.train\.dataset\.pipeline\[3\].*crop_sise'):
        cfg = load_config(VIDEO_B1)
        cfg.data.train.dataset.pipeline[3]['crop_sise'] = (1, 1)
        check_config(cfg)


@pytest.mark.parametrize('text', ['model = dict(', 'raise ValueError("x")'])
def test_broken_or_missing_file_is_named(tmp_path, text):
    path = tmp_path / 'broken.py'
    with pytest.raises(ConfigError, match='does not exist'):
        load_config(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r'broken\.py'):
        load_config(path)


def test_what_is_no_readable_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r'is a folder; name the \.py file in it'):
        load_config(tmp_path)
    path = tmp_path / 'latin.py'
    path.write_bytes("runner = dict()  # gr\xf6\xdfer".encode('latin-1'))
    with pytest.raises(ConfigError, match=r'latin\.py.*UTF-8'):
        load_config(path)
    path.write_text('import sys\nsys.exit(3)')
    with pytest.raises(ConfigError, match=r'latin\.py.*SystemExit'):
        load_config(path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(Config, 'fromfile', refuse)
    with pytest.raises(ConfigError, match=r'latin\.py.*Permission denied'):
        load_config(path)


def test_a_config_is_a_program_that_may_import_packages(tmp_path):
    path = tmp_path / 'program.py'
    path.write_text("import numpy as np\nrunner = dict(type='IterBasedRunner', max_iters=int(np.ceil(3.2)))")
    assert load_config(path).runner.max_iters == 4


def test_dumped_config_loads_again(tmp_path):
    cfg = load_config(VIDEO_B1)
    cfg.dump(str(tmp_path / 'dumped.py'))
    assert load_config(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


def sizes_of(cfg):
    train, test = cfg.data.train.dataset.pipeline, cfg.data.test.pipeline
    roots = {part.data_root for part in (cfg.data.train.dataset, cfg.data.val, cfg.data.test)}
    return (train[2].img_scale, train[2].ratio_range, train[3].crop_size, train[7].size, test[1].img_scale, *roots)


def test_a_data_set_of_another_size_is_a_few_lines(tmp_path):
    """No pipeline is copied: a key at the top level is meant wherever the base config refers to it."""
    path = tmp_path / 'own.py'
    path.write_text(f"""
_base_ = {str(VIDEO_B1)!r}
data_root = 'data/mine'
img_scale = (640, 360)
crop_size = (320, 320)
""")
    expected = ((640, 360), (0.5, 2.0), (320, 320), (320, 320), (640, 360), 'data/mine')
    assert sizes_of(load_config(path)) == expected
    options = {'crop_size': (96, 128), 'data_root': 'there', 'data.train.dataset.pipeline.7.size': (9, 9)}
    cfg = load_config(path, options)
    assert sizes_of(cfg) == ((640, 360), (0.5, 2.0), (96, 128), (9, 9), (640, 360), 'there')
    loaded = Config.fromfile(str(path))  # as a program may give it to init_segmentor
    override(loaded, {})
    assert sizes_of(loaded) == expected


@pytest.mark.parametrize('text, message', [
    ("crop = (9, 9)\nx = [dict(size='${crops}')]", r"x\[0\].size: '\${crops}' stands for the key 'crops'.*mean 'crop'"),
    ("a = '${b}'\nb = '${a}'", "holds references itself"),
])
def test_a_variable_that_is_not_there(tmp_path, text, message):
    path = tmp_path / 'own.py'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_other_text_with_dollars_is_left_alone(tmp_path):
    path = tmp_path / 'own.py'
    path.write_text("work = dict(dir='${HOME}/x', price='$5', empty='${}')")
    assert load_config(path).work.to_dict() == dict(dir='${HOME}/x', price='$5', empty='${}')


def test_the_base_pipelines_leave_the_labels_to_the_data_set(tmp_path):
    """``reduce_zero_label`` is set on the data set alone, as the README says."""
    root = write_vspw(tmp_path / 'data', {'train': {'a': 3}})
    cfg = load_config(CONFIGS / 'mini_1f.py', {'data_root': str(root)})
    names = [f'c{i}' for i in range(125)]
    own = dict(cfg.data.train.dataset, type='VideoDataset', classes=names, palette=[[0, 0, 0]] * 125)
    raw = np.array(Image.open(root / 'data/a/mask/00000002.png'))
    for reduce, expected in ((False, raw), (True, np.where(raw == 0, 255, raw - 1))):
        dataset = build_dataset({**own, 'reduce_zero_label': reduce})
        load = dataset.pipeline.transforms[1]
        labels = load(dict(masks=dataset.mask_path('a', '00000002'), reduce_zero_label=dataset.reduce_zero_label))
        assert (labels['gt_semantic_seg'] == expected).all()


def test_the_page_of_all_keys_is_what_the_signatures_say():
    docs = Path(__file__).parents[2] / 'docs'
    spec = importlib.util.spec_from_file_location('make_configs', docs / 'make_configs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (docs / 'configs.md').read_text(), 'python docs/make_configs.py > docs/configs.md'
