"""Checkpoints of other projects: every name is accounted for, and what is renamed keeps its values."""

from __future__ import annotations

import collections
import errno
import itertools
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.apps.convert import convert_state_dict, read_weights, write_weights
from mmseg.models.backbones.mit import MixTransformer
from mmseg.utils import files
from mmseg.utils.errors import CheckpointError
from tests.tool_process import run_tool
from tools import convert_checkpoint

DEAD = ('conv_seg', 'reference_points')


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes}


def without_dead(state):
    return {name: value for name, value in state.items() if not any(word in name.split('.') for word in DEAD)}


def assert_equal(got, want):
    assert list(got) == list(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def tiny_backbone():
    return MixTransformer(embed_dims=(8, 16, 24, 32), depths=(1, 2, 11, 1), num_heads=(1, 2, 3, 4))


def hugging_face(backbone):
    """State dict of transformers' SegformerForImageClassification with the weights of ``backbone``."""
    state = {}
    words = {'attn.q': 'attention.self.query', 'attn.sr': 'attention.self.sr', 'attn.norm': 'attention.self.layer_norm',
             'attn.proj': 'attention.output.dense', 'norm1': 'layer_norm_1', 'norm2': 'layer_norm_2',
             'mlp.fc1': 'mlp.dense1', 'mlp.fc2': 'mlp.dense2', 'mlp.dwconv.dwconv': 'mlp.dwconv.dwconv'}
    for name, value in backbone.state_dict().items():
        part, *middle, kind = name.split('.')
        stage = int(part[-1]) - 1
        if part.startswith('patch_embed'):
            inner = {'proj': 'proj', 'norm': 'layer_norm'}[middle[0]]
            state[f'segformer.encoder.patch_embeddings.{stage}.{inner}.{kind}'] = value
        elif part.startswith('norm'):
            state[f'segformer.encoder.layer_norm.{stage}.{kind}'] = value
        else:
            prefix = f'segformer.encoder.block.{stage}.{middle[0]}'
            inner = '.'.join(middle[1:])
            if inner == 'attn.kv':
                half = len(value) // 2
                state[f'{prefix}.attention.self.key.{kind}'] = value[:half]
                state[f'{prefix}.attention.self.value.{kind}'] = value[half:]
            else:
                state[f'{prefix}.{words[inner]}.{kind}'] = value
    return state | {'classifier.weight': torch.rand(10, 32), 'classifier.bias': torch.rand(10)}


@pytest.mark.parametrize('name', ['1f_b0', '1f_b5', 'video_b0', 'video_b1', 'video_b2', 'video_b5'])
def test_reference_there_and_back(reference, name):
    state = tensors([(k, s) for k, s in reference(f'keys_{name}.json')['state_dict'] if k.startswith('decode_head')])
    ours, report = convert_state_dict(state)
    assert_equal(ours, without_dead(state))
    assert report.source == 'themask' and not report.unknown
    assert sorted([old for old, _ in report.mapped] + list(report.dropped)) == sorted(state)
    assert len(report.dropped) == (4 if 'video' in name else 2)

    back, report = convert_state_dict(ours, target='reference')
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert set(report.added) == set(state) - set(ours)


def test_segformer_and_its_whole_segmentor():
    backbone = tiny_backbone()
    want = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    plain = {**backbone.state_dict(), 'head.weight': torch.rand(10, 32), 'head.bias': torch.rand(10)}
    ours, report = convert_state_dict(plain)
    assert_equal(ours, want)
    assert report.source == 'mit' and set(report.dropped) == {'head.weight', 'head.bias'}
    ours, report = convert_state_dict({**want, 'decode_head.linear_c4.proj.weight': torch.rand(2, 2)})
    assert_equal(ours, want)
    assert set(report.dropped) == {'decode_head.linear_c4.proj.weight'}
    assert_equal(convert_state_dict(ours, target='mit')[0], backbone.state_dict())


@pytest.mark.parametrize('prefix', ['segformer.', ''])
def test_hugging_face_there_and_back(prefix):
    backbone = tiny_backbone()
    theirs = hugging_face(backbone)
    state = {name.replace('segformer.', prefix): value for name, value in theirs.items()}
    mit, report = convert_state_dict(state, target='mit')
    assert report.source == 'hf-mit' and set(report.dropped) == {'classifier.weight', 'classifier.bias'}
    assert {k: v.tolist() for k, v in mit.items()} == {k: v.tolist() for k, v in backbone.state_dict().items()}
    back, report = convert_state_dict(mit, target='hf-mit')
    assert {k: v.tolist() for k, v in back.items()} == {
        k: v.tolist() for k, v in theirs.items() if not k.startswith('classifier')}
    assert sum('kv' in old for old, _ in report.mapped) == 4 * sum((1, 2, 11, 1))


@pytest.mark.parametrize('version', [1, 2])
def test_mask2former_in_both_spellings(reference, version):
    shapes = without_dead(dict(reference('keys_1f_b0.json')['state_dict']))
    head = {k: v for k, v in shapes.items() if k.startswith(('decode_head.pixel_decoder.', 'decode_head.predictor.'))}

    def theirs(name):
        name = name.replace('decode_head.', 'sem_seg_head.')
        if version == 1:
            name = name.replace('.pixel_decoder.', '.').replace('.query_feat.', '.static_query.')
        return name

    state = tensors([(theirs(name), shape) for name, shape in head.items()])
    state['sem_seg_head.predictor.class_embed.weight'] = torch.rand(151, 256)
    extra = {'backbone.res2.0.conv1.weight': torch.rand(4, 4, 1, 1), 'criterion.empty_weight': torch.rand(151)}
    ours, report = convert_state_dict({**state, **extra}, expected=shapes)
    assert report.source == 'mask2former' and set(report.dropped) == set(extra)
    assert set(report.mismatched) == {'decode_head.predictor.class_embed.weight'}
    assert set(report.missing) == {k for k in shapes if k not in head}
    assert set(ours) == set(head) - set(report.mismatched)
    for name, value in ours.items():
        assert torch.equal(value, state[theirs(name)])


def test_unknown_names_stop_the_conversion_unless_named():
    state = {**tiny_backbone().state_dict(), 'surprise.weight': torch.rand(2)}
    converted, report = convert_state_dict(state)
    assert not converted and report.unknown == ['surprise.weight'] and 'surprise.weight' in str(report)
    converted, report = convert_state_dict(state, drop=['surprise.*'])
    assert converted and report.dropped == {'surprise.weight': 'as asked'}
    with pytest.raises(CheckpointError, match='no known format'):
        convert_state_dict({'surprise.weight': torch.rand(2)})


def test_every_format_of_a_wrapped_model_and_a_model_that_expects_less():
    state = {f'module.{name}': value for name, value in tiny_backbone().state_dict().items()}
    expected = {f'backbone.{k}': v.shape for k, v in tiny_backbone().state_dict().items() if 'norm4' not in k}
    ours, report = convert_state_dict(state, expected=expected)
    assert list(ours) == list(expected)
    assert set(report.dropped) == {'module.norm4.weight', 'module.norm4.bias'}
    with pytest.raises(CheckpointError, match='class_embed'):
        convert_state_dict(state, target='reference')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_containers(tmp_path, suffix):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    state = {name: value.half() for name, value in tiny_backbone().state_dict().items()}
    write_weights(tmp_path / f'a{suffix}', state, {'CLASSES': ['wall', 'sky']})
    write_weights(tmp_path / f'b{suffix}', state, {'CLASSES': ['wall', 'sky']})
    assert (tmp_path / f'a{suffix}').read_bytes() == (tmp_path / f'b{suffix}').read_bytes()
    loaded, meta = read_weights(tmp_path / f'a{suffix}')
    assert {k: v.tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in state.items()}
    assert meta == {'CLASSES': ['wall', 'sky']}
    write_weights(tmp_path / f'b{suffix}', state, {'PALETTE': np.uint8([[1, 2]]), 'best': np.float64(0.5)})
    meta = read_weights(tmp_path / f'b{suffix}')[1]
    assert np.array_equal(meta['PALETTE'], [[1, 2]]) and meta['best'] == 0.5
    (tmp_path / f'a{suffix}').write_bytes((tmp_path / f'a{suffix}').read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f'a{suffix}'):
        read_weights(tmp_path / f'a{suffix}')


def test_a_flipped_bit_in_the_header_of_safetensors_is_found_or_harmless(tmp_path):
    """No tensor gets other numbers, another shape or type; a name may change, which loading into a model finds."""
    pytest.importorskip('safetensors')
    path = tmp_path / 'a.safetensors'
    state = {'a': torch.arange(6.0).reshape(2, 3), 'b': torch.arange(3)}
    write_weights(path, state)
    data = path.read_bytes()
    for position, bit in itertools.product(range(8 + int.from_bytes(data[:8], 'little')), range(8)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
        try:
            read, _ = read_weights(path)
        except CheckpointError:
            continue
        values = zip(sorted(read.values(), key=str), sorted(state.values(), key=str), strict=True)
        assert all(got.dtype == want.dtype and torch.equal(got, want) for got, want in values), (position, bit)


class Evil:
    def __reduce__(self):
        return print, ('this code must not run',)


@pytest.mark.parametrize('protocol', [2, 4])
def test_pickles_of_arrays_and_of_code(tmp_path, capsys, protocol):
    arrays = collections.OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.float32([1]))
    path = tmp_path / 'model.pkl'
    path.write_bytes(pickle.dumps({'model': arrays, '__author__': 'third_party'}, protocol))
    state, _ = read_weights(path)
    assert state['a'].tolist() == arrays['a'].tolist() and state['b'].dtype == torch.float32
    path.write_bytes(pickle.dumps({'model': {'a': Evil()}}, protocol))
    with pytest.raises(CheckpointError, match='print'):
        read_weights(path)
    torch.save({'state_dict': {'a': Evil()}}, tmp_path / 'model.pth')
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / 'model.pth')
    assert 'must not run' not in capsys.readouterr().out


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the tool in this process: its status, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint', *map(str, arguments)])
        return convert_checkpoint.main(), *capsys.readouterr()

    return run


@pytest.fixture
def weights(tmp_path):
    """A file in a work dir."""
    path = tmp_path / 'work' / 'iter_4.pth'
    path.parent.mkdir()
    torch.save({'meta': {'iter': 4}, 'state_dict': tiny_backbone().state_dict()}, path)
    return path


def same(path):
    return path


def link(path):
    (path.parent.parent / 'linked').symlink_to(path.parent)
    return path.parent.parent / 'linked' / path.name


def hard_link(path):
    (path.parent.parent / 'hard.pth').hardlink_to(path)
    return path.parent.parent / 'hard.pth'


def detour(path):
    return path.parent / '..' / path.parent.name / path.name


@pytest.mark.parametrize('other_name', [same, link, hard_link, detour])
def test_tool_never_writes_over_what_it_reads(tmp_path, weights, convert, monkeypatch, other_name):
    monkeypatch.setenv('HOME', str(tmp_path))
    before = weights.read_bytes()
    (tmp_path / 'a.py').write_text('model = dict()')
    taken, free = other_name(weights), tmp_path / 'free.pth'
    other = tmp_path / 'other.pth'
    other.write_bytes(before)
    for arguments, message in (
        ((weights, taken), 'out: .* is the checkpoint'),
        ((weights.parent, taken), 'out: .* is the checkpoint'),  # a work dir
        ((other, taken, '--add', weights), 'out: .* is the checkpoint'),
        ((weights, free, '--json', taken), '--json: .* is the checkpoint'),
        ((weights, tmp_path / 'a.py', '--config', tmp_path / 'a.py'), 'out: .* is the config'),
        ((weights, free, '--json', tmp_path / 'nowhere' / '..' / 'free.pth'), '--json: .* is the converted checkpoint'),
        ((weights, Path('~') / taken.relative_to(tmp_path)), 'out: .* is the checkpoint'),
    ):
        status, _, errors = convert(*arguments)
        assert status == 1 and re.match(f'error: {message}.*choose another name\n$', errors), errors
    assert weights.read_bytes() == before and not free.exists()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('when', ['write', 'open'])
def test_tool_on_a_full_disk_or_a_read_only_folder(tmp_path, weights, convert, monkeypatch, suffix, when):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    out = tmp_path / f'a{suffix}'
    out.write_text('earlier')
    if when == 'write':
        fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(files.os, 'fsync', lambda handle: raise_(fault))
    else:
        fault = OSError(errno.EROFS, os.strerror(errno.EROFS))
        monkeypatch.setattr(files.tempfile, 'mkstemp', lambda **_: raise_(fault))
    status, _, errors = convert(weights, out, '--from', 'mit', '--to', 'mit')
    assert status == 1 and len(errors.splitlines()) == 1 and str(out) in errors and fault.strerror in errors
    assert out.read_text() == 'earlier' and sorted(tmp_path.iterdir()) == sorted([out, weights.parent])


def raise_(error):
    raise error


def test_tool_there_and_back(reference, tmp_path, convert):
    shapes = reference('keys_video_b0.json')['state_dict']
    state = tensors(shapes)
    torch.save({'meta': {'iter': 3}, 'state_dict': state, 'optimizer': {}}, tmp_path / 'reference.pth')
    config = 'local_configs/themask/video_themask_mit_b0.py'
    status, printed, errors = convert(tmp_path / 'reference.pth', tmp_path / 'ours.pth', '--config', config,
                                      '--strict', '--json', tmp_path / 'report.json')
    assert status == 0, errors
    assert 'missing: 0' in printed and 'unexplained: 0' in printed
    ours, meta = read_weights(tmp_path / 'ours.pth')
    assert_equal(ours, without_dead(state))
    assert meta == {'iter': 3}
    report = json.loads((tmp_path / 'report.json').read_text())
    assert len(report['mapped']) == len(ours) and len(report['dropped']) == 4

    status, _, errors = convert(tmp_path / 'ours.pth', tmp_path / 'back.pth', '--to', 'reference')
    assert status == 0, errors
    assert {k: list(v.shape) for k, v in read_weights(tmp_path / 'back.pth')[0].items()} == dict(shapes)


def test_tool_names_what_is_wrong(tmp_path, convert):
    torch.save({'strange.weight': torch.rand(1)}, tmp_path / 'a.pth')
    status, _, errors = convert(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert status == 1 and 'strange.weight' in errors and 'Traceback' not in errors
    assert not (tmp_path / 'b.pth').exists()
    status, _, errors = convert(tmp_path / 'none.pth', tmp_path / 'b.pth')
    assert status == 1 and 'does not exist' in errors
    assert 'examples:' in run_tool('convert_checkpoint', '--help').stdout


def test_tool_joins_a_decoder_and_a_backbone(reference, tmp_path, convert):
    shapes = without_dead(dict(reference('keys_1f_b0.json')['state_dict']))
    parts = {'mask2former.pth': ('decode_head.', 'sem_seg_head.'), 'mit.pth': ('backbone.', '')}
    for file, (ours, theirs) in parts.items():
        names = [n for n in shapes if n.startswith(ours) and 'class_embed' not in n and 'criterion' not in n]
        torch.save(tensors([(n.replace(ours, theirs), shapes[n]) for n in names]), tmp_path / file)
    config = 'local_configs/themask/1f_themask_mit_b0.py'
    joined = (tmp_path / 'mask2former.pth', tmp_path / 'start.pth', '--config', config, '--add', tmp_path / 'mit.pth')
    status, printed, errors = convert(*joined)
    assert status == 0, errors
    state, _ = read_weights(tmp_path / 'start.pth')
    assert set(shapes) - set(state) == {n for n in shapes if 'class_embed' in n or 'criterion' in n}
    assert printed.count('missing: 3') == 2
    status, _, errors = convert(*joined, tmp_path / 'mask2former.pth')
    assert status == 1 and 'second time' in errors
