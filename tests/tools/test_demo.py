"""The demo as a process, from the data set to the report: minutes."""

from __future__ import annotations

import json

import pytest

from mmseg.apps.report import read_report
from mmseg.apps.video_io import open_source
from tests.tool_process import run_tool


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_ends_with_a_report_of_both_models_and_a_labelled_video(tmp_path):
    done = run_tool('demo', '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    one_frame, clips = read_report(tmp_path / 'report')
    for run, folder in ((one_frame, '1f'), (clips, 'video')):
        scores = json.loads((tmp_path / folder / 'test' / 'metrics.json').read_text())
        assert {key: scores[key] for key in run['results']} == run['results']
        assert scores['mIoU'] > 0.7
    assert clips['results']['VC16'] > one_frame['results']['VC16'], 'clips flicker less'
    config, weights, out = 'local_configs/themask/mini_video.py', tmp_path / 'video/latest.pth', tmp_path / 'bfloat16'
    done = run_tool('test', config, weights, '--work-dir', out, '--options', 'fp16.dtype=bfloat16')
    assert done.returncode == 0, done.stderr
    low = json.loads((out / 'metrics.json').read_text())
    assert abs(low['mIoU'] - clips['results']['mIoU']) < 0.005, 'half a point'
    assert low != clips['results']
    frames = list(open_source(tmp_path / 'overlay.mp4'))
    assert len(frames) == 20 and frames[0].image.shape[1] == 320, 'a frame and its overlay side by side'
    assert len(list((tmp_path / 'pictures_video').glob('*/*.jpg'))) == 14 * 20
