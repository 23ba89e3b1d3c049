"""A staged job on a few gloo ranks, started many times."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.dist import free_port
from tests.processes import fork_server
from tests.training.tiny import CONFIG, Ended, checkpoint_steps, make_job, metrics

STEPS = 24
STAGES = """
[[stages]]
name = "align"
steps = 6
freeze = [{ module = "vision_encoder" }, { module = "transformer" }]

[[stages]]
name = "language"
steps = 6
train.batch_size = 6
freeze = [{ module = "vision_encoder" }]

[[stages]]
name = "vision"
steps = 6
optimizer.lr = 1e-3
optimizer.moments = "reset"
freeze = [{ module = "transformer" }, { module = "transformer.layers.1.*", frozen = false }]

[[stages]]
name = "all"
steps = 6
scheduler.warmup_steps = 2
data.batching = "pad"
freeze = []
"""
"""Each part is frozen and thawed; batch size, learning rate, batching and moments change."""

Faults = Mapping[int, Sequence[Sequence[Any]]]


def staged_job(folder: Path) -> Path:
    """Four stages of 6 steps with dropout, an evaluation before each change, a checkpoint every second step; ``inject`` is its plugin."""
    config = CONFIG.replace("n_layers = 2", "n_layers = 2\ndropout = 0.1", 1).replace("max_steps = 6", "max_steps = 0")
    config = config.replace("interval = 2", "interval = 2\nkeep_last_n = 20")
    config += "\n[eval]\ninterval = 6\nsamples = 2\nmax_new_tokens = 2\nblind = false\n\n[distributed]\ntimeout_s = 60\n"
    return make_job(folder, config=f'plugins = ["tests.faults.inject"]\n{config}', extra=STAGES)


def rank_main(rank: int, world: int, port: int, argv: Sequence[str], faults: str, log: str) -> None:
    """What a rank's process runs: the console script, in the environment that ``torchrun`` gives."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FAULTS": faults}
    os.environ.update({key: str(value) for key, value in where.items()})
    sys.argv = ["kempnerforge", *argv]
    from kempnerforge.cli.main import main

    main()


class Ranks:
    """The ranks of ``kempnerforge ARGV``, running. Leaving a ``with`` block kills what is left of them.

    Args:
        logs: a folder for what they write.
        faults: of ``inject``, by rank.
    """

    def __init__(self, logs: Path, *argv: object, faults: Faults | None = None, world: int = 2) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        begun = len(list(logs.glob("*.rank0.err")))
        self._logs = [f"{logs}/{begun:03d}.rank{rank}" for rank in range(world)]
        text = json.dumps({rank: list(listed) for rank, listed in (faults or {}).items()})
        port, words = free_port(), [str(word) for word in argv]
        self.processes: list[ForkServerProcess] = []
        for rank, log in enumerate(self._logs):
            Path(f"{log}.err").touch()
            self.processes.append(fork_server().Process(target=rank_main, args=(rank, world, port, words, text, log), daemon=True))
            self.processes[-1].start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        found = self.processes[rank].pid
        assert found is not None
        return found

    def send(self, rank: int, number: signal.Signals) -> None:
        if self.processes[rank].is_alive():
            os.kill(self.pid(rank), number)

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_for(self, there: Callable[[], bool], timeout: float = 60) -> None:
        """Until ``there()`` or a rank has ended."""
        deadline = time.monotonic() + timeout
        while self.running and not there():
            assert time.monotonic() < deadline, self.err()
            time.sleep(0.005)

    def wait(self, timeout: float = 90) -> list[Ended]:
        """Until all have ended; a rank that takes longer than ``timeout`` seconds is killed, which ends it with -9."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [Ended(p.exitcode or 0, _read(f"{log}.out"), _read(f"{log}.err")) for p, log in zip(self.processes, self._logs, strict=True)]

    def err(self) -> str:
        """What all of them have said."""
        return "\n".join(f"---- rank {rank}\n{_read(f'{log}.err')}" for rank, log in enumerate(self._logs))


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""


def codes(ended: Sequence[Ended]) -> list[int]:
    return [one.code for one in ended]


def lines(run: Path) -> int:
    """Of metrics.jsonl, so far."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def newest(run: Path) -> int:
    """The step of its newest checkpoint; 0 without one."""
    return max(checkpoint_steps(run), default=0)


def last_line(run: Path) -> int:
    """The step of the last complete line of metrics.jsonl."""
    return metrics(run)[-1]["step"] if lines(run) else 0  # type: ignore[return-value]
