"""This process among others: its memory, its terminal, and the process that started it. Needs no torch."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn, TextIO

from kempnerforge.util.errors import visible

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
PR_SET_PDEATHSIG = 1
"""Of Linux' ``prctl``."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: batch systems warn a job with a signal of the user's choice, and a terminal that
closes sends SIGHUP."""

INTERRUPTED = 130
LAUNCHER = "KEMPNERFORGE_LAUNCHER"
"""The variable that holds the pid of what has started the ranks."""

HARMLESS = "\n\t\u00a0\u3000\u200c\u200d"
"""Not printable for Python, and obeyed by no terminal: ends of lines, tabs, wide spaces, what joins
characters."""


def tune_memory() -> None:
    """Two settings that make small models on a CPU faster; to be called before torch is imported.

    OpenMP threads that spin while they wait slow everything on shared cores by a factor of four, so they are
    told to give up early. And freed memory is kept: by default glibc hands each large tensor back to the
    system and takes new, zeroed pages for the next one, which cost about an eighth of the CPU time where it
    was measured.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    for parameter, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_THRESHOLD, 1 << 30)):
        mallopt(parameter, value)


def end_with(parent: int, number: int) -> None:
    """From now on the system sends signal ``number`` to this process when ``parent``, which has started it,
    ends in whatever way.
    """
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    except (AttributeError, OSError, TypeError):  # not Linux
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Sends this rank SIGTERM when its launcher ends, so that it saves and leaves: without a launcher it
    would not learn of a lost rank.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # not for processes that this one starts
    if launcher is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(int(launcher or os.getppid()), signal.SIGTERM)


class _Lasting(io.FileIO):
    """A file descriptor whose write errors are ignored: text that cannot be written is lost."""

    def write(self, data) -> int:
        with suppress(OSError):
            super().write(data)
        return len(memoryview(data).cast("B"))


class Shown(io.TextIOWrapper):
    """A stream for people. What is written may quote names and texts of others: what would steer a terminal
    is shown as an escape. On stderr ``\\r`` may come first, as it does in the progress bars of libraries.

    Attributes:
        exact: the same file, which takes text as it is, and names of files byte for byte.
    """

    def __init__(self, raw: io.FileIO, encoding: str, line_buffering: bool) -> None:
        buffer = io.BufferedWriter(raw)
        self.exact = io.TextIOWrapper(buffer, encoding, "surrogateescape", line_buffering=line_buffering, write_through=True)
        super().__init__(buffer, encoding, "backslashreplace", line_buffering=line_buffering, write_through=True)

    def write(self, text: str, /) -> int:
        bar = self.fileno() == 2 and text.startswith("\r")
        return super().write("\r" * bar + visible(text[bar:], HARMLESS))


def open_output(*lasting: str) -> None:
    """Makes stdout and stderr ``Shown``: what is printed, logs and tracebacks. Those named in ``lasting``
    lose what they cannot write: a terminal that is gone, a pipe without a reader, a full disk.

    And descriptors 0 to 2 that are closed become /dev/null: otherwise the next file that is opened, a
    checkpoint say, would be the one that messages are written to.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        raw = (_Lasting if stream is None or name in lasting else io.FileIO)(number, "w", closefd=False)
        at_once = number == 2 or raw.isatty() or getattr(stream, "write_through", False)
        setattr(sys, name, Shown(raw, getattr(stream, "encoding", "utf-8"), at_once))


def exact(stream: TextIO) -> TextIO:
    """Takes text as it is to where ``stream`` goes: text made visible before, and results that a program
    reads.
    """
    return stream.exact if isinstance(stream, Shown) else stream


def answer_stream() -> TextIO:
    """Where a model's answers go: stdout. A terminal gets what can be shown, a file or another program all of
    it.
    """
    return sys.stdout if sys.stdout.isatty() else exact(sys.stdout)


def say(line: str) -> None:
    """A line on stderr, from a signal's handler: past Python's buffers, as a handler that finds one half
    written would raise.
    """
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))


def die_of_interrupt() -> NoReturn:
    """Ends this process as SIGINT does, for a shell ends its loop when a command has died of it. A launcher
    counts exit codes: 130.
    """
    if "RANK" not in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(INTERRUPTED)
