"""Processes of a test's own. They are forked from a server that has torch and this package imported: a start takes a tenth of a second."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import TextIO

PRELOADED = ("torch._dynamo", "kempnerforge.training.run", "kempnerforge.cli.train", "kempnerforge.cli.generate", "tests.training.tiny")


class Forked:
    """``main(*args)`` in a process with ``env`` as its environment; it is asked as a ``subprocess.Popen`` with two pipes of text."""

    def __init__(self, main: Callable[..., object], args: Sequence[object], env: Mapping[str, str]) -> None:
        (out, its_out), (err, its_err) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        self._process = fork_server().Process(target=_begin, args=(main, args, dict(env), its_out, its_err))
        self._process.start()
        its_out.close()
        its_err.close()
        self.pid: int = self._process.pid  # type: ignore[assignment]
        self.stdout, self.stderr = _reader(out), _reader(err)
        self._listeners: list[threading.Thread] = []
        self._said = ["", ""]

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.exitcode

    poll = returncode.fget  # type: ignore[assignment]

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def listen(self) -> None:
        """Begins to read what it says, so that it never waits for a full pipe."""
        if not self._listeners:
            self._listeners = [threading.Thread(target=self._listen, args=(k,), daemon=True) for k in range(2)]
            for thread in self._listeners:
                thread.start()

    def _listen(self, k: int) -> None:
        with suppress(ValueError):  # closed by the test
            self._said[k] = (self.stdout, self.stderr)[k].read()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits; what it has said since the test read last."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.listen()
        self.wait(timeout)
        for thread in self._listeners:
            thread.join(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return self._said[0], self._said[1]


def run_module(module: str, argv: Sequence[str]) -> None:
    """``python -m module ARGV``."""
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _begin(main: Callable[..., object], args: Sequence[object], env: Mapping[str, str], out: Connection, err: Connection) -> None:
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(env)
    main(*args)


def _reader(end: Connection) -> TextIO:
    number = os.dup(end.fileno())
    end.close()
    return open(number, encoding="utf-8", errors="replace")


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context
