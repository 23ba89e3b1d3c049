"""When a collective times out on one rank, all ranks print their stacks, also the rank that the others wait
for.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from kempnerforge.util.errors import visible

ALARM, TOLD = "alarm", "told"
GRACE_S = 5.0
"""Seconds that the rank with the timeout waits for the stacks of the others."""
EXIT_CODE = 3
"""Stopped by a fault; a restart continues."""


class Watchdog:
    """A thread of each rank that looks for an alarm in the store of the process group.

    A rank whose collective timed out prints its stack and raises the alarm. The others then print the stacks
    of all their threads to stderr, wherever their main thread is, and end with exit code 3. Where code holds
    the interpreter so that no thread runs, ``faulthandler`` prints the stacks after the timeout, and the
    launcher ends the process.

    NOTE: NCCL aborts the rank that waits from within; ``faulthandler.enable`` prints its stack then.

    Args:
        store: of the process group; it is cloned, as a client that waits blocks its connection.
        timeout_s: of the collectives.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.interval = min(1.0, timeout_s / 4)
        connection: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        connection.set_timeout(timedelta(seconds=GRACE_S))
        self._store = PrefixStore("watchdog", connection)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        faulthandler.enable(file=2)
        self._thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Ends the thread.

        Args:
            error: what ends the run. After a timeout this rank waits for the stacks of the others.
        """
        self._ended.set()
        self._thread.join(GRACE_S)
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            return
        reasons = [" ".join(str(link).split()) for link in _chain(error)]
        timeouts = [reason for reason in reasons if "timed out" in reason.lower() or "timeout" in reason.lower()]
        try:
            if timeouts:
                self._store.compare_set(ALARM, "", f"rank {self.rank} gave up: {timeouts[-1]}")
                self._tell(error)
                self._wait_until(lambda: self._store.add(TOLD, 0) == self.size, GRACE_S)
            elif self._wait_until(lambda: self._store.check([ALARM]), self.interval if "onnection" in " ".join(reasons) else 0):
                self._tell(error)
        except DistError as lost:
            if timeouts:
                print(f"rank {self.rank}: the other ranks cannot be asked where they are: {lost}", file=sys.stderr)

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(self.timeout_s + self.interval, file=2)
            if self._ended.wait(self.interval):
                return
            try:
                if self._store.check([ALARM]) and not self._ended.is_set():
                    self._tell()
                    sys.stdout.flush()
                    os._exit(EXIT_CODE)
            except DistError:
                return  # the process with the store has ended; faulthandler stays armed

    def _tell(self, error: BaseException | None = None) -> None:
        """Writes the stacks of this rank in one piece, each line with the rank."""
        why = self._store.get(ALARM).decode()
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        lines = [f"stacks of rank {self.rank}, because {why}", *f"{text}{stacks(but=threading.get_ident())}".splitlines()]
        sys.stderr.flush()
        os.write(2, "".join(f"[rank {self.rank}] {visible(line)}\n" for line in lines).encode(errors="replace"))
        self._store.add(TOLD, 1)

    @staticmethod
    def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (holds := condition()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return holds


def stacks(but: int = 0) -> str:
    """The stacks of all Python threads but the one with the identifier ``but``; the main thread is first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    shown = [(ident, frame) for ident, frame in frames if ident != but]
    return "\n".join(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in shown)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
