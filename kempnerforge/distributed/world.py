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
from kempnerforge.util.errors import InputError, PluginError

T = TypeVar("T")
_watchdog: Watchdog | None = None


@dataclass(frozen=True)
class World:
    """This process among all processes of the job.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.
        mesh: of FSDP: one axis, or two with ``distributed.shard_size``: the copies of the weights, and the
            ranks that share a copy.
        tensor: the ranks that compute each layer together, one after the other in rank order; None: each by
            itself.
        context: the ranks that share the rows of a batch position by position; None: each has its own rows.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    tensor: DeviceMesh | None = None
    context: DeviceMesh | None = None

    @property
    def parts(self) -> int:
        """How many groups of ranks each compute something of their own; the ranks of one are those of
        ``tensor``.
        """
        return self.size // _size(self.tensor)

    @property
    def part(self) -> int:
        """The group of this rank, from 0."""
        return self.rank // _size(self.tensor)

    @property
    def data_size(self) -> int:
        """How many shares the samples of a step have."""
        return self.parts // _size(self.context)

    @property
    def data_rank(self) -> int:
        """The share of this rank, from 0."""
        return self.part // _size(self.context)

    def across_parts(self) -> DeviceMesh | None:
        """One rank of each of ``parts``, this one among them; None: all ranks. A collective."""
        if self.tensor is None:
            return None
        return init_device_mesh(self.device.type, (self.parts, self.tensor.size()), mesh_dim_names=("part", "layer"))["part"]

    def once(self, values: Sequence[float], *, of_batch: bool = False) -> list[float]:
        """``values`` that all ranks of ``tensor`` have alike, for a sum over all ranks that counts them once.

        Args:
            of_batch: the ranks of ``context`` have them alike, too.
        """
        first = self.is_first_of_batch if of_batch else self.rank % _size(self.tensor) == 0
        return list(values) if first else [0.0] * len(values)

    @property
    def is_first_of_batch(self) -> bool:
        """Whether this is the first of the ranks that have the same samples."""
        return self.rank % (_size(self.tensor) * _size(self.context)) == 0

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

    def gather_parts(self, value: T) -> list[T]:
        """``value`` of every one of ``parts``, in their order, on every rank. It is pickled."""
        return gather(value)[:: _size(self.tensor)]

    def together(self, act: Callable[[], T]) -> T:
        """The result of ``act`` on this rank. All ranks call it.

        Raises:
            InputError, PluginError, CheckpointError: on all ranks: ``act`` has raised it on one of them.
        """
        error: InputError | PluginError | CheckpointError | None = None
        result: list[T] = []
        try:
            result.append(act())
        except (InputError, PluginError, CheckpointError) as caught:
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
        InputError: the number of processes is no multiple of a group's size.

    With other ranks a ``Watchdog`` prints all stacks when a collective takes longer than ``timeout_s``.
    """
    global _watchdog
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg.check_processes(size)
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
    return World(rank, size, device, *meshes(device.type, size, cfg))


def meshes(device: str, size: int, cfg: DistributedConfig) -> tuple[DeviceMesh, DeviceMesh | None, DeviceMesh | None]:
    """``World.mesh``, ``World.tensor`` and ``World.context`` of ``size`` ranks."""
    parts, shared = size // cfg.tensor_parallel, cfg.shard_size // cfg.tensor_parallel
    axes = {"copies": parts // shared, "shards": shared} if 0 < shared < parts else {"data": parts}
    names = tuple(axes)
    if cfg.tensor_parallel > 1:
        axes |= {"tensor": cfg.tensor_parallel}
    mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    context = None
    if cfg.context_parallel > 1:
        by_batch = (parts // cfg.context_parallel, cfg.context_parallel, cfg.tensor_parallel)
        context = init_device_mesh(device, by_batch, mesh_dim_names=("batch", "context", "layer"))["context"]
    if cfg.tensor_parallel == 1:
        return mesh, None, context
    return mesh[names], mesh["tensor"], context


def _size(mesh: DeviceMesh | None) -> int:
    return 1 if mesh is None else mesh.size()


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
