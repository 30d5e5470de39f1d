"""Config files: the schema of the reference is accepted, and no wrong key passes in silence."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg.utils.config import OptionsAction, check_config, load_config, override
from mmseg.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / 'local_configs' / 'themask'
TOOLS = Path(__file__).parents[1] / 'tools'
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
        'num_classes', 'warmup_iters',
    }  # fmt: skip
    assert left_out <= retired, left_out - retired


@pytest.mark.parametrize(
    'options, said',
    [
        ({'runner.max_iter': 5}, "unknown key 'max_iter' in runner (did you mean 'max_iters'?)"),
        ({'modle.pretrained': None}, "unknown key 'modle' at the top level (did you mean 'model'?)"),
        ({'data.test.testsize': 4}, "(did you mean 'test_size'?)"),
        ({'data.train.dataset.dilatoin': [-3]}, "(did you mean 'dilation'?)"),
        ({'model.decode_head.num_query': 3}, "unknown key 'num_query' in model.decode_head"),
        ({'model.decode_head.transformer_decoder_cfg.num_frame': 2}, "(did you mean 'num_frames'?)"),
        ({'checkpoint_config.interval.x': 2}, "'checkpoint_config.interval' is a plain value and has no key 'x'"),
        ({'data.test.pipeline.7.type': 'Resize'}, "'7' is no index of the list data.test.pipeline of 2"),
        ({'optimizer_config.grad_clip.max_nrom': 1}, "(did you mean 'max_norm'?)"),
        ({'fp16.dtpye': 'bfloat16'}, "unknown key 'dtpye' in fp16 (did you mean 'dtype'?)"),
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


@pytest.mark.parametrize('word', ['runner.max_iters', '=5', 'a=[1,(2]'])
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
        cfg = Config.fromfile(str(VIDEO_B1))
        cfg.data.train.dataset.pipeline[3]['crop_sise'] = (1, 1)
        check_config(cfg)


def test_retired_argument_with_another_value_is_an_error():
    with pytest.raises(ConfigError, match='pre_norm'):
        load_config(VIDEO_B1, {'model.decode_head.transformer_decoder_cfg.pre_norm': True})


@pytest.mark.parametrize('text', ['model = dict(', 'raise ValueError("x")'])
def test_broken_or_missing_file_is_named(tmp_path, text):
    path = tmp_path / 'broken.py'
    with pytest.raises(ConfigError, match='does not exist'):
        load_config(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r'broken\.py'):
        load_config(path)


def test_a_config_is_a_program_that_may_import_packages(tmp_path):
    path = tmp_path / 'program.py'
    path.write_text("import numpy as np\nrunner = dict(type='IterBasedRunner', max_iters=int(np.ceil(3.2)))")
    assert load_config(path).runner.max_iters == 4


def test_dumped_config_loads_again(tmp_path):
    cfg = load_config(VIDEO_B1)
    cfg.dump(str(tmp_path / 'dumped.py'))
    assert load_config(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()
