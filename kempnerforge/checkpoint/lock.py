"""One job at a time per run directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kempnerforge.checkpoint.manifest import CheckpointError
from kempnerforge.checkpoint.ranks import from_rank0
from kempnerforge.util.reading import regular

if TYPE_CHECKING:
    from typing import Self

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked child (a loader worker) shares the lock, and would hold it after its parent was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


def holder(run_dir: Path) -> str:
    """The pid of the process that holds the lock of ``run_dir``; empty: none does."""
    try:
        descriptor = os.open(Path(run_dir) / ".lock", os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return ""


class RunLock:
    """Holds ``run_dir/.lock`` from construction until ``release``, the end of a ``with`` block or of the
    process. ``release`` removes the file.

    Rank 0 takes the lock (``flock``). With a process group all ranks construct one, with the same outcome.

    Raises:
        CheckpointError: another process has it; the message names its pid.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = regular(Path(run_dir) / ".lock")
        self._descriptor: int | None = None
        from_rank0(self._acquire)

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_at_path(descriptor):  # its holder released and removed it in between
                os.close(descriptor)
                return self._acquire()
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CheckpointError(
                f"{self.path.parent} is in use by another job (pid {holder}); wait for it or choose another run.dir"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        _held.add(descriptor)
        self._descriptor = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError:
            self.release()
            raise

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Releases the lock. A second call does nothing."""
        if self._descriptor is not None and self._descriptor in _held:
            if self._is_at_path(self._descriptor):  # not if the directory was moved
                self.path.unlink()
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
