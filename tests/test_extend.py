"""The files of docs/extend.md, saved outside the package as it says, train and are tested together."""

from __future__ import annotations

import json
import re

from tests.test_docs import PAGES, blocks, write_videos
from tests.tiny_config import TINY_MODEL
from tests.tool_process import ROOT, run_tool

PAGE = PAGES['extend.md']
NAMES = re.findall(r'`(\w+\.py)`:\n\n```python', PAGE)
CONFIG = """
custom_imports = dict(imports=['my_loss', 'my_backbone', 'my_dataset', 'my_hook', 'my_logger'])
data_root = '{root}'
img_scale = (107, 60)
crop_size = (64, 64)
data = dict(
    workers_per_gpu=0, train=dict(dataset=dict(type='Streets')), val=dict(type='Streets'), test=dict(type='Streets'))
model['backbone'] = dict(_delete_=True, type='Pyramid', channels=16)
model['decode_head']['num_classes'] = 3
rounds[0]['losses']['focal'] = 2.0
rounds[1]['start'] = rounds[2]['start'] = 0
model['decode_head']['loss_cfg'] = dict(_delete_=True, train_num_points=64, rounds=rounds)
custom_hooks = [dict(type='WeightNormHook')]
log_config = dict(interval=1, hooks=[dict(type='TextLoggerHook'), dict(type='CsvLoggerHook')])
runner = dict(max_iters=10)
"""


def test_the_files_are_short():
    assert NAMES == ['three_rounds.py', 'my_loss.py', 'my_backbone.py', 'my_dataset.py', 'my_hook.py', 'my_logger.py']
    assert all(len(block.splitlines()) <= 25 for block in blocks('python', PAGE))


def test_they_train_and_are_tested(tmp_path):
    for name, block in zip(NAMES, blocks('python', PAGE)):
        (tmp_path / name).write_text(block.replace("'./local_configs", f"'{ROOT}/local_configs"))
    write_videos(tmp_path, 'frames/{video}', 'labels/{video}')
    three = (tmp_path / 'three_rounds.py').read_text().replace('model =', 'rounds =', 1)
    three = re.sub(r'dict\(decode_head=.*?rounds=(\[.*\])\)\)\)', r'\1', three, flags=re.DOTALL)
    config = tmp_path / 'mine.py'
    config.write_text(three + TINY_MODEL + CONFIG.format(root=tmp_path))
    done = run_tool('train', config, '--work-dir', tmp_path / 'work', path=tmp_path)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / 'work').glob('*.log.json')
    last = [json.loads(line) for line in log.read_text().splitlines()][-1]
    wanted = {'weight_norm', 'decode.r0_loss_focal', 'decode.r2_loss_mask_unmatched', 'matched_2'}
    assert wanted <= last.keys(), sorted(last)
    assert len((tmp_path / 'work' / 'loss.csv').read_text().splitlines()) == 10
    done = run_tool('test', config, tmp_path / 'work', '--work-dir', tmp_path / 'scores', path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'person' in done.stdout
