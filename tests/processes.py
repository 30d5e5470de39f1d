"""Processes of their own for tests, forked from a server that has done the slow imports already."""

from __future__ import annotations

import multiprocessing
import socket

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['mmseg.apis.train', 'tests.tiny_config'])


def start(function, *args):
    """Starts ``function(*args)`` and returns the process; both must be importable and picklable."""
    process = _context.Process(target=_run, args=(function, args))
    process.start()
    return process


def _run(function, args):
    # loader workers shall be forked, as in a training that a user starts: they notice when their parent is killed
    multiprocessing.set_start_method('fork', force=True)
    function(*args)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
