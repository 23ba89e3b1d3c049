"""The world of this process: alone, of two ranks (in ``test_fsdp``, with the gradients), and started by the launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kempnerforge.distributed.world import World, compute_dtype
from tests.dist import ROOT, run_ranks

ALONE = """
import os
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
import torch.distributed as dist
from kempnerforge.config import DistributedConfig
from kempnerforge.distributed.world import start, stop
for _ in range(2):
    world = start(DistributedConfig())
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert dist.is_initialized() and dist.get_world_size() == 1 and world.mesh.mesh_dim_names == ("data",)
    stop()
    assert not dist.is_initialized()
stop()
print("fine")
"""


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_start_and_stop_alone() -> None:
    """Nothing of the environment is needed, it works again after it was stopped, and the interpreter exits in order."""
    result = run_python(ALONE)
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


def test_a_sum_of_one(world: World) -> None:
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    world.barrier()


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_not_waited_for_forever() -> None:
    source = """
import os, time
from kempnerforge.config import DistributedConfig
from kempnerforge.distributed.world import start
world = start(DistributedConfig(timeout_s=1))
if world.rank == 1:
    time.sleep(3)
    os._exit(0)
try:
    world.sum([1.0])
except RuntimeError:
    os._exit(7)
"""
    assert [r.returncode for r in run_ranks(source, 2, timeout=60)] == [7, 0]


@pytest.mark.dist
def test_the_launcher_hands_on_the_exit_code() -> None:
    """What a rank says of the user's input (2) is what the command says."""
    code = "import sys; from kempnerforge.distributed.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    command = [sys.executable, "-c", code, "train", "there-is-no-such-file.toml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "there-is-no-such-file.toml" in result.stderr


# ---- precision ----------------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_named_precision_is_taken(device: torch.device) -> None:
    assert compute_dtype("bf16", device) == torch.bfloat16
    assert compute_dtype("fp32", device) == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "want"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_auto_asks_the_cpu(capabilities: dict, want: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype("auto", CPU) == want


@pytest.mark.parametrize(("native", "want"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_asks_the_gpu(native: bool, want: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert compute_dtype("auto", CUDA) == want
