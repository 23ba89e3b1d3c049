"""A plugin that breaks one rank of a real job. The variable ``FAULTS`` says what happens where: ``{"1": [["hang", 7]]}`` hangs rank 1 in step 7.

Steps count from 0, as ``trainer.step``; in saves they are the steps that are done.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kempnerforge.checkpoint import store
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed import world
from kempnerforge.training.hooks import evaluation, report
from kempnerforge.training.optimizer import Optimizers
from kempnerforge.training.trainer import Trainer
from tests.training.tiny import plain

FAULTS: dict[str, Callable[..., None]] = {}


def fault(install: Callable[..., None]) -> Callable[..., None]:
    FAULTS[install.__name__] = install
    return install


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """``act`` with the arguments of ``owner.name``, each time before it runs."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def at_step(step: int, act: Callable[[Trainer], None]) -> None:
    """``act`` when the batches of ``step`` are asked for, once."""
    done: list[int] = []

    def look(trainer: Trainer) -> None:
        if trainer.step == step and not done:
            done.append(step)
            act(trainer)

    before(Trainer, "next_batches", look)


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- a rank stops ----------------------------------------------------------------------------------------------------


@fault
def hang(step: int) -> None:
    at_step(step, lambda trainer: time.sleep(1000))


@fault
def hang_holding_the_interpreter(step: int) -> None:
    at_step(step, lambda trainer: ctypes.PyDLL(None).sleep(1000))


@fault
def die(step: int) -> None:
    at_step(step, kill_self)


@fault
def never_come() -> None:
    """Before the ranks have met."""
    kill_self()


@fault
def leave(step: int, code: int) -> None:
    at_step(step, lambda trainer: os._exit(code))


@fault
def raise_in_forward(step: int) -> None:
    def broken(trainer: Trainer) -> None:
        def hook(*_: object) -> None:
            raise RuntimeError("a broken layer")

        trainer.model.get_submodule("adapter").register_forward_pre_hook(hook)

    at_step(step, broken)


@fault
def signals(step: int, *numbers: int) -> None:
    """The process sends itself signals at the beginning of a step."""

    def send(trainer: Trainer) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    at_step(step, send)


@fault
def signal_later(step: int, number: int, seconds: float) -> None:
    """From a thread, ``seconds`` after the beginning of a step."""
    at_step(step, lambda trainer: threading.Timer(seconds, os.kill, (os.getpid(), number)).start())


@fault
def signal_behind_the_run(number: int) -> None:
    """When all is saved and the process is about to end."""
    before(world, "stop", lambda: os.kill(os.getpid(), number))


@fault
def wait_for(step: int, path: str) -> None:
    """Until there is a file ``path``."""

    def wait(trainer: Trainer) -> None:
        while not Path(path).exists():
            time.sleep(0.01)

    at_step(step, wait)


@fault
def signal_in_save(step: int, *numbers: int) -> None:
    def send(writer: Any, *_: Any) -> None:
        for number in numbers if _step_of(Path(writer.path)) == step else ():
            os.kill(os.getpid(), number)

    before(store._Writer, "write_data", send)


@fault
def signal_in_evaluation(step: int, number: int, votes: int) -> None:
    """When ``step`` steps are done, after so many tokens of their evaluation; at step 24 of the last one."""
    seen = {"votes": 0}

    def send(ranks: evaluation.Voting, _: object) -> None:
        if ranks.trainer.step == step:
            seen["votes"] += 1
            if seen["votes"] == votes:
                os.kill(os.getpid(), number)

    before(evaluation.Voting, "sum", send)


@fault
def signal_in_report(number: int) -> None:
    before(report.Report, "finish", lambda *_: os.kill(os.getpid(), number))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@fault
def nan_gradient(*steps: int) -> None:
    """One entry of this rank's gradient of the adapter."""

    def poison(trainer: Trainer) -> None:
        weight = trainer.model.get_parameter("adapter.proj.weight")
        weight.register_post_accumulate_grad_hook(lambda p: plain(p.grad).view(-1)[3].fill_(torch.nan) if trainer.step in steps else None)

    before(Trainer, "fit", poison)


@fault
def nan_loss(*steps: int) -> None:
    def poison(trainer: Trainer) -> None:
        forward = trainer.model.forward

        def spoiled(*args: Any) -> Any:
            out = forward(*args)
            return out._replace(loss=out.loss * torch.nan) if trainer.step in steps else out

        trainer.model.forward = spoiled  # type: ignore[method-assign]

    before(Trainer, "fit", poison)


@fault
def spoil(step: int, what: str) -> None:
    """The update of ``step`` leaves an infinite entry in a weight of this rank, or in a second moment."""

    def act(optimizers: Optimizers) -> None:
        for optimizer in optimizers.all:
            for parameter, state in optimizer.state.items():
                if now["step"] == step and parameter.requires_grad:
                    tensor = parameter if what == "weight" else state["exp_avg_sq"]
                    plain(tensor.detach()).view(-1)[:1] = torch.inf
                    return

    now = {"step": -1}
    before(Trainer, "train_step", lambda trainer: now.update(step=trainer.step))
    before(Optimizers, "zero_grad", act)


@fault
def mask(steps: list[int], which: int) -> None:
    """Nothing is trained in micro-batch ``which`` of the ``steps``."""
    original = Trainer.next_batches

    def masked(trainer: Trainer) -> list[Batch]:
        batches = original(trainer)
        if trainer.step in steps:
            batch = batches[which]
            batches[which] = replace(batch, targets=batch.targets[:0], labels=torch.full_like(batch.labels, -100))
        return batches

    Trainer.next_batches = masked  # type: ignore[method-assign]


# ---- saving ----------------------------------------------------------------------------------------------------------


def _step_of(tmp: Path) -> int:
    return int(tmp.name.split("-")[1])


@fault
def limit_files(step: int, size: int) -> None:
    """From ``step`` on no file may grow beyond ``size`` bytes."""
    at_step(step, lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


@fault
def no_space(step: int, where: str) -> None:
    """The disk is full when the tensors, or the manifest, of ``step`` are written."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "tensors":
        before(store._Writer, "write_data", lambda writer, *rest: full() if _step_of(Path(writer.path)) == step else None)
    else:
        before(store, "_write_file", lambda path, data: full() if path.name == where and _step_of(path.parent) == step else None)


@fault
def kill_in_save(step: int, where: str) -> None:
    """kill -9 at a point of the save of ``step``: before and after the tensors, before the manifest, before and after the rename, after
    ``latest``, and while an old step is removed.
    """
    now = {"step": False}
    before(store, "_write", lambda tmp, *rest: now.update(step=_step_of(tmp) == step))
    owner, name = {
        "before the tensors": (store._Writer, "write_data"),
        "after the tensors": (store, "checksum"),
        "before the manifest": (store, "_finish"),
        "before the rename": (store, "_sync_directory"),
        "after the rename": (store, "_tidy"),
        "after latest": (store, "_candidates"),
        "while pruning": (shutil, "rmtree"),
    }[where]

    def kill(*args: Any, **_: Any) -> None:
        late = where != "before the rename" or (args[0] / "manifest.json").exists()
        if now["step"] and late:
            kill_self()

    before(owner, name, kill)


@fault
def die_behind_the_metrics(step: int) -> None:
    """Between the line of metrics.jsonl and the checkpoint of ``step``."""
    from kempnerforge.training.hooks import Checkpoints

    before(Checkpoints, "step", lambda hook, trainer, result: kill_self() if trainer.step == step else None)


@fault
def die_behind_the_checkpoint(step: int) -> None:
    """After the checkpoint of ``step``, before anything else."""
    before(Trainer, "train_step", lambda trainer: kill_self() if trainer.step == step else None)


for _name, *_args in json.loads(os.environ.get("FAULTS") or "{}").get(os.environ.get("RANK", ""), []):
    FAULTS[_name](*_args)
