"""Hours of bad luck in minutes: kills and resumes with evaluations, and damaged input of every kind.

``THEMASK_SOAK_MINUTES`` sets the minutes of each part (default 1): ``make test-slow`` runs them all.  What may come out
is a result or one line with a status other than 0; never a traceback, a hang, or a status that lies.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmseg.config import load_config
from mmseg.core import read_checkpoint
from mmseg.utils.errors import CheckpointError, ConfigError, DataError
from mmseg.utils.images import read_frame, read_mask
from tests.core.test_resume import assert_same
from tests.processes import start
from tests.tiny_config import write_tiny_config
from tests.utils.test_config_fuzz import EXTRA as FUZZ_EXTRA
from tests.utils.test_config_fuzz import check as check_overrides
from tests.vspw_fixture import write_vspw

pytestmark = pytest.mark.slow
SECONDS = 60 * float(os.environ.get('THEMASK_SOAK_MINUTES', '1'))
ITERS = 12
EXTRA = """
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
checkpoint_config = dict(interval=2, max_keep_ckpts=3)
evaluation = dict(interval=4, save_best='mIoU')
"""


def rounds():
    """Numbers as long as there is time; the first few in any case, each a seed."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < 3 or time.monotonic() < end:
        yield number
        number += 1


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a part that is missing, doubled or zeroed, or other bytes at the end."""
    content = bytearray(data)
    kind = rng.randrange(5)
    first = rng.randrange(len(content))
    last = min(len(content), first + rng.choice((1, 8, 500)))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 5))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[first:]
    elif kind == 2:
        content[first:first] = content[first:last]
    elif kind == 3:
        content[first:last] = bytes(last - first)
    else:
        content += rng.randbytes(20)
    return bytes(content)


def train(config, work_dir):
    from mmseg.apis.train import train_segmentor

    os.chdir(os.path.dirname(config))
    torch.set_num_threads(1)
    cfg = load_config(config)
    cfg.work_dir = str(work_dir)
    cfg.resume_from = 'auto'
    runner = train_segmentor(cfg)
    os._exit(0 if runner.stopped_by is None else 128 + runner.stopped_by)


def finish(config, work_dir):
    process = start(train, config, work_dir)
    process.join(240)
    assert process.exitcode == 0


def evaluations(work_dir):
    """Iteration -> mIoU, of all logs of a work dir."""
    lines = [line for path in work_dir.glob('*.log.json') for line in path.read_text().splitlines() if '"val"' in line]
    return {record['iter']: record['mIoU'] for record in map(json.loads, lines)}


@pytest.mark.timeout(600 + 3 * SECONDS)
def test_kills_and_stops_lose_no_iteration_and_no_evaluation(tmp_path):
    data = write_vspw(tmp_path / 'vspw')
    config = str(write_tiny_config(tmp_path / 'c.py', data, iters=ITERS, workers=2, crop=32, extra=EXTRA))
    finish(config, tmp_path / 'whole')
    expected = read_checkpoint(tmp_path / 'whole' / f'iter_{ITERS}.pth')
    scores = evaluations(tmp_path / 'whole')
    assert sorted(scores) == [4, 8, 12]
    (best,) = (tmp_path / 'whole').glob('best_*')
    for number in rounds():
        rng = random.Random(number)
        work = tmp_path / str(number)
        for _ in range(rng.randrange(1, 6)):
            process = start(train, config, work)
            time.sleep(rng.uniform(0.2, 4))
            wanted = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
            with contextlib.suppress(ProcessLookupError):  # it may have finished
                os.kill(process.pid, wanted)
            process.join(120)
            assert process.exitcode is not None, f'round {number}: {wanted.name} ended nothing'
            assert process.exitcode in (0, 128 + wanted, -wanted, 1), f'round {number}: {process.exitcode}'
        finish(config, work)
        assert_same(read_checkpoint(work / f'iter_{ITERS}.pth'), expected)
        assert evaluations(work) == scores, f'round {number}'
        assert [path.name for path in work.glob('best_*')] == [best.name]


def test_overrides(tmp_path):
    config = write_tiny_config(
        tmp_path / 'tiny.py', write_vspw(tmp_path / 'data'), base='video_themask_mit_b0', extra=FUZZ_EXTRA)
    for number in rounds():
        check_overrides(config, 10_000 + number)


def test_configs(tmp_path):
    """Letters of a config file changed: it loads, or is refused by one line."""
    source = write_tiny_config(tmp_path / 'c.py', write_vspw(tmp_path / 'data')).read_bytes()
    path = tmp_path / 'damaged.py'
    for number in rounds():
        path.write_bytes(damaged(source, random.Random(number)))
        try:
            load_config(path)
        except (ConfigError, DataError) as error:
            assert str(error)


@pytest.mark.parametrize('kind', ['.jpg', '.png', 'mask'])
def test_images(tmp_path, kind):
    label = np.random.default_rng(0).integers(0, 9, (40, 60)).repeat(2, 0).astype(np.uint8)
    if kind == 'mask':
        buffer = io.BytesIO()
        Image.fromarray(label).save(buffer, 'PNG')
        source = buffer.getvalue()
    else:
        source = cv2.imencode(kind, np.stack([label * 20] * 3, -1))[1].tobytes()
    path = tmp_path / f'x{kind if kind != "mask" else ".png"}'
    path.write_bytes(source)
    whole = read_mask(path) if kind == 'mask' else read_frame(path)
    wrong = 0
    for number in rounds():
        path.write_bytes(damaged(source, random.Random(number)))
        try:
            found = read_mask(path) if kind == 'mask' else read_frame(path)
        except DataError as error:
            assert str(path) in str(error)
            continue
        wrong += found.shape != whole.shape or not np.array_equal(found, whole)
    if kind != '.jpg':  # which has no checksums
        assert not wrong


def test_checkpoints(tmp_path):
    state = {f'layer{i}.weight': torch.randn(5, 7) for i in range(3)}
    path = tmp_path / 'x.pth'
    torch.save({'meta': {'iter': 3, 'CLASSES': ['a', 'b']}, 'state_dict': state}, path)
    source = path.read_bytes()
    for number in rounds():
        path.write_bytes(damaged(source, random.Random(number)))
        try:
            found = read_checkpoint(path)['state_dict']
        except CheckpointError as error:
            assert str(path) in str(error)
            continue
        known = [name for name in found if name in state]
        assert all(torch.equal(found[name], state[name]) for name in known), f'round {number}: silently altered'


def test_logs(tmp_path, capsys):
    from tools import analyze_logs

    lines = [{'exp_name': 'x', 'seed': 1}] + [
        {'mode': 'train', 'iter': i, 'loss': 1 / (i + 1), 'lr': 1e-4, 'acc': math.nan} for i in range(20)]
    source = '\n'.join(map(json.dumps, lines)).encode()
    path = tmp_path / 'a.log.json'
    for number in rounds():
        path.write_bytes(damaged(source, random.Random(number)))
        status = analyze_logs.main([str(path), '--table'])
        err = capsys.readouterr().err
        assert status == 0 or (status == 1 and err.startswith('error: ') and 'Traceback' not in err), number


def test_report_pages(tmp_path, capsys):
    from mmseg.apps.report import write_report
    from tests.apps.test_report import collect
    from tools import report

    sink, results = collect([6, 7], [0.1, 0.3])
    page = write_report([sink.run(results, 'run')], tmp_path / 'whole')
    source = page.read_bytes()
    (tmp_path / 'in').mkdir()
    for number in rounds():
        (tmp_path / 'in' / 'index.html').write_bytes(damaged(source, random.Random(number)))
        status = report.main([str(tmp_path / 'in'), '--out', str(tmp_path / 'out')])
        err = capsys.readouterr().err
        assert status == 0 or (status == 1 and err.startswith('error: ') and 'Traceback' not in err), number
