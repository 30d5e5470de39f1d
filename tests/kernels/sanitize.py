"""Runs Python code on a native library that is compiled with all warnings as errors and with sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmseg.kernels import native

WARN = ['-Wall', '-Wextra', '-Werror']
SANITIZE = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-fno-omit-frame-pointer', '-g']


def run_sanitized(library: native.Library, code: str, folder: Path) -> None:
    """Runs ``code``, which loads the library at ``os.environ['LIBRARY']`` and prints ``passed`` at its end."""
    compiler = native.find_cxx()
    if compiler is None or 'g++' not in Path(compiler[0]).name:
        pytest.skip('needs g++')
    runtime = subprocess.run([*compiler, '-print-file-name=libasan.so'], capture_output=True, text=True).stdout.strip()
    target = folder / 'sanitized.so'
    native.compile_library(library, compiler, target, [*WARN, *SANITIZE])
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={
            **os.environ,
            'PYTHONPATH': str(Path(__file__).parents[2]),
            'LIBRARY': str(target),
            'LD_PRELOAD': runtime,
            'ASAN_OPTIONS': 'detect_leaks=0',
        },
        capture_output=True,
        text=True,
    )
    assert 'passed' in result.stdout, result.stderr[-3000:]
