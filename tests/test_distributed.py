"""Two gloo processes: the gradients of one on the whole batch; stops and errors that leave no rank behind."""

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from torch.nn.parallel import DistributedDataParallel

from mmseg.core import NonFiniteLossError, OtherRankError, read_checkpoint
from mmseg.core.hooks import EvalHook, Hook
from mmseg.models import build_segmentor
from mmseg.models.losses import point_sampling
from mmseg.utils import dist as dist_utils
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.errors import CheckpointError, ConfigError, DataError
from tests.engine import Model, batch, make_runner
from tests.processes import free_port, start
from tests.reference import recipe


def in_two_ranks(function, *args, expect=(0, 0)):
    """Runs ``function(rank, *args)`` in two ranks and waits for their exit codes."""
    port = free_port()
    processes = [start(_join, rank, port, function, args) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert tuple(process.exitcode for process in processes) == expect


def _join(rank, port, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist_utils.init_dist('pytorch', 'nccl')  # falls back to gloo
    function(rank, *args)
    dist_utils.close_dist()


def same_points(rows, n, device):
    """Fixed points that do not depend on how many masks share a call."""
    return torch.from_numpy(recipe.points(1, n)).to(device).float().expand(rows, n, 2)


def segmentor(stage, frames):
    cfg = Config.fromfile(f'local_configs/themask/{stage}_themask_mit_b0.py')
    cfg.merge_from_dict({
        'model.pretrained': None,
        'model.backbone.drop_path_rate': 0.0,
        'model.decode_head.loss_cfg.train_num_points': 128,
        'model.decode_head.loss_cfg.warmup_iters': 0,
        'model.decode_head.pixel_decoder_cfg': dict(conv_dim=32, mask_dim=32, transformer_enc_layers=1),
        'model.decode_head.transformer_decoder_cfg': dict(
            hidden_dim=32, mask_dim=32, num_queries=8, nheads=4, dec_layers=2, num_frames=frames)})
    if stage == 'video':
        cfg.model.decode_head.transformer_decoder_cfg.temporal_dropout = 0.0
    torch.manual_seed(5)
    return build_segmentor(cfg.model).train()


def clips(frames):
    """Four clips with different numbers of classes, the last one void."""
    image = torch.stack([torch.from_numpy(recipe.image(40 + i, frames, 3, 64, 64)) for i in range(4)])
    label = torch.full((4, frames, 64, 64), 255)
    for clip, classes in enumerate((2, 5, 1, 0)):
        for index in range(classes):
            label[clip, :, index * 10 : index * 10 + 10] = 7 * index + clip
    return image, label


def gradients(model, clip, label):
    losses = model(clip, label, 3)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    bare = getattr(model, 'module', model)
    return {name: parameter.grad for name, parameter in bare.named_parameters()}


def half_batch(rank, stage, frames, path):
    point_sampling.random_points = same_points
    model = DistributedDataParallel(segmentor(stage, frames))
    clip, label = clips(frames)
    part = slice(2 * rank, 2 * rank + 2)
    found = gradients(model, clip[part], label[part])
    if rank == 0:
        torch.save(found, path)


@pytest.mark.parametrize('stage, frames', [('1f', 1), ('video', 2)])
def test_two_ranks_on_half_batches_give_the_gradients_of_one(tmp_path, monkeypatch, stage, frames):
    in_two_ranks(half_batch, stage, frames, tmp_path / 'gradients.pth')
    monkeypatch.setattr(point_sampling, 'random_points', same_points)
    expected = gradients(segmentor(stage, frames), *clips(frames))
    found = torch.load(tmp_path / 'gradients.pth')
    assert all(gradient is not None for gradient in expected.values()), 'every parameter gets a gradient'
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).max()
    for name, gradient in expected.items():
        # some biases stand before a normalisation, and their gradient is zero but for rounding
        error = (found[name] - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-7 * scale, (name, float(error / scale))


def shares_over_ranks(rank, work_dir):
    """Rank 1 has a void clip only: its empty shares leave those of rank 0 as they are."""
    model = DistributedDataParallel(segmentor('video', 2))
    clip, label = clips(2)
    part = slice(0, 2) if rank == 0 else slice(2, 4)
    label[2] = 255
    numbers = []

    class Numbers(Hook):
        def after_train_iter(self, runner):
            numbers.append(runner.log_buffer)

    runner = make_runner(work_dir, 1, [Numbers()], model=model)
    runner.run(iter([{'img': clip[part], 'gt_semantic_seg': label[part]}]))
    (found,) = numbers
    own = {name: share.tolist() for name, share in model.module.statistics().items()}
    if rank == 0:
        assert own['matched_primary'] == [7, 16] and own['acc_primary'][1] == 7
        assert found['acc_primary'] == own['acc_primary'][0] / 7
        assert found['acc_secondary'] == own['acc_secondary'][0] / 5
    else:
        assert own['matched_primary'] == [0, 16] and own['acc_primary'] == own['acc_secondary'] == [0, 0]
    assert found['matched_primary'] == 7 / 32
    assert found['matched_secondary'] == 5 / 32, 'five targets leave three of eight queries'


def test_matching_is_logged_over_all_ranks(tmp_path):
    in_two_ranks(shares_over_ranks, tmp_path)


def endless(rank):
    position = rank
    while True:
        yield batch(position)
        position += 2


def runner_of(rank, work_dir, hooks=(), model=None, **options):
    return make_runner(work_dir, 8, hooks, model=DistributedDataParallel(model or Model().eval()), **options)


class SignalOneRank(Hook):
    def __init__(self, rank, iteration):
        self.rank = rank
        self.iteration = iteration

    def before_train_iter(self, runner):
        if runner.iter == self.iteration and runner.rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)


def stopped_together(rank, work_dir):
    runner = runner_of(rank, work_dir, [SignalOneRank(1, 3)])
    runner.run(endless(rank))
    assert runner.stopped_by == signal.SIGTERM and runner.iter == 4
    assert dist_utils.gather_objects(runner.iter) == [4, 4]


def test_a_signal_to_one_rank_stops_all_at_the_same_iteration(tmp_path):
    in_two_ranks(stopped_together, tmp_path)
    meta = read_checkpoint(tmp_path / 'iter_4.pth')['meta']
    assert meta['world_size'] == 2 and meta['samples'] == 4 * 8 * 2
    assert len(read_checkpoint(tmp_path / 'iter_4.pth')['rng']) == 2


def bad_file_in_one_rank(rank, work_dir):
    def data():
        for position, item in enumerate(endless(rank)):
            if rank == 1 and position == 2:
                raise DataError('v/3.jpg: truncated')
            yield item

    with pytest.raises(DataError if rank else OtherRankError):
        runner_of(rank, work_dir).run(data())


def evaluation_of_one_rank(rank, work_dir):
    def evaluate(model):
        if rank == 1:
            raise DataError('val/3.jpg: truncated')
        return {'mIoU': 0.5}

    with pytest.raises(DataError if rank else OtherRankError):
        runner_of(rank, work_dir, [EvalHook(evaluate, interval=2)]).run(endless(rank))


class NanOnOneRank(Model):
    def forward(self, clip, label, iteration=0):
        losses = super().forward(clip, label, iteration)
        if iteration == 2 and dist.get_rank() == 1:
            losses['decode.loss_ce'] = losses['decode.loss_ce'] * float('nan')
        return losses


def nan_in_one_rank(rank, work_dir):
    with pytest.raises(NonFiniteLossError, match=r'iteration 3: decode\.loss_ce'):
        runner_of(rank, work_dir, model=NanOnOneRank()).run(endless(rank))


@pytest.mark.parametrize('failing', [bad_file_in_one_rank, evaluation_of_one_rank, nan_in_one_rank])
def test_an_error_that_all_ranks_know_of_ends_all_with_a_checkpoint_of_all(tmp_path, failing):
    in_two_ranks(failing, tmp_path)
    checkpoint = read_checkpoint(tmp_path / 'iter_2.pth')
    assert checkpoint['meta']['iter'] == 2 and len(checkpoint['rng']) == 2
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict'].values())


def resumed_bit_for_bit(rank, work_dir):
    whole = runner_of(rank, work_dir / 'whole', model=Model(), interval=4)
    torch.manual_seed(rank)  # dropout differs between the ranks
    whole.run(endless(rank))
    resumed = runner_of(rank, work_dir / 'resumed', model=Model())
    resumed.resume(read_checkpoint(work_dir / 'whole/iter_4.pth'), 'iter_4.pth')
    data = endless(rank)
    for _ in range(4):
        next(data)
    resumed.run(data)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])


def test_two_ranks_resume_bit_for_bit(tmp_path):
    in_two_ranks(resumed_bit_for_bit, tmp_path)


def fails_on_rank_0(message):
    raise CheckpointError(message)


def words(rank):
    assert dist_utils.get_dist_info() == (rank, 2)
    assert dist_utils.largest(rank + 3) == 4
    assert dist_utils.gather_objects({'rank': rank}) == [{'rank': 0}, {'rank': 1}]
    assert dist_utils.broadcast_object(f'from {rank}') == 'from 0'
    assert dist_utils.on_rank_0(lambda: f'of {rank}') == 'of 0'
    with pytest.raises(CheckpointError, match='of 0'):
        dist_utils.on_rank_0(fails_on_rank_0, f'of {rank}')
    mean = dist_utils.reduce_mean(torch.tensor([float(rank), 4.0]))
    assert mean.tolist() == [0.5, 4.0]
    dist_utils.barrier()


def test_words_among_ranks():
    in_two_ranks(words)
    assert dist_utils.get_dist_info() == (0, 1) and dist_utils.is_main_process()
    assert dist_utils.largest(7) == 7 and dist_utils.gather_objects(1) == [1] and dist_utils.broadcast_object(2) == 2


def gone(rank):
    dist_utils.gather_objects(rank)  # both have joined
    if rank:
        os._exit(0)
    with pytest.raises(OtherRankError):
        for _ in range(1000):
            dist_utils.gather_objects(rank)


def test_a_rank_that_is_gone_is_no_traceback_in_the_others():
    in_two_ranks(gone)


def test_wrong_launches_are_errors(monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    expected = {'pytorch': 'RANK is missing', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI', 'pbs': 'pbs'}
    for launcher, message in expected.items():
        with pytest.raises(ConfigError, match=message):
            dist_utils.init_dist(launcher)
    with pytest.raises(ConfigError, match=r'dist_params.backend.*smoke'):
        dist_utils.init_dist('none', 'smoke')


_TORCHRUN = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1')
_SRUN = dict(SLURM_PROCID='1', SLURM_NTASKS='2', SLURM_LOCALID='0', SLURM_STEP_ID='0', SLURM_NODELIST='n[3-4]')
_MPIRUN = dict(OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_LOCAL_RANK='1')


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and only these."""
    words = 'RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|SLURM_.*|OMPI_.*|LOCAL_WORLD_SIZE'
    for name in list(os.environ):
        if re.fullmatch(words, name):
            monkeypatch.delenv(name)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):  # are taken away afterwards
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)

    def start(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize('variables, given, found', [
    ({}, 'none', 'none'),
    (_TORCHRUN, 'none', 'pytorch'),
    (_SRUN, 'none', 'slurm'),
    (_MPIRUN, 'none', 'mpi'),
    (_SRUN | _TORCHRUN, 'none', 'pytorch'),
    (_TORCHRUN, 'slurm', 'slurm'),
    (_TORCHRUN | dict(WORLD_SIZE='1', RANK='0'), 'none', 'none'),
    (dict(WORLD_SIZE='4', RANK='3'), 'none', 'none'),  # of a cluster, which counts machines
    ({k: v for k, v in _SRUN.items() if k != 'SLURM_STEP_ID'}, 'none', 'none'),  # sbatch without srun
    (_SRUN | dict(SLURM_STEP_NUM_TASKS='1'), 'none', 'none'),  # srun --pty bash in a larger job
])
def test_the_launcher_is_noticed(launched, variables, given, found):
    launched(variables)
    assert dist_utils.detect_launcher(given) == found


@pytest.mark.parametrize('launcher, variables, said', [
    ('pytorch', _TORCHRUN | dict(WORLD_SIZE='0'), "WORLD_SIZE: expected a whole number, at least 1, got '0'"),
    ('none', _TORCHRUN | dict(WORLD_SIZE='many'), "WORLD_SIZE: expected a whole number, at least 1, got 'many'"),
    ('none', _TORCHRUN | dict(RANK='2'), "RANK: expected a whole number, from 0 to 1, got '2'"),
    ('none', _TORCHRUN | dict(RANK='-1'), "RANK: expected a whole number, from 0 to 1, got '-1'"),
    ('none', _TORCHRUN | dict(LOCAL_RANK='x'), "LOCAL_RANK: expected a whole number, at least 0, got 'x'"),
    ('none', _TORCHRUN | dict(MASTER_PORT='99999'), "MASTER_PORT: expected a whole number, from 1 to 65535"),
    ('slurm', _SRUN | dict(SLURM_NODELIST='n[a{]'), 'set MASTER_ADDR'),
    ('slurm', _SRUN | dict(SLURM_NODELIST=''), 'set MASTER_ADDR'),
])
def test_wrong_variables_of_a_launcher_are_named(launched, launcher, variables, said):
    launched(variables)
    with pytest.raises(ConfigError, match=re.escape(said)):
        dist_utils.init_dist(launcher)


@pytest.mark.parametrize('hosts, first', [
    ('gpu7', 'gpu7'), ('a-1.net,b', 'a-1.net'), ('gpu[03-07,11],login1', 'gpu03'), ('n[1,5-6]-ib', 'n1-ib'),
    ('rack[2-3]n[01-08]', 'rack2n01')])
def test_the_first_host_of_slurm_needs_no_other_program(launched, monkeypatch, hosts, first):
    launched(_SRUN | dict(SLURM_NODELIST=hosts))
    joined = []
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **_: joined.append(args))
    dist_utils.init_dist('none', port=1234)
    assert joined == [('gloo',)]
    assert {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')} == {
        'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': first, 'MASTER_PORT': '1234'}


def test_the_port_of_the_launcher_goes_before_that_of_the_config(launched, monkeypatch):
    launched(_TORCHRUN | dict(MASTER_PORT='777'))
    monkeypatch.setattr(dist, 'init_process_group', lambda *_, **__: None)
    dist_utils.init_dist('pytorch', port=1234)
    assert os.environ['MASTER_PORT'] == '777'


def test_a_tool_for_one_process_refuses_to_be_one_of_several(launched, capsys, monkeypatch):
    monkeypatch.setattr(dist_utils, 'PATIENCE', 0)
    launched(_TORCHRUN | dict(RANK='0', LOCAL_RANK='0'))
    assert run_tool(lambda: 0) == 1
    assert 'this tool runs in one process, but pytorch has started several' in capsys.readouterr().err
    assert run_tool(lambda: 5, parallel=True) == 5
    launched(dict(LOCAL_RANK='x', WORLD_SIZE='x'))
    assert run_tool(lambda: 0, parallel=True) == 1
    assert "WORLD_SIZE: expected a whole number, at least 1, got 'x'" in capsys.readouterr().err


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    for name in ('LOCAL_WORLD_SIZE', 'SLURM_GPUS_PER_TASK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('SLURM_NTASKS_PER_NODE', '8')  # of an allocation in which torchrun is started
    assert [dist_utils._gpu_index('pytorch', rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match='8 processes were started on a machine with 4 GPUs; start 4 at most'):
        dist_utils._gpu_index('slurm', 1, 4)
    with pytest.raises(ConfigError, match='5 processes'):
        dist_utils._gpu_index('pytorch', 4, 4)
    monkeypatch.setenv('SLURM_GPUS_PER_TASK', '1')
    assert dist_utils._gpu_index('slurm', 5, 1) == 0


@pytest.mark.parametrize('local_rank, error, waits, said', [
    (0, DataError('bad'), 0, 'error: bad\n'),
    (1, DataError('bad'), 1, 'error: bad\n'),
    (0, OtherRankError('another'), 2, ''),
])
def test_an_error_of_all_ranks_is_said_by_the_first_and_that_of_one_by_itself(
        monkeypatch, capsys, local_rank, error, waits, said):
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    dist_utils.report_error(error)
    assert sum(slept) == waits * dist_utils.PATIENCE
    assert capsys.readouterr().err == said


@pytest.mark.parametrize('variable, rank, waits', [
    ('LOCAL_RANK', 0, 0), ('LOCAL_RANK', 1, 2), ('SLURM_LOCALID', 3, 2), ('OMPI_COMM_WORLD_LOCAL_RANK', 2, 2)])
def test_a_usage_error_is_said_by_the_first_and_ends_all(monkeypatch, capsys, variable, rank, waits):
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    monkeypatch.setenv(variable, str(rank))
    parser = ArgumentParser('tool')
    parser.add_argument('--seed', type=int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(['--seed', 'one'])
    assert end.value.code == 2 and sum(slept) == waits * dist_utils.PATIENCE
    said = "usage: tool [-h] [--seed SEED]\ntool: error: argument --seed: invalid int value: 'one'\n"
    assert capsys.readouterr().err == ('' if rank else said)


def groups_and_models(rank, ports):
    for port in ports:
        os.environ['MASTER_PORT'] = str(port)
        dist_utils.close_dist()
        dist_utils.init_dist('pytorch')
        model = DistributedDataParallel(Model(), gradient_as_bucket_view=True)
        for position in range(2):
            item = batch(position)
            losses = model(item['img'], item['gt_semantic_seg'])
            losses['decode.loss_ce'].backward()
        dist_utils.close_dist()
        del model  # after its group was closed


@pytest.mark.parametrize('rounds', [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_model_may_be_dropped_after_its_group_was_closed(rounds):
    in_two_ranks(groups_and_models, [free_port() for _ in range(rounds)])


class FailsOn(Hook):
    """An error of one rank alone, between two iterations."""

    def __init__(self, rank):
        self.rank = rank

    def before_train_iter(self, runner):
        if runner.iter == 2 and runner.rank == self.rank:
            raise ZeroDivisionError('of one rank')


def error_of_one_rank(rank, failing, work_dir):
    runner = make_runner(work_dir, 5, [FailsOn(failing)], model=DistributedDataParallel(Model()))
    with pytest.raises(ZeroDivisionError if rank == failing else OtherRankError):
        runner.run(iter([batch(2 * i + rank) for i in range(5)]))
    if rank == 0:
        checkpoint = read_checkpoint(work_dir / 'iter_2.pth')
        assert checkpoint['meta']['samples'] == 32 and len(checkpoint['rng']) == 1
    os._exit(0)  # without the farewell to a rank that is gone


@pytest.mark.parametrize('failing', [0, 1])
def test_an_error_of_one_rank_saves_and_ends_all(tmp_path, failing):
    in_two_ranks(error_of_one_rank, failing, tmp_path)


def test_one_of_several_without_a_local_rank_is_refused(launched, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match='LOCAL_RANK is missing'):
        dist_utils.init_dist('none')
