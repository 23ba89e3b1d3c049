"""What the ranks of the multi-process tests run."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import (
    BackgroundSave,
    CheckpointError,
    RunLock,
    find,
    load,
    load_training,
    resolve,
    save,
    save_training,
    store,
    tensor_info,
)
from kempnerforge.checkpoint.state import model_tensors, optimizer_tensors
from tests.checkpoint.helpers import Tiny, make_optimizers, snapshot, train


def _in_group(body: Callable[[], None]) -> None:
    """Runs ``body`` within a gloo group and leaves at once: gloo may abort at interpreter exit."""
    code = 0
    try:
        dist.init_process_group("gloo")
        body()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sharded() -> Tiny:
    """A ``Tiny`` with an inner FSDP unit."""
    model = Tiny()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_and_save(root: str, start: str, end: str, out: str) -> None:
    """Resumes at ``start`` (0: afresh), trains to ``end``, saves, and writes all full tensors to ``out``."""

    def body() -> None:
        model = sharded()
        optimizers = make_optimizers(model)
        if int(start):
            found = find(Path(root))
            assert found is not None and found[1].step == int(start) and found[1].state == {"done": int(start)}, found
            load_training(found[0], model, optimizers)
        train(model, optimizers, int(start), int(end))
        with torch.no_grad():  # leaves the root unit gathered
            model(torch.zeros(4, dtype=torch.long))
        assert all(isinstance(t, DTensor) for key, t in optimizer_tensors(model, optimizers).items() if not key.endswith("|step"))
        files = {"tokenizer/tokenizer.json": b"{}"}
        path = save_training(Path(root), int(end), model, optimizers, {"done": int(end)}, files, keep=5)
        assert path == resolve(Path(root))
        full = snapshot({**model_tensors(model), **optimizer_tensors(model, optimizers)})
        steps = [v for key, v in full.items() if key.endswith("|step")]
        assert steps and all(v.device.type == "cpu" for v in steps)
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, [float(s) for s in steps])
        assert all(e == everywhere[0] for e in everywhere), everywhere
        if dist.get_rank() == 0:
            torch.save(full, out)

    _in_group(body)


def one_rank_in_trouble(root: str) -> None:
    """Errors of one rank reach both, and the group works on afterwards."""

    def expect(text: str, call: Callable[[], object]) -> None:
        try:
            call()
        except CheckpointError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no error with {text!r}")

    def body() -> None:
        folder, last = Path(root), dist.get_rank() == 1
        tensors = {"a": torch.randn(3), "w": fully_shard(torch.nn.Linear(512, 512)).weight}
        assert find(folder) is None
        path = save(folder, 1, tensors, {}, {}, keep=2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if last else soft, hard))
        expect("rank 1: [Errno 27] File too large", lambda: save(folder, 2, tensors, {}, {}, keep=2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001"], list(folder.iterdir())
        dist.barrier()  # the next save may make its directory only after both ranks have looked
        expect("state is not plain JSON", lambda: save(folder, 2, tensors, {"x": {1}}, {}, keep=2))
        expect("rank 1: 'a' is a int", lambda: save(folder, 2, {**tensors, "a": 1 if last else tensors["a"]}, {}, {}, keep=2))
        expect("different names", lambda: save(folder, 2, {**tensors, **({"b": tensors["a"]} if last else {})}, {}, {}, keep=2))
        wrong = torch.zeros(4 if last else 3)
        expect("rank 1: 1 tensors have another shape", lambda: load(path, {**tensors, "a": wrong}))
        assert (find(folder) or [None])[0] == path
        with RunLock(folder):
            expect(f"pid {os.getpid()}" if not last else "in use by another job", lambda: RunLock(folder))
        RunLock(folder).release()
        save(folder, 2, tensors, {}, {}, keep=1)
        dist.barrier()
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000002"], list(folder.iterdir())
        assert isinstance(sharded(), FSDPModule)

    _in_group(body)


def lost_in_background(root: str, told: str) -> None:
    """Rank 3 dies in a save in the background. Rank 1 waits for it in vain, and the others wait for rank 1."""

    def die(*_: object) -> None:
        if dist.get_rank() == 3:
            os._exit(9)

    def body() -> None:
        write = store._Writer.write_data
        store._Writer.write_data = lambda *args: (die(), write(*args))[1]  # type: ignore[method-assign]
        writer, deadline = BackgroundSave(100), time.monotonic() + 60
        writer.save(Path(root), 1, {"w": fully_shard(torch.nn.Linear(8, 8)).weight}, {}, {}, 1)
        while dist.get_rank() != 1 and not Path(told).exists():
            assert time.monotonic() < deadline, "rank 1 still waits"
            time.sleep(0.02)
        try:
            writer.wait()
        except RuntimeError as error:
            Path(told).touch()
            assert "Connection" in str(error), error
        else:
            raise AssertionError("it was saved")
        os._exit(0)

    _in_group(body)


def full_disk(root: str) -> None:
    """Without a process group: the limit strikes in the tensors, then in an extra file."""
    folder, tensors = Path(root), {"w": torch.randn(1 << 16)}
    save(folder, 1, tensors, {}, {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limited, files in ((tensors, {}), ({"w": torch.zeros(1)}, {"config.toml": bytes(1 << 17)})):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            save(folder, 2, limited, {}, files, keep=2)
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print(sorted(p.name for p in folder.iterdir()))
    save(folder, 2, tensors, {}, {}, keep=2)


def killed_while_saving(root: str, rounds: str, seed: str) -> None:
    """Forks a child that saves without pause, kills it after a random time, looks at what is there; again and again."""
    folder, generator = Path(root), torch.Generator().manual_seed(int(seed))
    torch.set_num_threads(1)
    before = 0
    for _ in range(int(rounds)):
        child = os.fork()
        if child == 0:
            _save_for_ever(folder, before)
        while not (folder / f"step-{before + 1:08d}").exists():
            assert os.waitpid(child, os.WNOHANG)[0] == 0, "the child ended by itself"
            time.sleep(0.001)
        time.sleep(0.15 * torch.rand((), generator=generator).item())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = find(folder)
        assert found is not None
        path, manifest = found
        tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in tensor_info(path).items()}
        load(path, tensors)
        assert len(tensors) == 5 and all(bool((t == manifest.state["value"]).all()) for t in tensors.values())
        assert manifest.state["value"] // 2 == manifest.step > before, (manifest, before)
        assert (path / "note.txt").read_text() == str(manifest.step)
        print(manifest.step - before, ".old" in path.name, len(list(folder.glob(".tmp-*"))), len(list(folder.glob(".old-*"))))
        before = manifest.step


def _save_for_ever(folder: Path, step: int) -> None:
    """Each step twice, with another value: also a step that is replaced must be whole at any time."""
    try:
        while True:
            step += 1
            for again in range(2):
                tensors = {f"t{i}": torch.full((20_000,), float(2 * step + again)) for i in range(5)}
                save(folder, step, tensors, {"value": 2 * step + again}, {"note.txt": str(step).encode()}, keep=1)
    finally:
        os._exit(1)
