"""Small helpers: order of names, files that must not be overwritten, how a command line ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from rich.table import Table

from mmseg.utils.cli import run_all, run_tool
from mmseg.utils.console import table_console
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import atomic_file, read_lines, refuse_overwriting
from mmseg.utils.names import natural_key
from tests.tool_process import ROOT, environment


@pytest.mark.parametrize('names', [
    ['1', '2', '10', '20'],
    ['001', '2', '010'],
    ['frame_1', 'frame_2', 'frame_10'],
    ['a1b2', 'a1b10', 'a2b1'],
    ['7', '007a', 'x'],
    ['city_000001_000019', 'city_000001_000020', 'city_000002_000001'],
])  # fmt: skip
def test_natural_order(names):
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural_key) == names


def test_names_that_count_alike_are_ordered_all_the_same():
    assert sorted(['2', '02', '002'], key=natural_key) == sorted(['002', '2', '02'], key=natural_key)


@pytest.mark.parametrize('link', [None, os.symlink, os.link])
def test_an_output_that_is_an_input_is_refused(tmp_path, link):
    source = output = tmp_path / 'in.mp4'
    source.write_bytes(b'film')
    if link is not None:
        output = tmp_path / 'other.mp4'
        link(source, output)
    with pytest.raises(ConfigError, match=r"--out: '.*' is the input"):
        refuse_overwriting({'--json': None, '--out': output}, {'checkpoint': None, 'input': source})
    refuse_overwriting({'--out': tmp_path / 'new.mp4'}, {'input': source})


def test_an_output_that_does_not_exist_is_found_through_its_folder(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to('folder')
    with pytest.raises(ConfigError, match='input'):
        refuse_overwriting({'--out': tmp_path / 'link' / 'x'}, {'input': tmp_path / 'folder' / 'x'})


@pytest.mark.parametrize('error, line', [
    (DataError('frame 3 is broken'), 'error: frame 3 is broken'),
    (OSError(28, 'No space left on device', 'o.json'), 'error: o.json: No space left on device'),
])  # fmt: skip
def test_an_error_is_one_line_and_a_status(capsys, error, line):
    def fail():
        raise error

    assert run_tool(fail) == 1
    assert capsys.readouterr().err == f'{line}\n'
    assert run_tool(fail, failed=2) == 2
    assert run_tool(lambda: None) == 0


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r'o\.json') as caught, atomic_file(tmp_path / 'o.json'):
        raise OSError(28, 'No space left on device')
    assert caught.value.filename.endswith('o.json') and not list(tmp_path.iterdir())


PROGRAM = """
import sys, time
from mmseg.utils.signals import Interruption
with Interruption('finishing the frame') as interruption:
    print('ready', flush=True)
    if sys.argv[1] == 'polls':
        while not interruption:
            time.sleep(0.01)
    elif sys.argv[1] == 'waits':
        with interruption.raising():
            time.sleep(60)
    else:  # deaf: inside one call of a library
        import ctypes
        while True:
            ctypes.CDLL(None).sleep(60)
sys.exit(interruption.status)
"""


def _signalled(mode, *numbers, start=()):
    process = subprocess.Popen([*start, sys.executable, '-c', PROGRAM, mode], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert process.stdout.readline() == 'ready\n'
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    return process


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks(number):
    process = _signalled('polls', number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == f'{number.name}: finishing the frame; a second signal ends at once\n'


def test_a_wait_ends_with_the_first_signal():
    process = _signalled('waits', signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert 'Interrupted' in err and 'Traceback' in err  # of this program, which does not catch it


def test_the_second_signal_ends_a_program_that_is_deaf():
    process = _signalled('deaf', signal.SIGINT, signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert [line.split(':')[0] for line in err.splitlines()] == ['SIGINT', 'SIGTERM']


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored():
    process = _signalled('polls', signal.SIGHUP, start=['env', '--ignore-signal=HUP'])
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_every_step_runs_and_the_first_error_is_raised(capsys):
    done = []

    def fail(number):
        done.append(number)
        raise OSError(28, 'No space left on device', f'{number}.json')

    with pytest.raises(OSError, match=r'1\.json'):
        run_all(lambda: fail(1), lambda: done.append(2), lambda: fail(3))
    assert done == [1, 2, 3]
    assert capsys.readouterr().err == 'error: 3.json: No space left on device\n'


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_bytes(b'\xef\xbb\xbfa b \r\n\n  c\n')
    assert read_lines(path) == ['a b', 'c']
    for encoding, said in (('utf-16', ': is UTF-16 text'), ('latin-1', ', line 1: byte 0xe9 is not UTF-8')):
        path.write_text('caf\u00e9\n', encoding=encoding)
        with pytest.raises(DataError, match=rf'x\.txt{said}'):
            read_lines(path)


def test_tables_take_no_markup_from_data(capsys):
    table = Table('[title]', title='[/b] of :car:')
    table.add_row('road [/main] [void] :car:')
    table_console().print(table)
    shown = capsys.readouterr().out
    assert '[/b] of :car:' in shown and '[title]' in shown and 'road [/main] [void] :car:' in shown
