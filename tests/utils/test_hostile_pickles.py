"""Pickles that misuse what numpy arrays are made with: one line, no crash, no memory for what is not there."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg.apps.convert import read_weights
from mmseg.core import read_checkpoint
from mmseg.utils.errors import CheckpointError

MULTIARRAY = np._core.multiarray
POINTER = (0x4141414141414141).to_bytes(8, 'little')
PLAIN_STATE = (3, '|', None, None, None, -1, -1, 0)
OBJECT_FLAGS = 63


class Made:
    """Pickled as a call, and what it makes is then given a state."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts if self.parts[2] is not None else self.parts[:2]


def dtype(kind, state=PLAIN_STATE):
    return Made(np.dtype, kind, False, True, state=state)


def scalar(made, *content):
    return Made(MULTIARRAY.scalar, made, *content)


def array(made, shape, content):
    return Made(MULTIARRAY._reconstruct, np.ndarray, (0,), b'b', state=(1, shape, made, False, content))


FLOAT = dtype('f8', (3, '<', None, None, None, -1, -1, 0))
CASES = {
    'object number': scalar(dtype('O'), POINTER),
    'object array': array(dtype('O'), (1,), POINTER),
    'object array in a list': [array(dtype('O'), (1,), [POINTER])],
    'flags of objects': scalar(dtype('f8', (3, '<', None, None, None, -1, -1, OBJECT_FLAGS)), POINTER),
    'text of another size': scalar(dtype('U1', (3, '<', None, None, None, 1 << 30, 4, 8)), b'abcd'),
    'no text': array(dtype('U1'), (1,), b'\xff\xff\xff\xff'),
    'structured': array(dtype([('a', 'O')]), (1,), POINTER),
    'structured by its state': array(dtype('V8', (3, '|', None, ('a',), {'a': (FLOAT, 0)}, 8, 1, 16)), (1,), POINTER),
    'array in a dtype': array(dtype('f8', (3, '<', (FLOAT, (1 << 40,)), None, None, -1, -1, 0)), (1,), POINTER),
    'too few bytes': array(FLOAT, (1000,), POINTER),
    'too many bytes': array(FLOAT, (), 2 * POINTER),
    'bytes as a number': array(dtype('u1'), (1 << 40,), 1 << 40),
    'number without content': scalar(dtype('S999999999')),
    'huge shape': array(FLOAT, (1 << 40, 1 << 40), POINTER),
    'negative shape': array(FLOAT, (-1, -1), POINTER),
    'many axes': array(FLOAT, (1,) * 70, POINTER),
    'made at once': Made(np.ndarray, (1 << 34,), 'f4'),
    'no state': Made(np.ndarray, (1 << 34,), FLOAT),
}


def both_files(folder, content):
    (folder / 'weights.pkl').write_bytes(pickle.dumps({'model': {'a': content}}, 2))
    torch.save({'meta': {'a': content}, 'state_dict': {'w': torch.zeros(1)}}, folder / 'weights.pth')
    return folder / 'weights.pkl', folder / 'weights.pth'


READ_ALL = """
import resource, sys
import numpy as np
from mmseg.apps.convert import read_weights
from mmseg.utils.errors import CheckpointError
with open('/proc/self/statm') as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), resource.RLIM_INFINITY))
for path in sys.argv[1:]:
    print('reading', path, flush=True)
    try:
        for value in [*(read := read_weights(path))[0].values(), read[1]]:
            str(value)
    except CheckpointError as error:
        assert path in str(error) and len(str(error).splitlines()) == 1, error
        continue
    print('read')
"""


def test_hostile_pickles_are_one_line_and_no_crash(tmp_path):
    paths = []
    for name, content in CASES.items():
        (tmp_path / name).mkdir()
        paths += both_files(tmp_path / name, content)
    numbered = pickle.dumps({'w': np.float32([1])}, 2)
    assert numbered.startswith(b'\x80\x02}q\x00')  # a dict, and the number under which it may be asked for again
    (tmp_path / 'number').mkdir()
    paths.append(tmp_path / 'number' / 'weights.pkl')
    paths[-1].write_bytes(numbered.replace(b'}q\x00', b'}r\xff\xff\xff\x7f', 1))
    done = subprocess.run([sys.executable, '-c', READ_ALL, *map(str, paths)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, f'{done.returncode}: {done.stdout.splitlines()[-1]}\n{done.stderr[-2000:]}'
    assert done.stdout.count('reading') == len(paths)
    read = [paths[done.stdout[: m.start()].count('reading') - 1] for m in re.finditer('^read$', done.stdout, re.M)]
    assert [path.parent.name for path in read] == ['flags of objects', 'number'], 'both are ignored'


def test_an_array_is_filled_once(tmp_path):
    """Filled again it would free memory that a tensor may share by then."""
    filled = array(FLOAT, (1,), POINTER)
    again = pickle.dumps(filled.parts[2], 2)[2:-1]  # without the header and the end
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(filled, 2)[:-1] + again + b'b.')
    with pytest.raises(CheckpointError, match='not plain numbers'):
        read_weights(tmp_path / 'a.pkl')


NUMBERS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3, '>i2'),
    np.zeros((0, 4), np.uint8), np.array([True, False]), np.array(['wall', 'Straße']), np.array([b'sky']),
    np.float64(0.5), np.float16(1), np.bool_(True), np.int64(-3), np.uint8(200), np.str_('sky'), np.str_(''),
]  # fmt: skip


@pytest.mark.parametrize('old', [False, True], ids=['numpy 2', 'numpy 1'])
def test_numbers_and_strings_come_back_in_both_kinds_of_file(tmp_path, old):
    pickled = pickle.dumps({'numbers': NUMBERS, 'w': np.float32([1, 2])}, 2)
    if old:
        assert b'numpy._core' in pickled
        pickled = pickled.replace(b'numpy._core', b'numpy.core')
    (tmp_path / 'a.pkl').write_bytes(pickled)
    torch.save({'meta': {'numbers': NUMBERS}, 'state_dict': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="'numbers' is a list"):
        read_weights(tmp_path / 'a.pkl')
    meta = read_checkpoint(tmp_path / 'a.pth')['meta']
    for _ in range(2):  # the second time from what was saved again
        for got, want in zip(meta['numbers'], NUMBERS, strict=True):
            assert got.dtype == want.dtype.newbyteorder('=') and got.shape == want.shape
            assert got.tolist() == want.tolist()
            assert isinstance(got, type(want))
        torch.save({'meta': meta, 'state_dict': {'w': torch.ones(1)}}, tmp_path / 'b.pth')
        meta = read_checkpoint(tmp_path / 'b.pth')['meta']


def test_arrays_of_python_2_come_back(tmp_path):
    """Their bytes are strings."""
    pickled = pickle.dumps({'w': array(dtype('f4', (3, '<', None, None, None, -1, -1, 0)), (1,), '\x00\x00\x80?')}, 2)
    (tmp_path / 'a.pkl').write_bytes(pickled)
    assert read_weights(tmp_path / 'a.pkl')[0]['w'].tolist() == [1.0]
