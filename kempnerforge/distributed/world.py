"""The processes of a job, one per device, started by ``torchrun``, ``--nproc`` or alone. One process is a
world of size 1: the same code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kempnerforge.checkpoint.manifest import CheckpointError
from kempnerforge.checkpoint.ranks import gather
from kempnerforge.config import DistributedConfig
from kempnerforge.distributed.watchdog import Watchdog
from kempnerforge.util.errors import InputError

T = TypeVar("T")
_watchdog: Watchdog | None = None


@dataclass(frozen=True)
class World:
    """This process among all processes of the job.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.
        mesh: one axis over all ranks, or two with ``distributed.shard_size``: the copies of the weights, and
            the ranks that share a copy.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def copies(self) -> int:
        """How many copies of the weights there are; a sum of shards over all ranks is so many times the sum
        of the whole.
        """
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Adds ``values``, numbers or a vector on ``device``, over all ranks, in float64."""
        if self.size == 1:
            return values.tolist() if isinstance(values, torch.Tensor) else list(values)
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank. It is pickled."""
        return gather(value)

    def together(self, act: Callable[[], T]) -> T:
        """The result of ``act`` on this rank. All ranks call it.

        Raises:
            InputError, CheckpointError: on all ranks: ``act`` has raised it on one of them.
        """
        error: InputError | CheckpointError | None = None
        result: list[T] = []
        try:
            result.append(act())
        except (InputError, CheckpointError) as caught:
            error = caught
        for raised in self.gather(error):
            if raised is not None:
                raise raised
        return result[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


def start(cfg: DistributedConfig) -> World:
    """Joins the process group of the environment (``RANK``, ``WORLD_SIZE``), or makes one of size 1.

    Raises:
        InputError: ``cfg.shard_size`` does not divide the number of processes.

    With other ranks a ``Watchdog`` prints all stacks when a collective takes longer than ``timeout_s``.
    """
    global _watchdog
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.shard_size and size % cfg.shard_size and size > 1:
        raise InputError(f"distributed.shard_size = {cfg.shard_size}: must divide the number of processes, {size}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=cfg.timeout_s)
    if size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        _watchdog = Watchdog(store, rank, size, cfg.timeout_s)
    return World(rank, size, device, _mesh(device.type, size, cfg.shard_size))


def _mesh(device: str, size: int, shard_size: int) -> DeviceMesh:
    if not 0 < shard_size < size:
        return init_device_mesh(device, (size,), mesh_dim_names=("data",))
    return init_device_mesh(device, (size // shard_size, shard_size), mesh_dim_names=("copies", "shards"))


def stop() -> None:
    """Leaves the process group. After a collective that timed out, all ranks print their stacks first."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close(sys.exception())
        _watchdog = None
    if dist.is_initialized():
        dist.destroy_process_group()


def compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype of ``train.mixed_precision`` on ``device``; "auto" is bf16 where the hardware
    multiplies it natively, else fp32.
    """
    if mixed_precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[mixed_precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        native = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32
