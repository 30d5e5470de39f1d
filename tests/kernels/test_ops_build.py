"""Building and choosing the native op: cache, concurrent starts, missing compilers, variables, sanitizers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mmseg.kernels import library
from mmseg.kernels.library import BackendError, BuildError
from mmseg.models.decode_heads.mask2former.pixel_decoder.ops import ms_deform_attn_fused
from tests.conftest import need_native
from tests.kernels.test_ops import problem

OPS = 'mmseg.models.decode_heads.mask2former.pixel_decoder.ops'
ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: libraries load and warnings appear once in a process."""
    return subprocess.run(
        [sys.executable, '-W', 'always', '-c', code],
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A compiler that notes its calls and writes empty files; `fail` makes it fail."""
    log = tmp_path / 'calls'
    script = tmp_path / 'fake++'
    script.write_text(
        '#!/bin/sh\n'
        'if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n'
        f'echo call >> {log}\n'
        f'if [ -e {tmp_path}/fail ]; then echo "no such header" >&2; exit 1; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv('CXX', str(script))
    monkeypatch.setenv('THEMASK_OPS_CACHE', str(tmp_path / 'cache'))
    return tmp_path


def calls(folder: Path) -> int:
    log = folder / 'calls'
    return len(log.read_text().split()) if log.exists() else 0


def test_a_library_is_built_once(fake_compiler):
    first = library.library('cpu')
    built = calls(fake_compiler)
    assert first.parent == fake_compiler / 'cache'
    assert built == len(library.cpu_units()) + 1
    assert library.library('cpu') == first
    assert calls(fake_compiler) == built


@pytest.mark.slow
def test_a_compiler_with_a_static_runtime_gives_no_second_one(tmp_path, monkeypatch):
    """Two C++ runtimes in a process: the error of a wrong call ended in a crash (seen with one such compiler)."""
    compiler = library.find_compiler('cpu')
    if compiler is None or 'g++' not in Path(compiler[0]).name or not shutil.which('nm'):
        pytest.skip('needs g++ and nm')
    script = tmp_path / 'g++'
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -static-libstdc++\n')
    script.chmod(0o755)
    code = (
        'import torch; from mmseg.kernels import library; from tests.kernels.test_ops import problem\n'
        "print(library.native('cpu')._name)\n"
        'value, _, *others = problem()\n'
        'try: torch.ops.themask.ms_deform_attn(value[0], [3, 4, 2, 2], *others)\n'
        'except RuntimeError as error: print(error)\n'
    )
    result = run(code, CXX=str(script), THEMASK_OPS_CACHE=str(tmp_path / 'cache'))
    path, *error = result.stdout.splitlines()
    assert 'value is not [N, S, M, D]' in '\n'.join(error), result.stderr
    defined = subprocess.run(['nm', '-D', '--defined-only', path], capture_output=True, text=True, check=True).stdout
    assert 'themask_instruction_set' in defined and '__cxa' not in defined and '__gxx' not in defined


def test_another_torch_compiler_flag_or_source_means_another_library(fake_compiler, monkeypatch, tmp_path):
    names = {library.library('cpu').name}
    with monkeypatch.context() as patch:
        patch.setattr(torch, '__version__', '9.9.9')
        names.add(library.library('cpu').name)
    with monkeypatch.context() as patch:
        patch.setitem(library.KERNELS, 'attention', ('-g',))
        names.add(library.library('cpu').name)
    with monkeypatch.context() as patch:
        sources = tmp_path / 'src'
        sources.mkdir()
        for path in library.SOURCES.iterdir():
            (sources / path.name).write_bytes(path.read_bytes() + b'\n')
        patch.setattr(library, 'SOURCES', sources)
        names.add(library.library('cpu').name)
    script = fake_compiler / 'fake++'
    script.write_text(script.read_text().replace('fake 1.0', 'fake 2.0'))
    names.add(library.library('cpu').name)
    assert len(names) == 5


def test_a_shared_cache_tells_processors_apart(monkeypatch):
    """Compilers of the same name and version make different code on them of the same source and flags."""
    name = library.file_name('cpu', [], 'compiler')
    monkeypatch.setattr(library.platform, 'machine', lambda: 'another')
    assert library.file_name('cpu', [], 'compiler') != name


def test_a_failed_build_says_why_and_is_tried_again(fake_compiler):
    (fake_compiler / 'fail').touch()
    with pytest.raises(BuildError, match='no such header'):
        library.library('cpu')
    (fake_compiler / 'fail').unlink()
    assert library.library('cpu').exists()


def test_building_can_be_forbidden(fake_compiler):
    with pytest.raises(BuildError, match=r'make\.sh'):
        library.library('cpu', allow_build=False)
    assert calls(fake_compiler) == 0


def test_a_cache_that_cannot_be_written_is_named(fake_compiler, monkeypatch):
    (fake_compiler / 'file').touch()
    monkeypatch.setenv('THEMASK_OPS_CACHE', str(fake_compiler / 'file' / 'cache'))
    with pytest.raises(BuildError, match='THEMASK_OPS_CACHE'):
        library.library('cpu')


def test_without_a_compiler_a_library_built_elsewhere_is_used(fake_compiler, monkeypatch):
    built = library.library('cpu')
    monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    assert library.library('cpu') == built
    built.unlink()
    with pytest.raises(BuildError, match='CXX'):
        library.library('cpu')


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b'x'),
    lambda path: path.with_suffix('.sha256').unlink(),
    lambda path: path.with_suffix('.sha256').write_bytes(b''),
], ids=['truncated', 'altered', 'no checksum', 'empty checksum'])
def test_a_damaged_library_is_built_anew(fake_compiler, monkeypatch, damage):
    """Loaded, a truncated one ends the process with SIGBUS, at every start."""
    script = fake_compiler / 'fake++'
    script.write_text(script.read_text().replace(': > "$2"', 'echo code > "$2"'))
    path = library.library('cpu')
    whole, built = path.read_bytes(), calls(fake_compiler)
    damage(path)
    with pytest.raises(BuildError, match=r'is damaged|has no checksum'):
        library.library('cpu', allow_build=False)
    with monkeypatch.context() as patch:
        patch.setattr(library, 'find_compiler', lambda kind: None)
        with pytest.raises(BuildError, match='no C'):
            library.library('cpu')
    assert library.library('cpu').read_bytes() == whole and calls(fake_compiler) == 2 * built
    assert library.library('cpu', allow_build=False) == path


OTHER_USER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can give files away')
DOUBTFUL = [
    (lambda path: path.chmod(0o666), 'can be written by others'),
    (lambda path: path.chmod(0o775), 'can be written by others'),
    pytest.param(lambda path: os.chown(path, OTHER_USER, -1), 'belongs to the user 54321', marks=as_root),
]


@pytest.mark.parametrize(('change', 'message'), DOUBTFUL)
def test_a_library_that_another_user_could_have_written_is_built_anew(fake_compiler, change, message):
    path = library.library('cpu')
    built = calls(fake_compiler)
    change(path)
    with pytest.raises(BuildError, match=message):
        library.library('cpu', allow_build=False)
    assert library.library('cpu') == path and calls(fake_compiler) == 2 * built
    assert library.library('cpu', allow_build=False) == path


@pytest.mark.parametrize('exists', [False, True])
@pytest.mark.parametrize(('change', 'message'), DOUBTFUL)
def test_a_cache_that_another_user_could_have_filled_is_not_used(fake_compiler, change, message, exists):
    folder = fake_compiler / 'cache'
    folder.mkdir()
    if exists:
        library.library('cpu')
    built = calls(fake_compiler)
    change(folder)
    with pytest.raises(BuildError, match=rf'{message}.*THEMASK_OPS_CACHE'):
        library.library('cpu')
    assert calls(fake_compiler) == built


@as_root
def test_a_cache_that_root_has_built_serves_everybody(fake_compiler, monkeypatch):
    path = library.library('cpu')
    path.parent.chmod(0o555)
    built = calls(fake_compiler)
    monkeypatch.setattr(library.os, 'geteuid', lambda: OTHER_USER)
    assert library.library('cpu') == path and calls(fake_compiler) == built


@as_root
def test_a_link_that_another_user_made_is_not_followed(fake_compiler):
    (fake_compiler / 'elsewhere').mkdir()
    (fake_compiler / 'cache').symlink_to('elsewhere')
    assert library.library('cpu').exists(), "one's own link is"
    os.chown(fake_compiler / 'cache', OTHER_USER, -1, follow_symlinks=False)
    with pytest.raises(BuildError, match='belongs to the user 54321'):
        library.library('cpu')


def test_a_shared_folder_where_nobody_replaces_the_files_of_others_is_used(fake_compiler):
    """As /tmp is."""
    folder = fake_compiler / 'cache'
    folder.mkdir()
    folder.chmod(0o1777)
    assert library.library('cpu') == library.library('cpu', allow_build=False)


def test_a_umask_that_lets_the_group_write_does_no_harm(fake_compiler, monkeypatch):
    """Many systems have it by default; earlier versions left such a default folder."""
    monkeypatch.delenv('THEMASK_OPS_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(fake_compiler))
    before = os.umask(0o002)
    try:
        (fake_compiler / 'themask/ops').mkdir(parents=True)
        path = library.library('cpu')
    finally:
        os.umask(before)
    assert path.parent == fake_compiler / 'themask/ops' and path.parent.stat().st_mode & 0o777 == 0o755
    assert library.library('cpu', allow_build=False) == path


@pytest.mark.parametrize('suffix', ['.lock', '.failed', '.sha256', '.so'])
@pytest.mark.parametrize('fails', [False, True])
def test_links_in_the_cache_are_not_followed(fake_compiler, suffix, fails):
    precious = fake_compiler / 'precious'
    path = library.library('cpu')
    precious.write_text('precious')
    path.unlink()
    path.with_suffix(suffix).unlink(missing_ok=True)
    path.with_suffix(suffix).symlink_to(precious)
    if fails:
        (fake_compiler / 'fail').touch()
    if fails or suffix == '.lock':
        with pytest.raises(BuildError):
            library.library('cpu')
    else:
        assert library.library('cpu') == path
    assert precious.read_text() == 'precious'


def test_a_library_without_a_function_leads_to_the_slower_form(tmp_path):
    compiler = library.find_compiler('cpu')
    if compiler is None:
        pytest.skip('no compiler here')
    (tmp_path / 'empty.cpp').touch()
    library.compile_units([library.Unit('empty', tmp_path / 'empty.cpp', ['-fPIC'])], compiler, tmp_path / 'empty.so')
    with pytest.raises(BuildError, match=r'does not load: .*themask_\w+; delete it'):
        library.load('cpu', tmp_path / 'empty.so')


def test_a_user_without_a_home_has_a_cache_among_temporary_files(fake_compiler, monkeypatch):
    for name in ('THEMASK_OPS_CACHE', 'XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('pwd.getpwuid', lambda uid: {}[uid])
    monkeypatch.setattr(library.tempfile, 'gettempdir', lambda: str(fake_compiler))
    assert library.library('cpu').parent == fake_compiler / f'themask-ops-{os.geteuid()}'
    monkeypatch.setenv('THEMASK_OPS_CACHE', '~/cache')
    assert library.cache_dir() == fake_compiler / f'themask-ops-{os.geteuid()}'


def test_the_first_build_says_once_what_it_does_and_how_to_do_it_ahead(fake_compiler, capsys, monkeypatch):
    library._announce.cache_clear()
    monkeypatch.setenv('THEMASK_OPS_BACKEND', 'pytorch')
    library.library('cpu').unlink()
    assert capsys.readouterr().err == ''
    monkeypatch.delenv('THEMASK_OPS_BACKEND')
    path = library.library('cpu')
    assert capsys.readouterr().err.count('\n') == 1
    library._announce.cache_clear()
    for quiet in (True, False):
        assert library.library('cpu') == path  # nothing to build
        path.unlink()
        library.library('cpu', quiet=quiet)
        said = capsys.readouterr().err
        assert said == '' if quiet else str(path.parent) in said and f'sh {library.MAKE}' in said
    assert library.MAKE.is_file()


@pytest.mark.parametrize('choice', ['auto', 'pytorch'])
def test_asking_for_the_pytorch_form_silences_the_warning(fresh_library, monkeypatch, choice):
    monkeypatch.setenv('THEMASK_OPS_BACKEND', choice)
    monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert not library.usable('cpu')
    said = ['THEMASK_OPS_BACKEND=pytorch' in str(warning.message) for warning in caught]
    assert said == ([True] if choice == 'auto' else [])


EIGHT_PROCESSES = """
import os, torch
from mmseg.kernels import library
for _ in range(3):
    os.fork()
try:
    result = str(library.library('cpu'))
except library.BuildError as error:
    result = 'failed: ' + str(error).splitlines()[-1]
os.write(1, (result + '\\n').encode())  # in one piece
"""


@pytest.mark.parametrize('fails', [False, True])
def test_of_many_processes_one_builds(fake_compiler, fails):
    """As with the ranks of one training; a slow compiler lets all of them arrive."""
    script = fake_compiler / 'fake++'
    script.write_text(script.read_text().replace('echo call', 'sleep 0.5; echo call'))
    if fails:
        (fake_compiler / 'fail').touch()
    result = run(EIGHT_PROCESSES)
    lines = result.stdout.splitlines()
    assert len(lines) == 8, result.stderr
    assert len(set(lines)) == 1
    units = len(library.cpu_units())
    assert lines[0].startswith('failed: no such header') == fails
    assert 0 < calls(fake_compiler) <= units if fails else calls(fake_compiler) == units + 1
    assert result.stderr.count('compiling native') == 1, 'the one that builds says so'


def test_fallback_warns_once_and_says_how_to_mend_it(fresh_library, monkeypatch):
    monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    arguments = problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            ms_deform_attn_fused(*arguments)
    messages = [str(w.message) for w in caught if 'MSDeformAttn' in str(w.message)]
    assert len(messages) == 1
    assert 'CXX' in messages[0] and 'THEMASK_OPS_BACKEND=pytorch' in messages[0]
    assert caught[0].filename == __file__


def test_a_forced_backend_that_fails_is_an_error(fresh_library, monkeypatch):
    monkeypatch.setattr(library, 'find_compiler', lambda kind: None)
    monkeypatch.setenv('THEMASK_OPS_BACKEND', 'cpu')
    with pytest.raises(BackendError, match='CXX'):
        ms_deform_attn_fused(*problem())


@pytest.mark.parametrize(('choice', 'message'), [('cuda', 'value is on cpu'), ('fast', 'auto, cpu, cuda, pytorch')])
def test_a_backend_that_does_not_fit_is_an_error(monkeypatch, choice, message):
    monkeypatch.setenv('THEMASK_OPS_BACKEND', choice)
    with pytest.raises(BackendError, match=message):
        ms_deform_attn_fused(*problem())


def test_other_devices_take_the_pytorch_form():
    arguments = [a.to('meta') if isinstance(a, torch.Tensor) else a for a in problem()]
    assert ms_deform_attn_fused(*arguments).shape == (2, 5, 16)


def test_instruction_sets(fresh_library, monkeypatch):
    monkeypatch.delenv('THEMASK_OPS_CACHE')
    need_native()
    names = library.instruction_sets()
    assert library.instruction_set() == names[0] and names[-1] == 'portable'
    with pytest.raises(BackendError, match='sse9'):
        library.choose_instruction_set('sse9')
    for name, wanted in (('portable', 'portable'), ('sse9', None)):
        library.native.cache_clear()
        monkeypatch.setenv('THEMASK_OPS_INSTRUCTION_SET', name)
        if wanted is None:
            with pytest.raises(BackendError, match='sse9'):
                library.native('cpu')
        else:
            assert library.instruction_set() == wanted
    library.native.cache_clear()
    monkeypatch.setenv('THEMASK_OPS_INSTRUCTION_SET', names[0])
    assert library.instruction_set() == names[0]


def test_a_broken_library_is_a_build_error(tmp_path):
    path = tmp_path / 'broken.so'
    path.write_text('not a library')
    with pytest.raises(BuildError, match='does not load'):
        library.load('cpu', path)


@pytest.mark.parametrize(
    ('wanted', 'flags'),
    [
        ('8.0;9.0a+PTX', ['compute_80,code=sm_80', 'compute_90a,code=[sm_90a,compute_90a]']),
        ('', ['compute_80,code=sm_80', 'compute_90,code=[sm_90,compute_90]']),
    ],
)
def test_gpu_targets(monkeypatch, wanted, flags):
    """The variable is honoured; the default leaves out what an old nvcc does not know."""
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', wanted)
    monkeypatch.setattr(library, 'output', lambda command: 'compute_75\ncompute_80\ncompute_90\n')
    (unit,) = library.cuda_units(['nvcc'])
    assert [flag for flag in unit.flags if 'gencode' in flag] == [f'-gencode=arch={flag}' for flag in flags]


def test_the_report_checks_and_times(capsys):
    need_native()
    from mmseg.kernels import __main__ as report

    assert report.check('cpu', [(4, 5), (8, 10)])
    assert 'PyTorch form: forward' in capsys.readouterr().out


SPECIAL = """
import os, torch
from pathlib import Path
from mmseg.kernels import library
loaded = library.load('cpu', Path(os.environ['LIBRARY']))
library.native = lambda kind: loaded
from tests.core import test_video_consistency as runs
from tests.kernels import test_attention as attention, test_label_map as labels
from tests.kernels.test_ops import *
for _ in instruction_sets():
    for fused in (False, True):
        for width in (1, 8, 24, 32, 40, 64):
            assert_equals_pytorch_form(problem(width=width, fused=fused), fused)
            for types in MIXES:
                assert_is_the_float32_call_rounded(problem(width=width, fused=fused), fused, types)
        for case in (
            {'n': 0}, {'queries': 0}, {'points': 1}, {'points': 11, 'heads': 3}, {'dtype': torch.float64},
            {'shapes': ((1, 1),)}, {'shapes': ((1, 1), (2, 1), (3, 4), (5, 5), (6, 7))},
        ):
            assert_equals_pytorch_form(problem(**case, fused=fused), fused)
            if 'dtype' not in case:
                assert_is_the_float32_call_rounded(problem(**case, fused=fused), fused, MIXES[0])
        value, shapes, *others = problem(fused=fused)
        for bad in (float('nan'), float('inf'), -1e30, 3e9, 1e5):
            points = others[-2].clone()
            points[..., 0, 1] = bad
            with_gradients(forms(fused)[0], (value, shapes, *others[:-2], points, others[-1]))
attention.test_any_strides()
attention.test_any_number_of_threads_gives_the_same_bits()
for dtype in attention.TOLERANCE:
    attention.test_chunks_of_keys(dtype)
    for queries, keys, width in ((1, 1, 1), (9, 31, 3), (65, 33, 33), (130, 513, 64), (1100, 40, 32)):
        mask = attention.some(2, 1, queries, keys)
        attention.assert_equals_torch(*attention.inputs(dtype, 2, 2, queries, keys, width), mask)
for test in (
    labels.test_two_resizes_and_argmax, labels.test_windows, labels.test_the_first_of_equal_scores_wins,
    labels.test_subnormal_float16_scores, labels.test_frames_strips_bands_and_threads,
):
    test()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    labels.test_scores_that_are_not_finite_spoil_no_pixel_but_their_own(dtype)
for pixels in (1, 127, 128, 129, 255, 256, 257, 511, 512, 1000):
    for lengths in ((), (2,), (8, 16), (300,)):
        gt, pred = runs.flickering_video(pixels, 30, (1, pixels))
        want = {n: runs.naive_windows(gt, pred, n, True) for n in lengths}
        assert all(counts == want for counts in runs.counted(gt, pred, lengths, True))
print('all equal')
"""


def run_special(tmp_path: Path, flags: list[str], sets: dict | None = None, **environment: str) -> None:
    """Runs all native code as it is compiled with more flags."""
    compiler = library.find_compiler('cpu')
    if compiler is None or 'g++' not in Path(compiler[0]).name:
        pytest.skip('needs g++')
    target = tmp_path / 'special.so'
    library.compile_units(library.cpu_units(sets), compiler, target, ['-Wall', '-Wextra', '-Werror', *flags])
    result = run(SPECIAL, LIBRARY=str(target), THEMASK_OPS_BACKEND='cpu', **environment)
    assert 'all equal' in result.stdout, result.stderr[-3000:]


@pytest.mark.slow
def test_the_avx512_code_is_right_on_a_machine_without_it(tmp_path):
    """The same wide source, compiled to the steps that this machine has."""
    if not any(unit.name.endswith('avx512') for unit in library.cpu_units()):
        pytest.skip('not an x86 machine')
    run_special(tmp_path, ['-DTHEMASK_AVX512_EMULATED'], {**library.X86_SETS, 'avx512': ['-DWIDTH=64']})


@pytest.mark.slow
def test_compilers_and_sanitizers_find_nothing(tmp_path):
    command = [*(library.find_compiler('cpu') or ['g++']), '-print-file-name=libasan.so']
    runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    flags = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-fno-omit-frame-pointer', '-g']
    run_special(tmp_path, flags, LD_PRELOAD=runtime, ASAN_OPTIONS='detect_leaks=0')


def test_libraries_are_built_ahead_of_time(fake_compiler, capsys):
    assert library.main([]) == 0
    assert Path(capsys.readouterr().out.split()[1]).exists()
    (fake_compiler / 'fail').touch()
    for path in (fake_compiler / 'cache').iterdir():
        path.unlink()
    assert library.main([]) == 1
    assert 'no such header' in capsys.readouterr().err


@pytest.mark.slow
def test_make_sh_builds_them(fake_compiler, monkeypatch):
    monkeypatch.setenv('PYTHON', sys.executable)
    result = subprocess.run(['sh', library.MAKE], capture_output=True, text=True)
    assert list((fake_compiler / 'cache').glob('cpu-*.so')), result.stderr
    (fake_compiler / 'fail').touch()
    for path in (fake_compiler / 'cache').iterdir():
        path.unlink()
    result = subprocess.run(['sh', library.MAKE], capture_output=True, text=True)
    assert result.returncode == 1 and 'no such header' in result.stderr
