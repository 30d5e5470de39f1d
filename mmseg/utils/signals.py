"""Ctrl-C, SIGTERM and SIGHUP: the first asks a program to finish what it must, the second ends it at once.

Python runs a signal handler between two of its own instructions, so a program that waits inside a library (for another
rank, for a device) would seem deaf.  A thread reads the numbers of signals as they come (``signal.set_wakeup_fd``): it
says at once what will happen, and ends the process at the second signal, whatever the main thread waits for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

_END = b'\0'  # no signal has this number


class Interrupted(KeyboardInterrupt):
    """Raised inside :meth:`Interruption.raising` when the signal ``number`` has come."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def stop_signals() -> list[int]:
    """The signals that end a program: SIGINT, SIGTERM and SIGHUP but those ignored since its start (``nohup``)."""
    names = ('SIGINT', 'SIGTERM', 'SIGHUP')
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def leave_signals_to_the_parent() -> None:
    """In a worker process: the parent finishes what it does first, and then tells its workers to end."""
    signal.set_wakeup_fd(-1)
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


class Interruption:
    """Takes note of the first signal and leaves at the second; a context, active in the main thread only.

    Args:
        say: what is printed at the first signal, such as ``'stopping after this iteration'``; None prints nothing.
        owner: whether this process speaks (of several ranks, one does).

    Attributes:
        number: of the first signal, 0 before.
    """

    def __init__(self, say: str | None = 'finishing', owner: bool = True) -> None:
        self.number = 0
        self._say = say if owner else None
        self._raising = 0
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.number)

    @property
    def status(self) -> int:
        """The exit status that a shell expects: 128 + the signal, 0 where none has come."""
        return 128 + self.number if self.number else 0

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, the first signal raises :class:`Interrupted`: for waits, and for work that may be dropped."""
        if self.number:
            raise Interrupted(self.number)
        self._raising += 1
        try:
            yield
        finally:
            self._raising -= 1

    def __enter__(self) -> Interruption:
        self._undo: list[Callable[[], object]] = []
        if threading.current_thread() is not threading.main_thread():  # signals are the caller's business
            return self
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in stop_signals():
            self._undo.append(partial(signal.signal, number, signal.signal(number, self._note)))
        watcher = threading.Thread(target=self._watch, args=(reader,), name='signals', daemon=True)
        watcher.start()
        self._undo += [
            partial(signal.set_wakeup_fd, former_fd), partial(writer.send, _END), watcher.join, writer.close,
            reader.close]  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.number:  # a forked worker has the handler, too
            return
        self.number = number
        if self._raising:
            raise Interrupted(number)

    def _watch(self, reader: socket.socket) -> None:
        """Runs in a thread until it reads the end; forked processes keep the other end of the socket open."""
        numbers = set(stop_signals())
        came = 0
        while True:
            for number in reader.recv(64):
                if number == _END[0]:
                    return
                if number not in numbers:
                    continue
                came += 1
                if came == 1 and self._say:
                    _write(f'{signal.Signals(number).name}: {self._say}; a second signal ends at once')
                elif came > 1:
                    _write(f'{signal.Signals(number).name}: ending at once')
                    end_now(128 + number)


def _forget_the_socket() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_the_socket)


def end_now(status: int) -> None:
    """Ends this process and the workers it has started, without cleaning up; what was printed is shown."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _write(text: str) -> None:
    """To standard error without its lock, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f'\n{text}\n'.encode() if sys.stderr is not None and sys.stderr.isatty() else f'{text}\n'.encode())
