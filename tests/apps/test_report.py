"""The page of a test: what it keeps of the stream, its numbers, its size, and that it works in a browser."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg.apis import init_segmentor
from mmseg.apis.test import metrics_for
from mmseg.apps.report import (
    ReportSink,
    read_predictions,
    read_report,
    run_of_predictions,
    write_report,
)
from mmseg.core.evaluation import StreamingMetrics
from mmseg.datasets import build_dataset
from mmseg.utils.errors import DataError
from mmseg.utils.visual import write_label_png
from tests.browser import CHROMIUM, DRIVER, chromium
from tests.tiny_config import write_tiny_config
from tests.tool_process import ROOT, environment, run_tool
from tests.vspw_fixture import test_config as vspw_test_config
from tests.vspw_fixture import write_vspw
from tools import report as report_tool

NAMES = [f'<class> "{i}"' for i in range(8)]
PALETTE = [[30 * i, 255 - 30 * i, 90] for i in range(8)]


def data_set(lengths):
    frames = [[f'{j:04d}' for j in range(length)] for length in lengths]
    videos = [SimpleNamespace(name=f'video{i:02d}', frames=names) for i, names in enumerate(frames)]
    return SimpleNamespace(CLASSES=NAMES, PALETTE=PALETTE, ignore_index=255, videos=videos)


def scene(seed, frame, height=36, width=60):
    """Ground truth with a moving thing and a void border."""
    gt = np.full((height, width), seed % 8, np.uint8)
    gt[10:20, (3 * frame) % 40 : (3 * frame) % 40 + 12] = (seed + 1) % 8
    gt[:2] = 255
    return gt


def flawed(gt, rng, share):
    pred = np.where(gt == 255, 0, gt).astype(np.uint8)
    pred[rng.random(gt.shape) < share] = 3
    return pred


def metrics_of(data):
    return StreamingMetrics(8, videos={v.name: v.frames for v in data.videos}, class_names=NAMES, per_frame=True)


def collect(lengths, shares, shuffle=None, keep=None, **options):
    """A run over videos of ``lengths``, or some of them; predictions are wrong in ``shares`` of the pixels."""
    data = data_set(lengths)
    metrics = metrics_of(data)
    sink = ReportSink(data, metrics, **options)
    rng = np.random.default_rng(0)
    for seed, (video, share) in enumerate(zip(data.videos, shares)):
        maps = [(gt, flawed(gt, rng, share)) for gt in (scene(seed, i) for i in range(len(video.frames)))]
        if keep is not None and seed not in keep:
            continue
        order = list(range(len(maps)))
        if shuffle is not None:
            shuffle.shuffle(order)
        for i in order:
            gt, pred = maps[i]
            image = np.array(PALETTE, np.uint8)[np.minimum(gt, 7)]
            sink.add(video.name, video.frames[i], image, pred, gt)
            metrics.update(video.name, video.frames[i], pred, gt)
        metrics.finish(video.name)
        sink.finish_video(video.name)
    return sink, metrics.results()


def test_worst_and_best_are_exact_the_median_is_near_and_few_pictures_are_kept():
    shares = np.random.default_rng(1).permutation(np.linspace(0.02, 0.6, 40))
    sink, results = collect([3] * 40, shares, per_group=2)
    run = sink.run(results, 'run')
    ranked = [row['video'] for row in sorted(results.as_dict()['per_video'], key=lambda row: row['mIoU'])]
    shown = {}
    for player in run['players']:
        shown.setdefault(player['group'], []).append(player['video'])
    assert shown['worst'] == ranked[:2] and shown['best'] == ranked[-1:-3:-1]
    assert all(abs(ranked.index(video) - 19.5) < 6 for video in shown['median'])
    assert {'video00', 'video20'} <= {video for videos in shown.values() for video in videos}, 'always shown'
    assert len(sink._players) <= 2 + 2 + 8 + 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_frames_does_not_matter(lengths, random):
    shares = [0.1 * (i + 1) for i in range(len(lengths))]
    sink, results = collect(lengths, shares)
    shuffled, again = collect(lengths, shares, shuffle=random)
    assert json.dumps(sink.run(results, 'x')) == json.dumps(shuffled.run(again, 'x'))


def test_time_lines_by_their_definition():
    lengths = [7]
    sink, results = collect(lengths, [0.2])
    line = sink.run(results, 'run')['lines']['video00']
    rng = np.random.default_rng(0)
    maps = [(gt, flawed(gt, rng, 0.2)) for gt in (scene(0, i) for i in range(7))]
    for i, (gt, pred) in enumerate(maps):
        valid = gt != 255
        ious = []
        for c in range(8):
            union = (valid & ((gt == c) | (pred == c))).sum()
            if union:
                ious.append((valid & (gt == c) & (pred == c)).sum() / union)
        assert abs(line['iou'][i] - np.mean(ious)) < 1e-4
        if i:
            still = gt == maps[i - 1][0]
            assert abs(line['consistency'][i] - (still & (pred == maps[i - 1][1])).sum() / still.sum()) < 1e-4
    assert line['consistency'][0] is None


def test_pictures_are_small_and_labels_exact():
    sink, results = collect([5], [0.1], max_frames=3, width=30)
    (player,) = sink.run(results, 'run')['players']
    assert player['frames'] == ['0000', '0001', '0002'] and player['of'] == 5
    decode = lambda text, flag: cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), flag)  # noqa: E731
    for i, pictures in enumerate(player['pictures']):
        assert decode(pictures['image'], cv2.IMREAD_COLOR).shape == (18, 30, 3)
        gt = decode(pictures['gt'], cv2.IMREAD_UNCHANGED)
        assert (gt == cv2.resize(scene(0, i), (30, 18), interpolation=cv2.INTER_NEAREST)).all()


def test_two_ranks_are_one():
    lengths, shares = [4, 6, 5, 3], [0.1, 0.4, 0.2, 0.3]
    whole, results = collect(lengths, shares, per_group=1)
    parts = [collect(lengths, shares, per_group=1, keep=keep) for keep in ((0, 2), (1, 3))]
    own = [json.loads(json.dumps((sink._players, sink._sheet))) for sink, _ in parts]
    for sink, _ in parts:
        assert json.dumps(sink.run(results, 'run', gather=lambda _: own)) == json.dumps(whole.run(results, 'run'))


def test_the_page_is_bounded_and_gives_its_runs_back(tmp_path):
    sink, results = collect([20] * 6, [0.1 * i for i in range(6)], per_group=2)
    run = sink.run(results, 'run </script>', {'config': 'a.py'})
    page = write_report([run], tmp_path / 'whole')
    assert read_report(tmp_path / 'whole') == [json.loads(json.dumps(run))]
    assert read_report(page)[0]['players'][0]['frames'] == [f'{i:04d}' for i in range(20)]
    small = write_report([run], tmp_path / 'small', max_mib=0.15)
    assert small.stat().st_size <= 0.15 * 2**20 < page.stat().st_size
    assert 0 < len(read_report(small)[0]['players'][0]['frames']) < 20
    least = write_report([run], tmp_path / 'least', max_mib=0.0001)  # less than a page without players
    assert not any(player['frames'] for player in read_report(least)[0]['players'])
    (tmp_path / 'other.html').write_text('<p>')
    for path in (tmp_path / 'other.html', tmp_path / 'nowhere'):
        with pytest.raises(DataError, match='no report'):
            read_report(path)
    with pytest.raises(DataError, match='other classes'):
        write_report([run, {**run, 'results': {'per_class': []}}], tmp_path)


@pytest.fixture(scope='module')
def vspw(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    data = write_vspw(root / 'vspw', {'val': {'v0': 24, 'v1': 20, 'v2': 6}, 'train': {'a': 3}, 'test': {'t': 1}})
    dataset = build_dataset(vspw_test_config(data))
    rng = np.random.default_rng(0)
    for name, share in (('good', 0.05), ('poor', 0.3)):
        for item in dataset:
            for frame, gt in zip(item['frames'], item['label']):
                label = np.where(gt == 255, 0, gt).astype(np.uint8)
                label[rng.random(gt.shape) < share] = 7
                write_label_png(root / name / item['video'] / f'{frame}.png', label, dataset.PALETTE)
    return root, dataset


def test_predictions_on_disk_are_scored_as_in_a_test(vspw):
    root, dataset = vspw
    run = run_of_predictions(dataset, read_predictions(root / 'poor', dataset), 'poor')
    metrics = metrics_for(dataset)
    for video, frame, pred in read_predictions(root / 'poor', dataset):
        item = next(i for i in dataset if i['video'] == video and frame in i['frames'])
        metrics.update(video, frame, pred, item['raw_label'][item['frames'].index(frame)])
    assert run['results'] == metrics.results().as_dict()
    for predictions, message in (([('v0', 'x', None)], 'v0/x'), ([], 'no predictions')):
        with pytest.raises(DataError, match=message):
            run_of_predictions(dataset, iter(predictions), 'x')


@pytest.fixture(scope='module')
def pages(vspw):
    """Pages of two runs and of their comparison, made by the tool."""
    root, _ = vspw
    config = write_tiny_config(root / 'config.py', root / 'vspw')
    for name in ('good', 'poor'):
        done = run_tool('report', root / name, '--config', config, '--out', root / f'{name}.page', '--videos', 1,
                        '--json', root / f'{name}.json')
        assert done.returncode == 0, done.stderr
    done = run_tool('report', root / 'good.page', root / 'poor.page', '--out', root / 'both', '--names', 'A', 'B')
    assert done.returncode == 0, done.stderr
    return root


def test_tool(pages):
    assert [run['name'] for run in read_report(pages / 'both')] == ['A', 'B']
    done = run_tool('report', pages / 'good', '--out', pages / 'x')
    assert done.returncode == 1 and '--config' in done.stderr and 'Traceback' not in done.stderr
    assert 'examples:' in run_tool('report', '--help').stdout


@pytest.fixture(scope='module')
def nested(tmp_path_factory):
    """A data set whose names want a natural order, its config, and files of predictions: all of them, and some."""
    root = tmp_path_factory.mktemp('nested')
    data = write_vspw(root / 'vspw', {'val': {'city/v10': 4, 'city/v9': 3, 'city/v8': 3}, 'train': {'a': 3}})
    dataset = build_dataset(vspw_test_config(data))
    maps = {f'{item["video"]}/{frame}': np.where(gt == 255, 0, gt).astype(np.uint8)
            for item in dataset for frame, gt in zip(item['frames'], item['label'])}
    (root / 'whole').mkdir()
    np.savez(root / 'whole' / 'maps.npz', **maps)
    np.savez(root / 'part.npz', **{k: v for k, v in maps.items() if k[:8] != 'city/v8/' and k != 'city/v10/00000002'})
    return root, write_tiny_config(root / 'config.py', data)


def report(*args):
    return report_tool.main(list(map(str, args)))


def test_what_an_incomplete_file_leaves_out_is_named(nested, tmp_path, capsys):
    root, config = nested
    assert report(root / 'whole' / 'maps.npz', '--config', config, '--out', tmp_path / 'whole') == 0
    assert capsys.readouterr().err == ''
    assert report(root / 'part.npz', '--config', config, '--out', tmp_path / 'part') == 0
    left_out = '2 videos: city/v10 (1 of 4 frames), city/v8 (3 of 3 frames)'
    assert f"run 'part' has left out {left_out}" in capsys.readouterr().err
    (part,), (whole,) = read_report(tmp_path / 'part'), read_report(tmp_path / 'whole')
    assert part['about'].pop('left out') == left_out and part['about'].keys() == whole['about'].keys() == {'note'}
    assert 'VC8 has no value: no video has 9 labelled frames in a row' in whole['about']['note']
    assert {shown['video'] for shown in whole['sheet']} == {'city/v8', 'city/v9', 'city/v10'}
    assert list(whole['lines']) == ['city/v8', 'city/v9', 'city/v10'] and list(part['lines']) == ['city/v9', 'city/v10']
    assert [row['frames'] for row in part['results']['per_video']] == [3, 3]
    assert {player['video'] for player in whole['players']} == set(whole['lines'])


def test_no_page_takes_the_place_of_an_input(nested, tmp_path, capsys):
    root, config = nested
    maps = root / 'whole' / 'maps.npz'
    assert report(maps, '--config', config, '--out', tmp_path / 'page') == 0
    (tmp_path / 'link').symlink_to('page')
    before = {path: path.read_bytes() for path in (tmp_path / 'page' / 'index.html', maps, config)}
    for args, message in (
        ((tmp_path / 'page', '--out', tmp_path / 'page'), '--out: '),
        ((tmp_path / 'page' / 'index.html', '--out', tmp_path / 'link'), '--out: '),
        ((tmp_path / 'page', '--out', tmp_path / 'x', '--json', tmp_path / 'link' / 'index.html'), '--json: '),
        ((tmp_path / 'page', '--out', tmp_path / 'x', '--json', tmp_path / 'x' / 'index.html'), 'the page of --out'),
        ((root / 'whole', '--config', config, '--out', tmp_path / 'x', '--json', maps), '--json: '),
        ((maps, '--config', config, '--out', tmp_path / 'x', '--json', config), 'is the config'),
    ):
        capsys.readouterr()
        assert report(*args) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('error: ') and message in line and 'would be overwritten' in line
    assert before == {path: path.read_bytes() for path in before} and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('options, message', [
    (['--videos', '-1'], '--videos'), (['--frames', '0'], '--frames'), (['--max-mib', 'nan'], '--max-mib'),
    (['--max-mib', '-1'], '--max-mib'), (['--names', 'a', 'b'], '--names'), (['--json', 'file/x.json'], 'file'),
    (['--out', 'file'], 'file'),
])
def test_wrong_options_of_the_tool_are_one_line(nested, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    root, config = nested
    assert report(root / 'part.npz', '--config', config, '--out', tmp_path / 'page', *options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ') and message in line


def places(value, path=()):
    """All places of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in children:
        yield from places(inside, (*path, key))


def damaged(value, path, how):
    value = json.loads(json.dumps(value))
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if how == 'gone':
        del inside[path[-1]]
    else:
        inside[path[-1]] = how
    return value


def test_any_damage_of_a_page_is_one_line(tmp_path, capsys):
    sink, results = collect([3, 2], [0.1, 0.4], per_group=1)
    page = write_report([sink.run(results, 'run')], tmp_path / 'page')
    before, data, after = re.split(
        '(?<=application/json">)(.*?)(?=</script>)', page.read_text(encoding='utf-8'), maxsplit=1, flags=re.DOTALL)
    whole = json.loads(data)
    where = [path for path in places(whole) if path]
    rng = np.random.default_rng(0)
    seen = {0: 0, 1: 0}
    for path in [*(p for p in where if len(p) < 5), *(where[i] for i in rng.integers(0, len(where), 150))]:
        how = ('gone', None, 'text', -1.5, [], {}, [[1]], {'a': None}, True)[rng.integers(9)]
        text = json.dumps(damaged(whole, path, how))
        page.write_text(before + text + after, encoding='utf-8')
        status = report(page, page, '--out', tmp_path / 'again', '--json', tmp_path / 'scores.json')
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == status, (path, how)
        seen[status] += 1
    assert seen[1] > seen[0]
    for text in (data[:-9], 'null', '[]', '{}', '{"runs": 3}', '{"runs": []}', '[' * 100_000, 'NaN', '\x00',
                 data.replace('"mIoU":0', '"mIoU":NaN,"x":0', 1)):
        page.write_text(before + text + after, encoding='utf-8')
        assert report(page, '--out', tmp_path / 'again') == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('error: ') and str(page) in line and 'report' in line
    page.write_bytes(b'\xff\xfe binary')
    assert report(page, '--out', tmp_path / 'again') == 1


@pytest.fixture(scope='module')
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip('needs chromium and chromedriver (Debian: chromium chromium-driver)')
    with chromium() as window:
        yield window


MISSING = '\u2013'
READY = "document.querySelector('#views canvas') && document.querySelector('#position').textContent"
POSITION = "return document.querySelector('#position').textContent"
SHARES = "return [...document.querySelectorAll('#views canvas')].map(c => c.dataset.share)"
PIXELS = """const c = document.querySelector(`#views canvas[data-view=${arguments[0]}]`);
return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"""


def test_the_page_in_chromium(pages, browser, vspw, tmp_path):
    _, dataset = vspw
    browser.open(pages / 'poor.page' / 'index.html')
    browser.wait(READY)
    scores = json.loads((pages / 'poor.json').read_text())
    shown = browser.run("return [...document.querySelectorAll('#summary td[data-metric]')].map("
                        'c => [c.dataset.metric, c.dataset.value === "" ? null : +c.dataset.value, c.textContent])')
    assert {metric: value for metric, value, _ in shown} == {k: v for k, v in scores.items() if not isinstance(v, list)}
    assert all(text == (f'{100 * value:.2f}' if value is not None else MISSING) for _, value, text in shown)
    bars = browser.run("return [...document.querySelectorAll('#classes [data-class]')].map("
                       'b => [b.dataset.class, +b.dataset.value])')
    want = sorted(((r['class'], r['IoU']) for r in scores['per_class'] if r['pixels']), key=lambda row: -row[1])
    assert [value for _, value in bars] == [value for _, value in want] and dict(bars) == dict(want)
    dots = browser.run("return [...document.querySelectorAll('.dot')].map("
                       'd => [d.dataset.video, +d.dataset.miou, +d.dataset.vc])')
    assert dots == [[r['video'], r['mIoU'], r['VC16']] for r in scores['per_video'] if r['VC16'] is not None]

    (run,) = read_report(pages / 'poor.page')
    confusion = np.array(run['confusion'])
    occurring = np.flatnonzero(confusion.any(0) | confusion.any(1))
    row, column = occurring[-2], occurring[-1]
    corner = browser.run("const c = document.querySelector('#confusion'), b = c.getBoundingClientRect();"
                         'c.onpointermove({clientX: b.right - 2, clientY: b.bottom - 2 - b.width / c.width * 28});'
                         "return document.querySelector('#tip').textContent")
    share = 100 * confusion[row, column] / max(confusion[row].sum(), 1)
    assert corner == (f'{dataset.CLASSES[row]} → {dataset.CLASSES[column]}: {share:.2f} % '
                      f'({confusion[row, column]:,} pixels)')

    # What the player draws is computed from the labels: compare with numpy.
    player = run['players'][0]
    read = {f: p for v, f, p in read_predictions(pages / 'poor', dataset) if v == player['video']}
    items = [item for item in dataset if item['video'] == player['video']]
    gts = {f: gt for item in items for f, gt in zip(item['frames'], item['label'])}
    errors = [((read[f] != gts[f]) & (gts[f] != 255)).sum() / (gts[f] != 255).sum() for f in player['frames']]
    assert player['group'] == 'worst' and f'({np.argmax(errors) + 1} of' in browser.run(POSITION), 'on its worst frame'
    for key in ('Home', 'ArrowRight', 'ArrowRight', 'ArrowLeft'):
        browser.press(key)
    assert '(2 of' in browser.run(POSITION)
    before, frame = player['frames'][:2]
    wrong = (read[frame] != gts[frame]) & (gts[frame] != 255)
    still = gts[frame] == gts[before]
    flicker = still & (read[frame] != read[before])
    shares = dict(zip(('frame', 'truth', 'prediction', 'error', 'flicker'), browser.run(SHARES)))
    assert abs(float(shares['error']) - wrong.sum() / (gts[frame] != 255).sum()) < 1e-9
    assert abs(float(shares['flicker']) - flicker.sum() / still.sum()) < 1e-9
    error = np.reshape(browser.run(PIXELS, 'error'), (*wrong.shape, 4))
    assert ((error[..., :3] == (224, 52, 75)).all(-1) == wrong).all()

    browser.press('End')
    assert f"({len(player['frames'])} of" in browser.run(POSITION)
    x, y, width, height = browser.box('#views canvas')
    browser.drag(x + width * 0.9, y + height / 2, x + width * 0.5, y + height / 2)
    middle = round(0.5 * (len(player['frames']) - 1)) + 1
    assert browser.run(POSITION).split('(')[1].startswith((f'{middle} of', f'{middle + 1} of'))
    assert 'truth:' in browser.run("return document.querySelector('#tip').textContent")
    browser.press('Home')
    browser.press('Space')
    browser.wait("document.querySelector('#position').textContent.includes('(4 of')")
    browser.press('Space')
    x, y, width, height = browser.box('#scrub')
    browser.drag(x + 2, y + height / 2, x + width - 3, y + height / 2)
    assert f"({len(player['frames'])} of" in browser.run(POSITION)
    browser.run("const s = document.querySelector('#video'); s.selectedIndex = s.options.length - 1; s.onchange()")
    browser.wait("document.querySelector('#position').textContent.includes('(1 of')")
    browser.screenshot(tmp_path / 'page.png')
    browser.open(pages / 'poor.page' / 'index.html', f'{player["video"]}/3')
    browser.wait("document.querySelector('#position').textContent.includes('(3 of')")
    assert browser.log() == []


def test_two_runs_in_chromium(pages, browser, tmp_path):
    browser.open(pages / 'both' / 'index.html')
    browser.wait(READY)
    rows = browser.run("return [...document.querySelectorAll('#summary tr')].map("
                       'r => [...r.children].map(c => c.textContent))')
    assert [row[0] for row in rows] == ['', 'A', 'B', 'difference']
    good, poor = (json.loads((pages / f'{name}.json').read_text()) for name in ('good', 'poor'))
    assert rows[0][1] == 'mIoU' and rows[3][1] == f'{100 * (poor["mIoU"] - good["mIoU"]):.2f}'
    views = browser.run("return [...document.querySelectorAll('#views figcaption span')].map(s => s.textContent)")
    kinds = ('prediction', 'error', 'flicker')
    assert views == ['frame', 'truth', *(f'{view}, {run}' for run in 'AB' for view in kinds)]
    for select, choices in (('#which', ('0', '1', 'difference')), ('#order', ('support', 'name', 'difference'))):
        for choice in choices:
            browser.run('const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.onchange()',
                        select, choice)
    browser.run("document.querySelector('.dot').onclick()")
    browser.screenshot(tmp_path / 'page.png')
    assert browser.log() == []


def test_a_narrow_page_with_isolated_points_in_chromium(browser, tmp_path):
    sink, results = collect([2, 5], [0.1, 0.4], per_group=1)
    browser.open(write_report([sink.run(results, 'run')], tmp_path))
    browser.wait(READY)
    browser.resize(500, 900)
    browser.wait("(s => s.scrollWidth <= s.clientWidth)(document.querySelector('#summary'))")
    points = "const s = document.querySelector('#line-video'); s.value = arguments[0]; s.onchange();" \
        "return document.querySelectorAll('#lines .alone').length"
    assert [browser.run(points, video) for video in ('video00', 'video01')] == [1, 0]
    browser.screenshot(tmp_path / 'narrow.png')
    browser.resize(1300, 900)
    assert browser.log() == []


@pytest.mark.parametrize('processes', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_test_tool_writes_the_page(tmp_path, processes):
    data = write_vspw(tmp_path / 'vspw', {'val': {'v0': 7, 'v1': 5, 'v2': 4}, 'train': {'a': 3}, 'test': {'t': 1}})
    config = write_tiny_config(tmp_path / 'config.py', data)
    torch.manual_seed(0)
    torch.save({'meta': {}, 'state_dict': init_segmentor(config).state_dict()}, tmp_path / 'model.pth')
    done = subprocess.run(
        ['./tools/dist_test.sh', config, tmp_path / 'model.pth', str(processes), '--report', tmp_path / 'page',
         '--work-dir', tmp_path / 'scores'], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = read_report(tmp_path / 'page')
    scores = json.loads((tmp_path / 'scores' / 'metrics.json').read_text())
    assert {key: scores[key] for key in run['results']} == run['results']
    assert {player['video'] for player in run['players']} == set(run['lines']) == {'v0', 'v1', 'v2'}
