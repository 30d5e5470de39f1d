"""What tools do to the allocator of their process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRANSPARENT = Path('/sys/kernel/mm/transparent_hugepage/enabled')
FAULTS = """
import resource, torch
from mmseg.utils.allocator import keep_pages, use_huge_pages
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(25):  # the first ones leave a few holes
    faults()
print(faults())
"""


def new_pages(call: str, **environment: str) -> int:
    """Page faults of a 64 MiB tensor after many of the same size have died."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES', 'THP_MEM'))}
    result = subprocess.run(
        [sys.executable, '-c', FAULTS.format(call=call)], env={**kept, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True, text=True, check=True)  # fmt: skip
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_pages_are_kept():
    assert new_pages('') > 10_000 or new_pages('', THP_MEM_ALLOC_ENABLE='0') > 10_000
    assert new_pages('assert keep_pages()') < 1_000
    assert new_pages('assert not keep_pages()', MALLOC_TRIM_THRESHOLD_='100000') > 10_000


@pytest.mark.skipif(
    not TRANSPARENT.exists() or '[never]' in TRANSPARENT.read_text(), reason='a kernel without transparent huge pages'
)
def test_tensors_are_on_huge_pages():
    assert new_pages('use_huge_pages()') < 3_000
    assert new_pages('use_huge_pages()', THP_MEM_ALLOC_ENABLE='0') > 10_000 or '[always]' in TRANSPARENT.read_text()


@pytest.mark.parametrize('tool', ['test', 'video_demo', 'benchmark'])
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
        code += FAULTS.format(call='') + 'assert faults() < 3_000'
    environment = {k: v for k, v in os.environ.items() if k != 'THP_MEM_ALLOC_ENABLE'}
    result = subprocess.run([sys.executable, '-c', code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
