"""What tools do to the allocator of their process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRANSPARENT = Path('/sys/kernel/mm/transparent_hugepage/enabled')
MEMORY = """
import re, torch
from mmseg.utils.allocator import keep_pages, use_huge_pages
{call}
def mebibytes(field):
    sizes = re.findall(field + r':\\s+(\\d+) kB', open('/proc/self/smaps').read())
    return sum(map(int, sizes)) // 1024
before = mebibytes('Rss')
tensor = torch.ones(2**24)
huge = mebibytes('AnonHugePages')
del tensor
print(mebibytes('Rss') - before, huge)
"""


def memory(call: str, **environment: str) -> tuple[int, int]:
    """MiB that a tensor of 64 MiB leaves behind, and those on huge pages while it lives."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES', 'THP_MEM'))}
    result = subprocess.run(
        [sys.executable, '-c', MEMORY.format(call=call)], env={**kept, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True, text=True, check=True)  # fmt: skip
    left, huge = map(int, result.stdout.split())
    return left, huge


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_pages_are_kept():
    assert memory('')[0] < 10
    assert memory('assert keep_pages()')[0] > 50
    assert memory('assert not keep_pages()', MALLOC_TRIM_THRESHOLD_='100000')[0] < 10


@pytest.mark.skipif(
    not TRANSPARENT.exists() or '[never]' in TRANSPARENT.read_text(), reason='a kernel without transparent huge pages'
)
def test_tensors_are_on_huge_pages():
    assert memory('use_huge_pages()')[1] > 50
    if '[always]' not in TRANSPARENT.read_text():
        assert memory('use_huge_pages()', THP_MEM_ALLOC_ENABLE='0')[1] < 10


@pytest.mark.parametrize('tool', [
    'test', *(pytest.param(name, marks=pytest.mark.slow) for name in ('video_demo', 'benchmark'))])
def test_tools_that_predict_ask_for_huge_pages(tool):
    """What they import makes no tensor before ``main``, which torch's first look at the variable would come with."""
    code = f"""
import importlib, os, sys
sys.argv = ['{tool}', '--help']
module = importlib.import_module('tools.{tool}')
import mmseg.utils.allocator as allocator
asked = []
module.use_huge_pages = lambda: asked.append(allocator.use_huge_pages())
try: module.main()
except SystemExit: pass
assert asked and os.environ['THP_MEM_ALLOC_ENABLE'] == '1'
"""
    if TRANSPARENT.exists() and '[never]' not in TRANSPARENT.read_text():
        code += MEMORY.format(call='') + 'assert huge > 50'
    environment = {k: v for k, v in os.environ.items() if k != 'THP_MEM_ALLOC_ENABLE'}
    result = subprocess.run([sys.executable, '-c', code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
