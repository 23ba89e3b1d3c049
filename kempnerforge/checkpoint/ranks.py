"""What ranks tell each other. Without a process group the calling process is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from kempnerforge.checkpoint.manifest import CheckpointError

T = TypeVar("T")
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def in_group() -> bool:
    """Whether there are other ranks.

    NOTE: a group of one does not count. Every save through gloo starts a thread that stays, and on a CPU the
    steps after it took 40 % longer, most likely because OpenMP then sees more threads than cores.
    """
    return not _alone.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    return dist.get_world_size() if in_group() else 1


@contextmanager
def alone() -> Iterator[None]:
    """In this thread all functions here are those of a process without others: rank 0 reads something that
    the other ranks do not.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def talking_in(group: dist.ProcessGroup | None) -> Iterator[None]:
    """In this thread all functions here use ``group``, of all ranks; None: the usual one."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def group() -> dist.ProcessGroup | None:
    """The group of ``talking_in``."""
    return _group.get()


def gather(value: T) -> list[T]:
    """``value`` of every rank, in the order of ranks, on every rank."""
    if not in_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group())
    return values


def fault_reason(error: BaseException) -> str:
    """The reason in one line, also of DCP's exception, whose own text is a page of tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"rank {r}: {fault_reason(e)}" if world_size() > 1 else fault_reason(e) for r, (e, _) in sorted(error.failures.items())
        )
    if isinstance(error, CheckpointError):
        return str(error)
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Runs a block, which has no collectives, on every rank; then all ranks know whether it failed on any.

    Raises:
        CheckpointError: on every rank, when the block failed on any, so that none waits for the others.
    """
    error: str | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:
        error = fault_reason(caught)
    errors = [(r, e) for r, e in enumerate(gather(error)) if e is not None]
    if errors:
        first, text = errors[0]
        same = world_size() == 1 or (len({e for _, e in errors}) == 1 and len(errors) == world_size())
        raise CheckpointError(f"{what}: {text}" if same else f"{what}: rank {first}: {text}")


def from_rank0(decide: Callable[[], T], what: str = "") -> T:
    """The result of ``decide()``, which only rank 0 calls, on every rank.

    Raises:
        CheckpointError: on every rank, when ``decide`` raised.
    """
    box: list[Any] = [None, None]  # value, error
    if rank() == 0:
        try:
            box[0] = decide()
        except Exception as caught:
            box[1] = f"{what}: {fault_reason(caught)}" if what else fault_reason(caught)
    if in_group():
        dist.broadcast_object_list(box, src=0, group=group())
    if box[1] is not None:
        raise CheckpointError(box[1])
    return box[0]
