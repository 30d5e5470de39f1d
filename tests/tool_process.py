"""Runs a tool as a user does: a process of its own in the repository's root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment():
    own = {
        'PYTHON': sys.executable,  # of the dist_*.sh scripts
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        'PYTHONUNBUFFERED': '1',
        'THEMASK_OPS_BACKEND': 'pytorch',
    }
    return {**os.environ, **own}


def command(tool, *args):
    return [sys.executable, f'tools/{tool}.py', *map(str, args)]


def run_tool(tool, *args, path=''):
    """Runs it and waits; ``path`` is a folder of more modules."""
    env = environment()
    env['PYTHONPATH'] += f'{os.pathsep}{path}'
    return subprocess.run(command(tool, *args), capture_output=True, text=True, cwd=ROOT, env=env)
