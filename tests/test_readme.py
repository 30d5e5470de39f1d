"""What README.md shows is what happens: its commands, its pictures, its own data set."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from docs.make_pictures import COMMANDS
from mmseg.utils.visual import write_picture
from tests.reference import recipe
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, run_tool

README = (ROOT / 'README.md').read_text(encoding='utf-8')
TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('[!_]*.py'))


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```$', README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize('tool', TOOLS)
def test_every_tool_is_in_the_readme_and_its_help_has_examples(tool, monkeypatch):
    assert f'tools/{tool}' in README
    monkeypatch.setattr(sys, 'argv', [tool, '--help'])
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit, match='0'):
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert 'examples:\n' in shown.getvalue()


def test_pictures_are_there_and_made_by_the_commands_beside_them():
    commands = ''.join(blocks('sh')).replace('\\\n    ', '')
    assert all(command in commands for command in COMMANDS)
    pictures = re.findall(r'docs/[\w.]+\.(?:jpg|png)', README)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 160_000, picture


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


def test_ones_own_data_set(tmp_path):
    """The module as README.md shows it, found by custom_imports, trains and is tested."""
    (module,) = (block for block in blocks('python') if 'class MyDataset' in block)
    (tmp_path / 'my_dataset.py').write_text(module)
    labels = recipe.raw_mask(3, 4, 60, 107) % 4  # 0 is void, 1..3 the classes
    for split in ('train', 'val'):
        (tmp_path / f'{split}.txt').write_text(f'{split}_video\n')
        for i, label in enumerate(labels):
            write_picture(tmp_path / 'frames' / f'{split}_video' / f'{i:03d}.png', recipe.frame(3, i, 60, 107))
            write_picture(tmp_path / 'labels' / f'{split}_video' / f'{i:03d}.png', label.astype(np.uint8))
    config = write_tiny_config(tmp_path / 'mine.py', tmp_path, iters=2, extra='''
        custom_imports = dict(imports=['my_dataset'])
        data['train']['dataset']['type'] = data['val']['type'] = data['test']['type'] = 'MyDataset'
        model['decode_head']['num_classes'] = 3
    ''')
    done = run_tool('train', config, '--work-dir', tmp_path / 'work', path=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_tool('test', config, tmp_path / 'work', '--work-dir', tmp_path / 'scores', path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'person' in done.stdout and 'mIoU' in done.stdout
