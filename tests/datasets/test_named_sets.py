"""Data sets that have a class: a few tiny files where the real ones lie, on which a model is trained and tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmseg import datasets
from mmseg.apis.train import train_segmentor
from mmseg.config import load_config
from mmseg.datasets.labels import voc_colours
from mmseg.utils.errors import CheckpointError
from mmseg.utils.visual import write_picture
from tests.reference import recipe
from tests.tiny import TINY_BACKBONE
from tests.tiny_config import CONFIGS
from tests.vspw_fixture import write_vspw
from tools import browse_dataset, check_dataset, report
from tools import test as test_tool

SIZE = (60, 107)
VOID = 255
TINY = f"""
model = dict(
    pretrained=None, backbone=dict({', '.join(f'{key}={value!r}' for key, value in TINY_BACKBONE.items())}),
    decode_head=dict(
        loss_cfg=dict(warmup_iters=1, train_num_points=64),
        pixel_decoder_cfg=dict(
            conv_dim=32, mask_dim=32, transformer_nheads=4, transformer_dim_feedforward=32, transformer_enc_layers=1),
        transformer_decoder_cfg=dict(
            hidden_dim=32, mask_dim=32, num_queries=8, nheads=4, dim_feedforward=32, dec_layers=2)))
img_scale = (107, 60)
crop_size = (64, 64)
runner = dict(max_iters=2)
checkpoint_config = dict(interval=2)
log_config = dict(interval=1)
seed = 0
data = dict(workers_per_gpu=0, train=dict(times=2))
"""
OTHER = """
_type = dict(type={name!r}, split={split!r}{more})
model['decode_head']['num_classes'] = {classes}
data['train']['dataset'] = dict(_type, split={train!r})
data['val'] = data['test'] = _type
"""


def indices(label):
    return Image.fromarray(label)


def numbered(ids: Sequence[int], void: int):
    """Masks that hold ``ids`` for the classes, and ``void``."""
    table = np.full(256, void, np.int64)
    table[:len(ids)] = ids
    return lambda label: Image.fromarray(table[label].astype(np.uint8))


def vipseg(label):
    ids = np.where(label == VOID, 0, label.astype(np.uint16) + 1)
    return Image.fromarray(np.where(ids % 2 == 1, ids * 100 + 7, ids).astype(np.uint16))


def red_channel(label):
    return Image.fromarray(np.dstack([label, np.zeros_like(label), np.full_like(label, 9)]))


def colours(label):
    return Image.fromarray(np.array(datasets.UAVid.PALETTE, np.uint8)[label])


def objects(label):
    """Object ids 1..3 in a palette image, as DAVIS stores them."""
    image = Image.fromarray(np.where(label == 1, 1 + np.arange(label.shape[1]) % 3, 0).astype(np.uint8), 'P')
    image.putpalette(sum(voc_colours(255), [0, 0, 0]))
    return image


@dataclass
class Made:
    """A data set as it lies on disk.

    ``frames`` and ``masks`` are paths with ``{video}`` and ``{frame}``; ``videos`` are those of a split, ``masked`` the
    frames that have a mask, None for all.
    """

    frames: str
    masks: str
    store: Callable[[np.ndarray], Image.Image]
    videos: Mapping[str, Sequence[str]]
    named: Mapping[str, Sequence[str]] | None = None
    splits: tuple[str, str] = ('train', 'val')
    masked: Sequence[str] | None = None
    void: bool = True
    lists: str = ''
    config: str = ''
    more: dict = field(default_factory=dict)

    def write(self, root: Path, classes: int) -> np.ndarray:
        """Writes both splits; returns how many pixels of the second have each label."""
        for seed, split in enumerate(self.splits):
            counts = np.zeros(256, np.int64)
            if self.lists:
                path = root / self.lists.format(split=split)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text('\n'.join(self.videos))
            for video, frames in self.videos.items():
                labels = recipe.raw_mask(seed, len(frames), *SIZE).astype(int) % (classes + self.void) - self.void
                for i, (frame, label) in enumerate(zip(frames, labels.astype(np.uint8))):
                    names = dict(split=split, video=video, frame=frame, city=video.split('_')[0])
                    write_picture(root / self.frames.format(**names), recipe.frame(seed, i, *SIZE))
                    if self.masked is None or frame in self.masked:
                        path = root / self.masks.format(**names)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        self.store(label).save(path)
                        counts += np.bincount(label.ravel(), minlength=256)
        return counts


FRAMES = [f'{i:06d}' for i in range(5)]
SNIPPETS = [f'{i:06d}' for i in (*range(16, 23), *range(46, 53))]
IDS = [raw for raw, name in datasets.Cityscapes.label_map.items() if name is not None]
SETS = {
    'Cityscapes': Made(
        'leftImg8bit/{split}/{city}/{video}_{frame}_leftImg8bit.png',
        'gtFine/{split}/{city}/{video}_{frame}_gtFine_labelIds.png', numbered(IDS, 3),
        {'ulm_000000': ['000019'], 'bonn_000001': ['000019']},
        {'bonn/bonn_000001_000019': ['bonn_000001_000019'], 'ulm/ulm_000000_000019': ['ulm_000000_000019']},
        config='cityscapes_1f_mit_b1'),
    'CityscapesVideo': Made(
        'leftImg8bit_sequence/{split}/{city}/{video}_{frame}_leftImg8bit.png',
        'gtFine/{split}/{city}/{video}_{frame}_gtFine_labelIds.png', numbered(IDS, 3),
        {'bonn_000001': SNIPPETS[:7], 'ulm_000000': SNIPPETS},
        {'bonn_000001': SNIPPETS[:7], 'ulm_000000_000016-000022': SNIPPETS[:7],
         'ulm_000000_000046-000052': SNIPPETS[7:]},
        masked=['000019', '000049'], config='cityscapes_video_mit_b1'),
    'VIPSeg': Made(
        'imgs/{video}/{frame}.jpg', 'panomasks/{video}/{frame}.png', vipseg, {'1_abc': FRAMES, '10_d-e': FRAMES},
        lists='{split}.txt', config='vipseg_video_mit_b1'),
    'KITTISTEP': Made(
        'training/image_02/{video}/{frame}.png', 'panoptic_maps/{split}/{video}/{frame}.png', red_channel,
        {'0002': FRAMES, '0010': FRAMES}),
    'UAVid': Made(
        'uavid_{split}/{video}/Images/{frame}.png', 'uavid_{split}/{video}/Labels/{frame}.png', colours,
        {'seq2': FRAMES, 'seq10': FRAMES}, void=False),
    'ADE20K': Made(
        'images/{split}/{video}.jpg', 'annotations/{split}/{video}.png', numbered(range(1, 151), 0),
        {f'ADE_{i:08d}': [f'ADE_{i:08d}'] for i in (1, 2)}, splits=('training', 'validation'),
        config='ade20k_1f_mit_b1'),
    'COCOStuff164k': Made(
        'images/{split}/{video}.jpg', 'annotations/{split}/{video}.png',
        numbered([*datasets.COCOStuff164k.label_map], VOID), {f'{i:012d}': [f'{i:012d}'] for i in (9, 25)},
        splits=('train2017', 'val2017'), config='coco_stuff_1f_mit_b1'),
    'DAVISLike': Made(
        'JPEGImages/480p/{video}/{frame}.jpg', 'Annotations/480p/{video}/{frame}.png', objects,
        {'bear': FRAMES, 'dog-agility': FRAMES}, void=False, lists='ImageSets/2017/{split}.txt'),
    'ImageFolder': Made(
        '{split}/{video}.jpg', '{split}/{video}.png', indices, {'a': ['a'], 'b_2': ['b_2']},
        more=dict(classes=['road', 'car'], palette=[[0, 0, 0], [9, 9, 9]])),
}


def config_of(name: str, made: Made, root: Path) -> Path:
    """A config of a tiny model: that of the set in ``local_configs``, or one that names its class."""
    path = root.parent / f'{name}.py'
    text = TINY
    if not made.config:
        more = ''.join(f', {key}={value!r}' for key, value in made.more.items())
        classes = len(made.more.get('classes') or getattr(datasets, name).CLASSES)
        text += OTHER.format(name=name, train=made.splits[0], split=made.splits[1], classes=classes, more=more)
    base = CONFIGS / f'{made.config or "1f_themask_mit_b0"}.py'
    path.write_text(f'_base_ = {str(base)!r}\ndata_root = {str(root)!r}\n{text}')
    return path


@pytest.mark.parametrize('name', SETS)
def test_a_set_in_its_own_layout(name, tmp_path, capsys):
    made = SETS[name]
    classes = len(made.more.get('classes') or getattr(datasets, name).CLASSES)
    pixels = made.write(tmp_path / 'data', classes)
    config = config_of(name, made, tmp_path / 'data')
    assert check_dataset.main([str(config), '--json', str(tmp_path / 'check.json')]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / 'check.json').read_text())
    if not made.more:  # the folder alone says the same
        assert check_dataset.main([str(tmp_path / 'data'), '--type', name, '--json', str(tmp_path / 'check.json')]) == 0
        assert json.loads((tmp_path / 'check.json').read_text()) == found
    found = found[made.splits[1]]
    assert [*found['pixels'].values()] == pixels[:classes].tolist() and found['void'] == pixels[VOID]

    cfg = load_config(config, {'work_dir': str(tmp_path / 'work')})
    assert train_segmentor(cfg, validate=False).iter == 2
    dataset = datasets.build_dataset(cfg.data.test)
    assert {video.name: video.frames for video in dataset.videos} == {**(made.named or made.videos)}

    out = tmp_path / 'scores'
    assert test_tool.main([
        str(config), str(tmp_path / 'work'), '--work-dir', str(out), '--report', str(tmp_path / 'page'),
        '--show-dir', str(tmp_path / 'pictures'), '--out', str(tmp_path / 'maps')]) == 0, capsys.readouterr().err
    scores = json.loads((out / 'metrics.json').read_text())
    assert 0 <= scores['mIoU'] <= 1
    for video in dataset.videos:
        pictures = sorted(path.name for path in (tmp_path / 'pictures' / video.name).iterdir())
        assert pictures == [f'{frame}.jpg' for frame in video.frames]
    again = tmp_path / 'again.json'
    assert report.main([
        str(tmp_path / 'maps'), '--config', str(config), '--out', str(tmp_path / 'page2'), '--json', str(again)]) == 0
    assert json.loads(again.read_text())['mIoU'] == pytest.approx(scores['mIoU'])
    sheets = [str(config), '--part', 'train', '--number', '1', '--out', str(tmp_path / 'sheets')]
    assert browse_dataset.main(sheets) == 0 and len([*(tmp_path / 'sheets').iterdir()]) == 1


def test_the_snippets_of_cityscapes_train_from_its_images(tmp_path):
    root = tmp_path / 'data'
    configs = {}
    for name in ('Cityscapes', 'CityscapesVideo'):
        SETS[name].write(root, 19)
        configs[name] = config_of(name, SETS[name], root)
    stage1 = load_config(configs['Cityscapes'], {'work_dir': str(tmp_path / '1')})
    train_segmentor(stage1, validate=False)
    options = {'work_dir': str(tmp_path / '2'), 'finetune_from': str(tmp_path / '1')}
    runner = train_segmentor(load_config(configs['CityscapesVideo'], options), validate=False)
    weights = [torch.load(tmp_path / stage / 'iter_2.pth', weights_only=False)['state_dict'] for stage in '12']
    trained = {name for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    assert runner.iter == 2 and trained and len(trained) < len([*runner.model.parameters()])
    same = [torch.equal(weights[0][key], weights[1][key]) for key in weights[0] if key.startswith('backbone')]
    assert len(same) > 50 and all(same)


@pytest.mark.parametrize('name', ['ADE20K', 'COCOStuff164k'])
def test_weights_of_an_image_set_start_the_training_on_vspw(name, tmp_path):
    made = SETS[name]
    made.write(tmp_path / 'data', len(getattr(datasets, name).CLASSES))
    options = {'work_dir': str(tmp_path / '1')}
    train_segmentor(load_config(config_of(name, made, tmp_path / 'data'), options), validate=False)
    vspw = tmp_path / 'vspw.py'
    vspw.write_text(f"_base_ = '{CONFIGS}/1f_themask_mit_b1.py'\ndata_root = '{write_vspw(tmp_path / 'vspw')}'\n{TINY}")
    options = {'work_dir': str(tmp_path / '2'), 'load_from': str(tmp_path / '1')}
    with pytest.raises(CheckpointError, match=r"load_from_fresh=\['class_embed'\]"):
        train_segmentor(load_config(vspw, options), validate=False)
    options |= {'load_from_fresh': ['class_embed'], 'lr_config.policy': 'fixed', 'optimizer.lr': 0.0}
    runner = train_segmentor(load_config(vspw, options), validate=False)
    before = torch.load(tmp_path / '1' / 'iter_2.pth', weights_only=False)['state_dict']
    kept = {key: torch.equal(value, before[key]) for key, value in runner.model.state_dict().items()
            if 'criterion' not in key}
    assert [key for key, same in kept.items() if not same] == [key for key in kept if 'class_embed' in key]
