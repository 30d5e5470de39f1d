"""What README.md and docs/ show is what happens: commands, outputs, configs, links, pictures."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from docs.make_pictures import COMMANDS
from mmseg.config import load_config
from mmseg.datasets import build_dataset
from mmseg.utils.visual import write_picture
from tests.reference import recipe
from tests.tiny_config import TINY_MODEL
from tests.tool_process import ROOT, run_tool

PAGES = {path.name: path.read_text(encoding='utf-8') for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]}
EVERYTHING = '\n'.join(PAGES.values())
TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('[!_]*.py'))


def blocks(language, text=EVERYTHING):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def write_videos(root, folder='{video}', masks='{video}'):
    """Two tiny videos, ``train_video`` and ``val_video``; 0 is void, 1..3 are the classes."""
    labels = recipe.raw_mask(3, 4, 60, 107) % 4
    for split in ('train', 'val'):
        (root / f'{split}.txt').write_text(f'{split}_video\n')
        for i, label in enumerate(labels):
            write_picture(root / folder.format(video=f'{split}_video') / f'{i:03d}.png', recipe.frame(3, i, 60, 107))
            write_picture(root / masks.format(video=f'{split}_video') / f'{i:03d}.png', label.astype(np.uint8))


def test_the_readme_is_short_and_links_to_every_page():
    assert len(PAGES['README.md'].splitlines()) <= 150
    assert all(f'docs/{name}' in PAGES['README.md'] for name in PAGES if name != 'README.md')


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    folder = ROOT if name == 'README.md' else ROOT / 'docs'
    links = re.findall(r'\]\((?!https?:)([^)#\s]+)', PAGES[name]) + re.findall(r'src="([^"]+)"', PAGES[name])
    for link in links:
        assert (folder / link).exists(), link


@pytest.mark.parametrize('tool', TOOLS)
def test_every_tool_is_shown_and_its_help_has_examples(tool, monkeypatch):
    assert f'tools/{tool}' in PAGES['tools.md'] + PAGES['deploy.md']
    monkeypatch.setattr(sys, 'argv', [tool, '--help'])
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit, match='0'):
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert 'examples:\n' in shown.getvalue()


def test_pictures_are_small_and_made_by_the_commands_beside_them():
    commands = ''.join(blocks('sh')).replace('\\\n    ', '')
    assert all(command in commands for command in COMMANDS)
    pictures = [path for path in (ROOT / 'docs').iterdir() if path.suffix in ('.jpg', '.png')]
    assert len(pictures) >= 5
    for picture in pictures:
        assert picture.stat().st_size < 250_000 and picture.name in EVERYTHING, picture


def test_outputs_are_those_of_the_tools():
    """All but those of the demo's data and of a machine's speed."""
    checked = 0
    for block in blocks('console'):
        for command, shown in re.findall(r'^\$ python (.*?)\n((?:(?!\$ ).*\n)+)', block, re.MULTILINE):
            if re.search(r'benchmark|check_dataset|publish_model', command):
                continue
            tool, *args = shlex.split(command)
            done = run_tool(Path(tool).stem, *args)
            assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines(), command
            checked += 1
    assert checked == 2


def test_the_config_of_the_readme_trains_and_is_tested(tmp_path):
    (config,) = (block for block in blocks('python', PAGES['README.md']) if '_base_' in block)
    write_videos(tmp_path, 'data/{video}/origin', 'data/{video}/mask')
    for path in tmp_path.rglob('origin/*.png'):
        path.rename(path.with_suffix('.jpg'))  # a reader goes by what is in a file
    file = tmp_path / 'street.py'
    config = config.replace("'./", f"'{ROOT}/local_configs/").replace('data/street', str(tmp_path))
    base, _, own = config.partition('\n')
    own = own.replace('model = dict(decode_head=dict(num_classes=3))', "model['decode_head']['num_classes'] = 3")
    file.write_text(f'{base}\n{TINY_MODEL}\n{own}')
    small = ('img_scale=(107,60)', 'crop_size=(64,64)', 'data.workers_per_gpu=0', 'runner.max_iters=2')
    done = run_tool('train', file, '--work-dir', tmp_path / 'work', '--options', *small)
    assert done.returncode == 0, done.stderr
    done = run_tool('test', file, tmp_path / 'work', '--work-dir', tmp_path / 'scores', '--options', *small)
    assert done.returncode == 0, done.stderr
    assert 'person' in done.stdout and 'mIoU' in done.stdout


def test_the_recipe_for_sparse_colour_masks_trains_and_is_tested(tmp_path, monkeypatch):
    ours = re.compile('data/mine/frames|^mine =', re.MULTILINE)
    split, config = (block for block in blocks('python', PAGES['data.md']) if ours.search(block))
    assert len((split + config).splitlines()) <= 25
    (colours,) = re.findall(r'palette=(\[\[.*?\]\])', config)
    palette = np.array(json.loads(colours), np.uint8)
    for video in ('one', 'two'):
        labels = recipe.raw_mask(3, 12, 60, 107) % 5
        for i, label in enumerate(labels):
            write_picture(tmp_path / f'data/mine/frames/{video}/{i:03d}.jpg', recipe.frame(3, i, 60, 107))
            if i % 10 == 0:
                write_picture(tmp_path / f'data/mine/masks/{video}/{i:03d}.png', palette[label][..., ::-1])
    monkeypatch.chdir(tmp_path)
    exec(split, {})
    file = tmp_path / 'mine.py'
    base, _, own = config.replace("'./", f"'{ROOT}/local_configs/").partition('\n')
    own = own.replace('model = dict(decode_head=dict(num_classes=5))', "model['decode_head']['num_classes'] = 5")
    file.write_text(f'{base}\n{TINY_MODEL}\n{own}')
    small = ('img_scale=(107,60)', 'crop_size=(64,64)', 'data.workers_per_gpu=0', 'runner.max_iters=2',
             f'data_root={tmp_path}/data/mine')
    for each in ('train.dataset', 'val', 'test'):
        small += (f'data.{each}.data_root={tmp_path}/data/mine',)
    done = run_tool('train', file, '--work-dir', tmp_path / 'work', '--options', *small)
    assert done.returncode == 0, done.stderr
    done = run_tool('test', file, tmp_path / 'work', '--work-dir', tmp_path / 'scores', '--options', *small)
    assert done.returncode == 0 and 'water' in done.stdout and 'VC8 has no value' in done.stdout, done.stderr


def test_the_data_set_of_the_docs_reads_its_layout(tmp_path, monkeypatch):
    (module,) = (block for block in blocks('python', PAGES['data.md']) if 'class MyDataset' in block)
    (tmp_path / 'my_dataset.py').write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    write_videos(tmp_path, 'val/{video}/rgb', 'val/{video}/labels')
    file = tmp_path / 'mine.py'
    file.write_text(
        f"_base_ = '{ROOT}/local_configs/themask/video_themask_mit_b0.py'\n"
        "custom_imports = dict(imports=['my_dataset'])\n"
        f"data_root = '{tmp_path}'\ndata = dict(test=dict(type='MyDataset'))\n")
    dataset = build_dataset(load_config(file).data.test, where='data.test')
    assert len(dataset) == 4 and dataset.CLASSES == ('road', 'car')
