"""What only a GPU can show: the op's CUDA kernels, parity of the whole model, synchronisation, graphs, training.

``make test-gpu`` runs all of it; skipped where there is no GPU, and in ``make test``, which hides it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.apis import init_segmentor, segment_video
from mmseg.core import build_optimizer
from mmseg.core.precision import Precision
from mmseg.kernels import library
from mmseg.kernels.ms_deform_attn import (
    ms_deform_attn_fused_pytorch,
    ms_deform_attn_pytorch,
)
from mmseg.models import build_segmentor
from mmseg.models.decode_heads.mask2former.pixel_decoder.ops import ms_deform_attn, ms_deform_attn_fused
from mmseg.models.losses import point_sampling
from mmseg.models.structures import ClipTarget
from tests.apps.test_video import spread
from tests.kernels.test_ops import assert_sums_in_float32, forms, problem, with_gradients
from tests.kernels.test_ops_cuda import CASES
from tests.models.test_segmentor import SIZE, config, filled, frames, lively, share_equal
from tests.reference import recipe
from tests.tiny import tiny_model
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU, or not run by make test-gpu')
GPU = torch.device('cuda')
ROOT = Path(__file__).parents[1]
EXACT = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.set_float32_matmul_precision('highest')


@pytest.fixture(scope='module', autouse=True)
def _native_op():
    loaded = library.native('cuda')
    assert not isinstance(loaded, library.BuildError), loaded


def on_gpu(arguments, dtype=None):
    return [a.to(GPU, dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


def on_cpu(tensors):
    return [t.cpu() for t in tensors]


MORE_CASES = [
    dict(shapes=((1, 7), (7, 1), (1, 1))),
    dict(shapes=((60, 108), (30, 54), (15, 27)), n=2, queries=8505, heads=8, width=32, points=4),
    dict(queries=0),
    dict(n=0),
]


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', [*CASES, *MORE_CASES], ids=str)
def test_op_equals_the_pytorch_form(case, fused):
    arguments = problem(**case, dtype=torch.float64, fused=fused)
    ours, form = forms(fused)
    expected = form(*arguments)
    grad_out = torch.randn_like(expected)
    expected, wanted = with_gradients(form, arguments, grad_out)
    out, grads = with_gradients(ours, on_gpu(arguments), grad_out.to(GPU))
    torch.testing.assert_close(out.cpu(), expected)
    for grad, exact in zip(on_cpu(grads), wanted):
        torch.testing.assert_close(grad, exact)

    out, grads = with_gradients(ours, on_gpu(arguments, torch.float32), grad_out.to(GPU, torch.float32))
    torch.testing.assert_close(out.double().cpu(), expected, **EXACT)
    for grad, exact in zip(on_cpu(grads), wanted):
        if exact.numel():  # on a pixel border rounding decides between two one-sided derivatives
            difference = ((grad - exact).abs() / (1 + exact.abs().max())).flatten()
            assert difference.kthvalue(max(int(0.98 * difference.numel()), 1)).values < 1e-4


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, fused):
    half = on_gpu(problem(width=32, fused=fused), dtype)
    assert_sums_in_float32(half, fused)
    with torch.autocast('cuda', dtype):
        assert forms(fused)[0](*half).dtype == torch.float32


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 1e30, -1e9, 3e4])
def test_unusable_locations_are_outside(bad):
    value, shapes, reference, offsets, logits = on_gpu(problem(spread=0.5))
    broken, outside = offsets.clone(), offsets.clone()
    broken[:, :, :, :, 0, 1], outside[:, :, :, :, 0, 1] = bad, 50.0
    results = [with_gradients(ms_deform_attn_fused, (value, shapes, reference, x, logits)) for x in (broken, outside)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('fused', [False, True])
def test_contracts_of_torch_library(fused):
    value, shapes, *others = on_gpu(problem(width=3, queries=3, n=1, dtype=torch.float64, fused=fused))
    flat = [size for shape in shapes for size in shape]
    name = 'ms_deform_attn_fused' if fused else 'ms_deform_attn'
    leaves = [a.requires_grad_() for a in (value, *others)]
    torch.library.opcheck(getattr(torch.ops.themask, name), (leaves[0], flat, *leaves[1:]))
    assert torch.autograd.gradcheck(lambda value, *others: forms(fused)[0](value, shapes, *others), tuple(leaves))


def test_wrong_device_is_named():
    value, shapes, reference, offsets, logits = problem()
    with pytest.raises(ValueError, match='sampling_offsets is on cpu, but value is on cuda'):
        ms_deform_attn_fused(value.to(GPU), shapes, reference.to(GPU), offsets, logits.to(GPU))


@pytest.mark.parametrize('fused', [False, True])
def test_deterministic_backward(fused):
    arguments = on_gpu(problem(shapes=((40, 40),), queries=20000, heads=4, width=32, fused=fused))
    free = with_gradients(forms(fused)[0], arguments)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(forms(fused)[0], arguments) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for _, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))
    for grad, expected in zip(runs[0][1], free[1]):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_runs_on_the_current_stream():
    value, shapes, *others = on_gpu(problem(width=32))
    expected = ms_deform_attn_fused(2 * value, shapes, *others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a kernel on any other stream would overtake the doubling
        value.mul_(2)
        out = ms_deform_attn_fused(value, shapes, *others)
    stream.synchronize()
    torch.testing.assert_close(out, expected)


def test_forward_and_backward_in_a_cuda_graph():
    value, shapes, reference, offsets, logits = on_gpu(problem(width=32, queries=50))
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]

    def step():
        out = ms_deform_attn_fused(leaves[0], shapes, reference, *leaves[1:])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    with torch.no_grad():
        value.mul_(-0.5)
        offsets.add_(0.25)
    graph.replay()
    for result, expected in zip(results, step()):
        torch.testing.assert_close(result, expected)


def test_more_than_two_to_the_31_values():
    """Indices into value, gradient and output are beyond 32 bits; what lies there must be what a small call gives."""
    side, rows = 2900, 4
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip('needs 40 GB')
    small, _, locations, weights = on_gpu(problem(((rows, side),), n=1, heads=8, width=32, points=2, fused=False))
    small, weights = small.bfloat16(), weights.float()
    value = torch.zeros(1, side * side, 8, 32, dtype=torch.bfloat16, device=GPU)
    assert value.numel() > 2**31
    value[:, -small.shape[1] :] = small
    pixels = torch.rand_like(locations) * torch.tensor([side - 1, rows - 2], device=GPU) + 0.5  # within the last rows
    pixels[..., 1] += 0.5
    far = pixels + torch.tensor([0, side - rows], device=GPU)
    expected, wanted = with_gradients(
        ms_deform_attn, (small, [(rows, side)], pixels / torch.tensor([side, rows], device=GPU), weights))
    out, grads = with_gradients(ms_deform_attn, (value, [(side, side)], far / side, weights))
    tolerance = dict(atol=0.05, rtol=0.02)  # float32 locations: 1e-4 of a pixel
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(grads[0][:, -small.shape[1] :], wanted[0], **tolerance)
    assert not grads[0][:, : -small.shape[1]].any()

    queries = 2**31 // 256 + 100
    del value, grads, out
    value = torch.randn(1, 12, 8, 32, dtype=torch.bfloat16, device=GPU)
    locations = torch.rand(1, queries, 8, 1, 1, 2, device=GPU)
    weights = torch.rand(1, queries, 8, 1, 1, device=GPU)
    out = ms_deform_attn(value, [(3, 4)], locations, weights)
    assert out.numel() > 2**31
    last = slice(queries - 50, None)
    torch.testing.assert_close(out[:, last], ms_deform_attn(value, [(3, 4)], locations[:, last], weights[:, last]))


# The whole model.


@pytest.fixture(scope='module', params=['1f', 'video'])
def reference_model(request):
    return request.param, filled(build_segmentor(config(request.param, 'b0').model)).to(GPU)


@pytest.mark.parametrize('choice', ['cuda', 'pytorch'])
@pytest.mark.parametrize('length', [1, 2, 4])
def test_whole_inference_equals_the_reference(reference, reference_model, length, choice, monkeypatch):
    monkeypatch.setenv('THEMASK_OPS_BACKEND', choice)
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    clip = frames(60, length).to(GPU)
    with torch.no_grad():
        low, full = model.scores(clip), model.scores(clip, SIZE)
    assert recipe.check(gold, f't{length}/head_eval', low[0].cpu().numpy())[0] <= 1e-3
    assert recipe.check(gold, f't{length}/scores', full[0].cpu().numpy())[0] <= 1e-3
    assert share_equal(gold, f't{length}/argmax', model.predict([clip], [None], SIZE)[0].cpu()) >= 0.999


def test_views_and_windows_equal_the_reference(reference, reference_model):
    stage, model = reference_model
    gold = reference(f'segmentor_{stage}_b0.npz')
    clip, small = frames(60, 2).to(GPU), frames(70, 2, 64, 96).to(GPU)
    views, flips = [clip, clip.flip(-1), small, small.flip(-1)], [None, 'horizontal', None, 'horizontal']
    assert share_equal(gold, 't2/aug4_argmax', model.predict(views, flips, SIZE)[0].cpu()) >= 0.999
    whole = model.inference
    model.inference = type(whole)('slide', (64, 96), (48, 64))
    labels = model.predict([clip], [None], SIZE)[0].cpu()
    model.inference = whole
    assert share_equal(gold, 't2/slide_argmax', labels) >= 0.999


@pytest.fixture(params=['1f', 'video'])
def tiny(request):
    return lively(request.param)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_evaluation_never_makes_the_host_wait(tiny, dtype):
    model = tiny.to(GPU).eval()
    clip = torch.randn(1, 2, 3, 64, 96, device=GPU)

    def labels():
        with torch.inference_mode(), torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None):
            return model.predict([clip], [None], (60, 90))

    expected = labels()  # positions and resize matrices are made once
    torch.cuda.set_sync_debug_mode('error')
    try:
        found = labels()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(found, expected)


def test_evaluation_in_a_cuda_graph(tiny):
    model = tiny.to(GPU).eval()
    clip = torch.randn(1, 2, 3, 64, 96, device=GPU)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(2):
                model.predict([clip], [None], (60, 90))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            scores, labels = model.scores(clip), model.predict([clip], [None], (60, 90))
        clip.normal_()
        graph.replay()
        torch.testing.assert_close(scores, model.scores(clip), **EXACT)
    assert (labels == model.predict([clip], [None], (60, 90))).float().mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_compiled_evaluation(mode):
    torch._dynamo.reset()
    eager = build_segmentor(tiny_model('video')).to(GPU).eval()
    compiled = build_segmentor(tiny_model('video', compile_cfg=dict(mode=mode, fullgraph=True))).to(GPU).eval()
    compiled.load_state_dict(eager.state_dict())
    with torch.no_grad():
        for _ in range(3):
            clip = torch.randn(1, 2, 3, 64, 96, device=GPU)
            expected = eager.scores(clip)
            torch.testing.assert_close(compiled.scores(clip), expected, **EXACT)


@pytest.mark.slow
def test_a_video_with_cuda_graphs(tmp_path):
    """Clips share frames, whose features must outlive the graph that made them."""
    path = write_tiny_config(tmp_path / 'tiny.py', tmp_path, base='video_themask_mit_b0')
    eager = spread(init_segmentor(path, device=GPU))
    compiled = init_segmentor(path, device=GPU, options={'model.compile_cfg': dict(mode='reduce-overhead')})
    compiled.load_state_dict(eager.state_dict())
    images = list(np.random.default_rng(0).integers(0, 256, (7, 60, 107, 3), np.uint8))
    for how in (dict(overlap=1, stride=1), dict(overlap=1, stride=2), dict(online=True)):
        runs = [[label for _, label in segment_video(model, images, 2, **how)] for model in (eager, compiled)]
        assert len(np.unique(runs[0])) > 3 and (np.stack(runs[0]) == np.stack(runs[1])).mean() > 0.999, how


def loss_and_gradients(model, clip, labels):
    model.zero_grad()
    losses = model(clip, labels, iteration=100)
    sum(losses.values()).backward()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def without_chance(model, monkeypatch):
    """Drop path, dropout and points draw other numbers on a GPU and in compiled code: none, and fixed points."""

    def points(rows, n, device):
        return torch.from_numpy(recipe.points(rows, n)).to(device)

    monkeypatch.setattr(point_sampling, 'random_points', points)
    for module in model.modules():
        for name in ('rate', 'p', 'dropout'):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_compiled_training(mode, monkeypatch):
    torch._dynamo.reset()
    eager = without_chance(build_segmentor(tiny_model('video')), monkeypatch).to(GPU).train()
    compiled = build_segmentor(tiny_model('video', compile_cfg=dict(mode=mode, fullgraph=True)))
    compiled = without_chance(compiled, monkeypatch).to(GPU).train()
    compiled.load_state_dict(eager.state_dict())
    for step in range(4):  # CUDA graphs are recorded in the second and replayed from the third on
        clip = torch.randn(2, 2, 3, 64, 64, device=GPU)
        labels = torch.from_numpy(recipe.labels(step, 4, 64, 64, n_classes=5, n_regions=3)).view(2, 2, 64, 64).to(GPU)
        (expected, wanted), (losses, grads) = (loss_and_gradients(model, clip, labels) for model in (eager, compiled))
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-3), (step, name)
        total = torch.stack([grad.norm() for grad in wanted.values()]).norm()
        for name, grad in wanted.items():
            assert (grads[name] - grad).norm() <= 1e-2 * grad.norm() + 1e-3 * total, (step, name)
        with torch.no_grad():  # the same new weights for both
            for ours, theirs in zip(eager.parameters(), compiled.parameters()):
                ours -= 1e-3 * ours.grad
                theirs.copy_(ours)


def test_training_equals_that_on_the_cpu(tiny, monkeypatch):
    model = without_chance(tiny, monkeypatch).double().train()
    length = model.decode_head.predictor.num_frames
    clip = torch.randn(2, length, 3, 64, 64, dtype=torch.float64)
    labels = torch.from_numpy(recipe.labels(3, 2 * length, 64, 64, n_classes=5, n_regions=3)).view(2, length, 64, 64)
    expected, wanted = loss_and_gradients(model, clip, labels)
    other = copy.deepcopy(model).to(GPU)
    losses, grads = loss_and_gradients(other, clip.to(GPU), labels.to(GPU))
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    total = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        assert (grads[name].cpu() - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * total, name


def test_matching_makes_the_host_wait_once(tiny):
    head = tiny.to(GPU).train().decode_head
    length = head.predictor.num_frames
    clip = torch.randn(2, length, 3, 64, 64, device=GPU)
    labels = torch.randint(0, 5, (2, length, 64, 64), device=GPU)
    targets = ClipTarget.from_labels(labels, 5)
    output = head(tiny.backbone(clip.flatten(0, 1)), length)
    head.criterion(output, targets, iteration=100)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            losses = head.criterion(output, targets, iteration=100)
            torch.stack(list(losses.values())).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    waits = [w for w in caught if 'synchronizing' in str(w.message)]
    assert len(waits) == 1, [f'{w.filename}:{w.lineno}' for w in waits]


@pytest.mark.parametrize('dtype, scale', [('float32', 512.0), ('bfloat16', 512.0), ('float16', 'dynamic')])
def test_training_steps_lower_the_loss(tiny, dtype, scale):
    precision = Precision(GPU, dtype, scale)
    model = tiny.to(GPU).train()
    length = model.decode_head.predictor.num_frames
    optimizer = build_optimizer(model, dict(type='AdamW', lr=1e-3, weight_decay=0.01))
    clip = torch.randn(2, length, 3, 64, 64, device=GPU)
    labels = torch.randint(0, 3, (2, length, 8, 8), device=GPU).repeat_interleave(8, 2).repeat_interleave(8, 3)
    totals = []
    for _ in range(30):
        with precision.autocast():
            loss = torch.stack(list(model(clip, labels, iteration=100).values())).sum()
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        totals.append(loss.item())
    assert all(torch.isfinite(torch.tensor(totals)))
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'initcheck'])
def test_compute_sanitizer(tool):
    """Accesses outside of allocations, races in shared memory and memory nobody wrote, in all kernels of the op."""
    sanitizer = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'
    if not Path(sanitizer).exists():
        pytest.skip('no compute-sanitizer here')
    command = [sanitizer, '--tool', tool, '--kernel-name', 'kns=themask', '--error-exitcode', '9', sys.executable, '-c']
    environment = {**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}
    result = subprocess.run([*command, SANITIZED], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and 'passed' in result.stdout, (result.stdout + result.stderr)[-3000:]


SANITIZED = '''
import torch
from tests.kernels.test_ops import forms, problem, with_gradients
for deterministic in (False, True):
    torch.use_deterministic_algorithms(deterministic)
    for fused in (False, True):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for width in (32, 33):
                arguments = problem(width=width, queries=29, fused=fused)
                arguments = [a.to('cuda', dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
                out, grads = with_gradients(forms(fused)[0], arguments)
                assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
torch.cuda.synchronize()
print('passed')
'''


def test_forms_without_a_native_op_agree(monkeypatch):
    """The PyTorch form on a GPU, which serves where there is no nvcc."""
    monkeypatch.setenv('THEMASK_OPS_BACKEND', 'pytorch')
    for fused, form in ((False, ms_deform_attn_pytorch), (True, ms_deform_attn_fused_pytorch)):
        arguments = problem(fused=fused)
        torch.testing.assert_close(forms(fused)[0](*on_gpu(arguments)).cpu(), form(*arguments), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'float16', 'bfloat16'])
def test_the_tools(tmp_path, precision):
    """Training over nccl, going on from its checkpoint, and a test: the scripts as a user runs them."""
    write_vspw(tmp_path / 'data')
    half = '' if precision == 'float32' else f"fp16 = dict(dtype='{precision}')"
    config = write_tiny_config(tmp_path / 'tiny.py', tmp_path / 'data', extra=half)

    def script(name, *args):
        command = [str(ROOT / 'tools' / name), str(config), *map(str, args)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
        environment = {**os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': path}
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
        return run.stdout + run.stderr

    told = script('dist_train.sh', 1, '--work-dir', 'work', '--no-validate')
    assert torch.cuda.get_device_name() in told
    script('dist_train.sh', 1, '--work-dir', 'work', '--no-validate', '--resume-from', 'auto', '--options',
           'runner.max_iters=6')  # fmt: skip
    assert (tmp_path / 'work' / 'iter_6.pth').exists()
    records = [json.loads(line) for path in (tmp_path / 'work').glob('*.json') for line in path.open()]
    losses = {record['iter']: record['loss'] for record in records if record.get('mode') == 'train'}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and all(value > 0 for value in losses.values())
    assert 'mIoU' in script('dist_test.sh', tmp_path / 'work' / 'latest.pth', 1, '--out', 'results.npz')
    assert (tmp_path / 'results.npz').exists()
