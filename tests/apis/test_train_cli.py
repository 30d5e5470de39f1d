"""The training command as a user runs it: real processes with one and two ranks, errors, signals."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmseg.apis.train import train_segmentor
from mmseg.config import load_config
from mmseg.core import open_checkpoint, read_checkpoint
from tests.tiny_config import write_tiny_config
from tests.vspw_fixture import write_vspw

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('train_tool', ROOT / 'tools/train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    return write_vspw(tmp_path_factory.mktemp('data') / 'vspw')


@pytest.fixture(scope='module')
def one_frame(tmp_path_factory, data_root):
    """A work dir that the one-frame model was trained in, with evaluation, by one process."""
    root = tmp_path_factory.mktemp('one_frame')
    extra = "evaluation = dict(interval=3, save_best='mIoU')\nfp16 = dict(dtype='bfloat16')"
    config = write_tiny_config(root / 'tiny_1f.py', data_root, iters=3, workers=2, extra=extra)
    run = script('dist_train.sh', config, 1, '--work-dir', 'work', cwd=root)
    assert run.returncode == 0, run.stderr
    return root / 'work', run.stdout


def script(name, *args, cwd):
    command = [str(ROOT / 'tools' / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=cwd, timeout=280)


def log_lines(work_dir):
    return [json.loads(line) for path in sorted(work_dir.glob('*.log.json')) for line in path.read_text().splitlines()]


def test_one_rank_trains_evaluates_and_says_where_the_checkpoint_is(one_frame):
    work_dir, stdout = one_frame
    names = sorted(path.name for path in work_dir.iterdir())
    assert [name for name in names if name.endswith('.pth')] == [
        'best_mIoU_iter_3.pth', 'iter_2.pth', 'iter_3.pth', 'latest.pth']
    assert 'checkpoint: work/iter_3.pth' in stdout
    assert 'max_iters=3' in stdout, 'the final config is printed'
    lines = log_lines(work_dir)
    assert [line['iter'] for line in lines if line.get('mode') == 'train'] == [1, 2, 3]
    warm_up, _, third = (line for line in lines if line.get('mode') == 'train')
    assert warm_up['matched_primary'] > 0 == warm_up['matched_secondary'] and 'acc_secondary' not in warm_up
    assert third['matched_secondary'] > 0 and 0 <= third['acc_secondary'] <= 1
    assert {'mIoU', 'VC8'} <= next(line for line in lines if line.get('mode') == 'val').keys()
    meta = read_checkpoint(work_dir / 'iter_3.pth')['meta']
    assert meta['seed'] == 0 and len(meta['CLASSES']) == 124 and 'max_iters=3' in meta['config']


def test_the_dumped_config_can_be_loaded_again(one_frame):
    work_dir, _ = one_frame
    dumped = load_config(work_dir / 'tiny_1f.py')
    assert dumped.runner.max_iters == 3 and dumped.work_dir == 'work' and dumped.evaluation.save_best == 'mIoU'
    original = load_config(work_dir.parent / 'tiny_1f.py')
    for key in original:
        assert dumped[key] == original[key], key


def test_two_ranks_train_on_clips_and_test_word_for_word(tmp_path, one_frame, data_root):
    config = write_tiny_config(tmp_path / 'tiny_video.py', data_root, base='video_themask_mit_b0', workers=2)
    run = script(
        'dist_train.sh', config, 2, '--work-dir', 'DIR2', '--options',
        'model.decode_head.transformer_decoder_cfg.num_frames=2', 'data.train.dataset.dilation=[-3]',
        'runner.max_iters=2', 'checkpoint_config.interval=500', '--finetune-from', one_frame[0], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'fine-tuning from' in run.stdout and 'frozen: 213 (backbone.* 176' in run.stdout
    assert run.stdout.count('Iter [2/2]') == 1, 'only rank 0 prints'
    path, checkpoint = open_checkpoint(tmp_path / 'DIR2')
    assert path.name == 'iter_2.pth' and checkpoint['meta']['samples'] == 8
    before = read_checkpoint(one_frame[0] / 'iter_3.pth')['state_dict']
    after = checkpoint['state_dict']
    assert all(torch.equal(after[name], value) for name, value in before.items() if 'predictor' not in name)
    moved = [name for name, value in before.items() if name in after and not torch.equal(after[name], value)]
    assert moved and all('predictor' in name for name in moved)

    run = script('dist_test.sh', config, path, 2, '--options', 'data.test.test_size=4', cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'mIoU' in run.stdout


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_sets_the_exit_status(tmp_path, data_root, number, status):
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, iters=500, interval=500, crop=32, workers=1)
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir', 'w', '--no-validate']
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and not any('iter' in line for line in log_lines(tmp_path / 'w')):
            time.sleep(0.05)
        os.killpg(process.pid, number)  # the whole group, as a terminal and a batch system do: loader workers too
        assert process.wait(60) == status
    finally:
        process.kill()
    assert open_checkpoint(tmp_path / 'w')[1]['meta']['iter'] >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_finished_trainings_of_two_processes_end(tmp_path, data_root):
    """Beside two busy loops; ``THEMASK_ENDINGS`` sets how many, in a row."""
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, iters=2, extra='evaluation = dict(interval=2)')
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2)]
    try:
        for number in range(int(os.environ.get('THEMASK_ENDINGS', '20'))):
            process = subprocess.Popen(
                [str(ROOT / 'tools/dist_train.sh'), str(config), '2', '--work-dir', str(tmp_path / 'work')], env=ENV,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            last = ''
            for last in process.stdout:
                if ' - checkpoint: ' in last:
                    break
            assert ' - checkpoint: ' in last, f'run {number}: {last}'
            process.communicate(timeout=20)
            assert process.returncode == 0, f'run {number}'
    finally:
        for process in busy:
            process.kill()


@pytest.mark.slow
def test_under_nohup_the_launcher_and_its_processes_ignore_a_hangup(tmp_path, data_root):
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, iters=300)
    process = subprocess.Popen(
        ['sh', '-c', f"trap '' HUP; exec {ROOT}/tools/dist_train.sh {config} 2 --work-dir {tmp_path}/work"], env=ENV,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if 'Iter [2/' in line:
            process.send_signal(signal.SIGHUP)
        if 'Iter [8/' in line:  # has gone on
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_the_exit_status_is_passed_on_and_the_error_is_clear(tmp_path, data_root):
    config = write_tiny_config(tmp_path / 'tiny.py', data_root)
    run = script('dist_train.sh', config, 1, '--options', 'runner.max_iter=5', cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == (
        "error: runner.max_iter: runner takes no argument 'max_iter' (did you mean 'max_iters'?)\n")
    for tool, words in (('train', ()), ('test', ('x.pth',))):
        run = script(f'dist_{tool}.sh', config, *words, 2, '--options', 'runner.max_iters', cwd=tmp_path)
        assert run.returncode == 2
        assert run.stderr.count('usage: ') == run.stderr.count(' error: ') == 1, run.stderr
        assert "expected KEY=VALUE, got 'runner.max_iters'" in run.stderr
    for args in ((), (config,), (config, 'two'), (config, '0')):
        run = script('dist_train.sh', *args, cwd=tmp_path)
        assert run.returncode == 2 and ('usage' in run.stderr or 'expected the number' in run.stderr)


def stand_in(path, text):
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def recorded(name, *args, cwd, **environment):
    """Runs a script with a Python that prints its command line and ends with status 7."""
    python = stand_in(
        cwd / 'python', f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\necho "$@" "$OMP_NUM_THREADS"; exit 7')
    env = {key: value for key, value in ENV.items() if key != 'OMP_NUM_THREADS'}
    return subprocess.run(
        [str(ROOT / 'tools' / name), *args], capture_output=True, text=True, cwd=cwd,
        env={**env, 'PYTHON': str(python), **environment})


def test_launchers_honour_their_environment_and_pass_the_exit_status_on(tmp_path):
    run = recorded(
        'dist_train.sh', 'c.py', '4', '--seed', '1', cwd=tmp_path, NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1')
    assert run.returncode == 7
    assert '--nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 --nproc_per_node=4' in run.stdout
    assert f'{ROOT}/tools/train.py c.py --seed 1 --launcher pytorch' in run.stdout
    run = recorded('dist_test.sh', 'c.py', 'a b.pth', '1', cwd=tmp_path, PORT='1234')
    assert '--master_port=1234 --nproc_per_node=1' in run.stdout
    assert f'{ROOT}/tools/test.py c.py a b.pth --launcher pytorch' in run.stdout
    assert run.stdout.split()[-1] == str(len(os.sched_getaffinity(0))), 'one process has all cores'
    assert recorded('dist_train.sh', 'c.py', '99', cwd=tmp_path).stdout.split()[-1] == '1'
    first, second = (recorded('dist_train.sh', 'c.py', '1', cwd=tmp_path).stdout for _ in range(2))
    assert first != second, 'each run finds a free port'


@pytest.mark.parametrize('environment, said', [
    (dict(NNODES='2'), 'NNODES=2 needs MASTER_ADDR'),
    (dict(NNODES='2', MASTER_ADDR='10.0.0.1'), 'NODE_RANK (which this one is'),
    (dict(NNODES='2', MASTER_ADDR='10.0.0.1', NODE_RANK='2'), 'NODE_RANK: expected a whole number from 0 to 1'),
    (dict(NNODES='0'), 'NNODES: expected a whole number from 1'),
    (dict(NNODES='two'), "got 'two'"),
    (dict(NNODES='08'), "got '08'"),
    (dict(PORT='http'), "PORT: expected a whole number from 1 to 65535, got 'http'"),
    (dict(PORT='70000'), "got '70000'"),
])
def test_wrong_environments_of_the_launchers_are_named(tmp_path, environment, said):
    run = recorded('dist_train.sh', 'c.py', '1', cwd=tmp_path, **environment)
    assert run.returncode == 2 and run.stderr.startswith('error: ') and said in run.stderr


@pytest.mark.slow
def test_no_launcher_starts_inside_of_another():
    command = [sys.executable, str(ROOT / 'tools/_launch.py'), '--standalone', '--nproc_per_node=2', 'x.py']
    run = subprocess.run(command, capture_output=True, text=True, env={**ENV, 'TORCHELASTIC_RUN_ID': 'none'})
    assert run.returncode == 1 and 'torchrun has started already' in run.stderr and run.stderr.count('\n') == 1


def test_the_launcher_ends_as_its_processes_do_without_a_traceback(tmp_path):
    tool = tmp_path / 'tool.py'
    tool.write_text(textwrap.dedent('''\
        import os, pathlib, signal, sys, time
        rank, case = os.environ['RANK'], sys.argv[1]
        if case == 'signal':
            signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))
            pathlib.Path(f'ready{rank}').touch()
        elif rank == '1':
            sys.exit(7) if case == 'exit' else os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    '''))
    command = [sys.executable, str(ROOT / 'tools/_launch.py'), '--standalone', '--nproc_per_node=2', str(tool)]
    runs = {
        case: subprocess.Popen([*command, case], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True)
        for case in ('exit', 'kill', 'signal')
    }
    while runs['signal'].poll() is None and len(list(tmp_path.glob('ready*'))) < 2:
        time.sleep(0.05)
    runs['signal'].terminate()
    said = {case: run.communicate(timeout=100)[1] for case, run in runs.items()}
    assert {case: run.returncode for case, run in runs.items()} == {'exit': 7, 'kill': 137, 'signal': 143}
    assert said['exit'] == '' and said['kill'] == 'error: rank 1 was killed by SIGKILL (out of memory?)\n'
    assert said['signal'].replace('\n', '') == 'savedsaved'


@pytest.mark.parametrize('name, args', [('train', ['c.py', '--seed', '1']), ('test', ['c.py', 'x.pth'])])
def test_slurm_scripts_start_the_tools_under_srun(tmp_path, name, args):
    stand_in(tmp_path / 'srun', 'echo "$@"; exit 7')
    path = f'{tmp_path}:{ENV["PATH"]}'
    run = recorded(f'slurm_{name}.sh', 'gpu', 'job', *args, cwd=tmp_path, PATH=path, GPUS='16', SRUN_ARGS='-t 9')
    assert run.returncode == 7
    for words in ('-p gpu --job-name=job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8', '-t 9',
                  f'{ROOT}/tools/{name}.py {" ".join(args)} --launcher slurm'):
        assert words in run.stdout
    assert recorded(f'slurm_{name}.sh', 'gpu', cwd=tmp_path, PATH=path).returncode == 2


def run_tool(tool, monkeypatch, capsys, *args):
    """Runs the command in this process; returns its exit status and the error it printed."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, args)])
    status = tool.main()
    return status, capsys.readouterr().err


def test_a_missing_formatter_is_not_blamed_on_the_config(tmp_path, data_root, tool, monkeypatch, capsys):
    config = write_tiny_config(tmp_path / 'tiny.py', data_root)
    monkeypatch.setitem(sys.modules, 'yapf', None)
    with pytest.raises(ImportError, match='yapf'):
        run_tool(tool, monkeypatch, capsys, config, '--work-dir', tmp_path / 'w')


@pytest.mark.parametrize('args, extra, message', [
    (['--options', 'lr_config.policy=polly'], '', "got 'polly' (str) (did you mean 'poly'?)"),
    (['--options', 'optimizer.type=AdamV'], '', "optimizer.type: unknown optimizer 'AdamV'"),
    (['--options', 'model.pretrained=gone.pth'], '', "'gone.pth' does not exist"),
    (['--options', 'evaluation.interval=1', 'evaluation.metric=mIuO'], '', 'mIoU'),
    (['--load-from', 'gone'], '', "checkpoint 'gone' does not exist"),
    (['--resume-from', '.'], '', 'no complete checkpoint'),
    (['--launcher', 'pytorch', '--gpus', '2'], '', '--gpus and --gpu-ids'),
    (['--gpus', '0'], '', '--gpus: expected at least 1'),
    ([], "workflow = [('train', 1), ('val', 1)]", "workflow: the config supports only [('train', 1)]"),
    ([], "runner = dict(type='EpochBasedRunner')", "only 'IterBasedRunner'"),
    ([], 'checkpoint_config = dict(by_epoch=True)', 'checkpoint_config.by_epoch'),
    ([], "custom_hooks = [dict(type='EMAHok')]", "unknown hook 'EMAHok' (did you mean 'EMAHook'?)"),
    ([], "custom_hooks = [dict(type='EMAHook', priority='SOON')]", "custom_hooks[0].priority: unknown priority 'SOON'"),
    ([], "fp16 = dict(dtype='float8')", 'fp16.dtype'),
    ([], "optimizer_config = dict(type='Fp16Hook')", "got 'Fp16Hook' (str) (did you mean 'Fp16OptimizerHook'?)"),
    ([], "checkpoint_config = dict(type='BestHook')", 'checkpoint_config.type'),
    ([], 'import numpy\nown = numpy.arange(3)', 'own: the final config cannot be written down with array([0, 1, 2])'),
    (['--seed', '-1'], '', 'seed: expected int, at least 0, at most 2147483647'),
    (['--options', 'optimizer.lr=fast'], '', "optimizer.lr: expected float, at least 0, got 'fast'"),
    (['--options', 'optimizer.lr=-1'], '', 'optimizer.lr: expected float, at least 0, got -1'),
    (['--options', 'data.samples_per_gpu=0'], '', 'data.samples_per_gpu: expected int, at least 1, got 0'),
    (['--options', 'model.decode_head.num_classes=5'], '', 'num_classes is 5, but the data set of data.train has 124'),
    (['--options', 'log_level=LOUD'], '', "log_level: expected 'DEBUG' or 'INFO' or"),
    (['--options', 'evaluation.interval=1', 'data.val=None'], '', 'data.val: missing'),
    (['--options', 'evaluation.interval=4', 'evaluation.save_best=mIou'], '', "'mIou' (did you mean 'mIoU'?)"),
    (['--options', 'checkpoint_config.out_dir=elsewhere'], '', 'checkpoint_config.out_dir: '),
    ([], "nan_loss = 'ignore'", 'nan_loss'),
])
def test_wrong_settings_are_one_clear_error(tmp_path, data_root, tool, monkeypatch, capsys, args, extra, message):
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, extra=extra)
    status, error = run_tool(tool, monkeypatch, capsys, config, '--work-dir', 'w', *args)
    assert status == 1
    assert error.startswith('error: ') and message in error and 'Traceback' not in error


@pytest.mark.parametrize('slip', [
    'model.decode_head.loss_cfg.warmup_iter', 'model.decode_head.loss_cfg.matcher_cfg.dice_wieght',
    'model.test_cfg.strides', 'optimizer.weight_decays', 'optimizer.paramwise_cfg.custom_key'])
def test_a_slip_is_named_before_checkpoint_data_and_work_dir_are_touched(tmp_path, tool, monkeypatch, capsys, slip):
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(tmp_path / 'tiny.py', tmp_path / 'no_data')
    status, error = run_tool(
        tool, monkeypatch, capsys, config, '--work-dir', 'w', '--resume-from', 'gone', '--options', f'{slip}=1')
    assert status == 1 and error.startswith(f'error: {slip}: '), error
    assert not (tmp_path / 'w').exists()


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, data_root, tool, monkeypatch, capsys, one_frame):
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(tmp_path / 'tiny.py', data_root)
    expected = {
        '--load-from': 'another model', '--finetune-from': 'another backbone', '--resume-from': 'another model'}
    for option, words in expected.items():
        status, error = run_tool(
            tool, monkeypatch, capsys, config, '--work-dir', 'w', option, one_frame[0], '--options',
            'model.backbone.type=mit_b1')
        assert status == 1 and words in error, error


def test_a_model_of_other_classes_starts_from_named_parts(tmp_path, data_root, tool, monkeypatch, capsys, one_frame):
    """Weights must fit, but for the parts that ``load_from_fresh`` names."""
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, iters=2, extra=(
        "for each in (data['train']['dataset'], data['val'], data['test']):\n    each['classes'] = ['wall', 'ceiling', "
        "'door']\n    each['other'] = 'rest'\nmodel['decode_head']['num_classes'] = 4"))
    command = (config, '--no-validate', '--load-from', one_frame[0], '--work-dir')
    status, error = run_tool(tool, monkeypatch, capsys, *command, 'w')
    assert status == 1 and 'tensors do not fit: ' in error and 'class_embed.weight (125, ' in error
    status, error = run_tool(tool, monkeypatch, capsys, *command, 'v', '--options', 'load_from_fresh=[class_embed]')
    assert status == 0, error
    (log,) = (tmp_path / 'v').glob('*.log')
    text = log.read_text()
    assert re.search(r'kept fresh, as asked: 2 \(.*class_embed', text) and 'their start values: 0\n' in text


def test_bad_data_names_the_file_and_keeps_the_state(tmp_path, tool, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_vspw(tmp_path / 'vspw', {'train': {'a': 3}})
    bad = next(iter((root / 'data/a/origin').glob('*.jpg')))
    bad.write_bytes(bad.read_bytes()[:200])
    config = write_tiny_config(tmp_path / 'tiny.py', root, iters=30, crop=32)
    status, error = run_tool(tool, monkeypatch, capsys, config, '--work-dir', 'w', '--no-validate')
    assert status == 1 and bad.name in error and 'Traceback' not in error


@pytest.mark.parametrize('words, kept', [
    (['c.py', '--gpus', '2', '--seed', '1'], ['c.py', '--seed', '1']),
    (['c.py', '--gpu-ids', '0', '3', '--options', 'a=1'], ['c.py', '--options', 'a=1']),
    (['c.py', '--gpus=2', '--work-dir', '7'], ['c.py', '--work-dir', '7']),
])
def test_gpus_start_that_many_processes(tool, monkeypatch, words, kept):
    calls = []
    monkeypatch.setattr(os, 'execv', lambda program, command: calls.append(command))
    monkeypatch.setattr(sys, 'argv', ['train.py', *words])
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    tool.start_processes(tool.parse_args())
    (command,) = calls
    assert '--nproc_per_node=2' in command
    assert command[command.index(str(ROOT / 'tools/train.py')) + 1 :] == [*kept, '--launcher', 'pytorch']
    if '--gpu-ids' in words:
        assert os.environ['CUDA_VISIBLE_DEVICES'] == '0,3'


def test_a_config_of_the_reference_trains_unmodified(tmp_path, data_root, reference, monkeypatch):
    values = reference('config_values.json')['video_themask_mit_b1']
    path = tmp_path / 'reference.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in values.items()))
    steps = 'data.train.dataset.pipeline'
    cfg = load_config(path, {
        'model.pretrained': None, 'data.train.dataset.data_root': str(data_root), f'{steps}.2.img_scale': (107, 60),
        f'{steps}.3.crop_size': (64, 64), f'{steps}.7.size': (64, 64), 'data.workers_per_gpu': 0,
        'data.samples_per_gpu': 1, 'runner.max_iters': 1, 'model.decode_head.loss_cfg.train_num_points': 64,
        'checkpoint_config.type': 'CheckpointHook', 'checkpoint_config.sync_buffer': False})
    cfg.work_dir = str(tmp_path / 'w')
    assert isinstance(cfg, Config) and cfg.find_unused_parameters
    runner = train_segmentor(cfg)
    assert runner.iter == 1 and (tmp_path / 'w/iter_1.pth').exists()
    before = {name: value.clone() for name, value in runner.module.state_dict().items()}
    cfg.resume_from = 'auto'
    resumed = train_segmentor(cfg)
    assert all(torch.equal(value, before[name]) for name, value in resumed.module.state_dict().items())


def test_a_new_run_beside_old_checkpoints_is_warned_of_and_seeds_are_kept(tmp_path, data_root, caplog):
    config = write_tiny_config(tmp_path / 'tiny.py', data_root, iters=1, crop=32, extra='seed = None')
    cfg = load_config(config)
    cfg.work_dir = str(tmp_path / 'w')
    train_segmentor(cfg, validate=False)
    seed = read_checkpoint(tmp_path / 'w/iter_1.pth')['meta']['seed']
    logs = []
    monkey = pytest.MonkeyPatch()
    from mmseg.utils.logger import get_logger

    monkey.setattr(get_logger(), 'warning', lambda text, *args: logs.append(text % args))
    try:
        cfg.runner.max_iters = 2
        cfg.resume_from = 'auto'
        train_segmentor(cfg, validate=False)
        assert read_checkpoint(tmp_path / 'w/iter_2.pth')['meta']['seed'] == seed
        assert not logs
        cfg.resume_from = None
        train_segmentor(cfg, validate=False)
        assert any('checkpoints of an earlier run (iter_2.pth)' in line for line in logs)
    finally:
        monkey.undo()
