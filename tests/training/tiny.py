"""A dataset of sixteen tiny pictures, a config that trains on it in seconds, and ways to run the command line on them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import load, model_tensors, resolve, tensor_info
from kempnerforge.cli.main import run
from kempnerforge.config import JobConfig, OptimizerConfig, SchedulerConfig, registry
from kempnerforge.distributed import world as worlds
from kempnerforge.training.optimizer import Optimizers
from kempnerforge.training.setup import assemble
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.vlm.base import VLM
from tests.dist import ROOT, run_ranks
from tests.processes import Forked, run_module

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "yellow": (230, 210, 60)}
TIMING = ("train/tokens_per_s", "train/images_per_s", "train/step_s", "train/elapsed_s")
"""Keys of metrics.jsonl that differ between two runs of the same job."""

CONFIG = """\
[run]
dir = "{folder}/run"

[model]
dim = 32
n_layers = 2
n_heads = 2
activation = "gelu"
max_seq_len = 64

[vision_encoder]
type = "vit"
image_size = 16
patch_size = 8
dim = 32
n_layers = 2
n_heads = 2

[adapter]
type = "linear"

[vlm]
arch = "joint_decoder"
freeze = []
max_text_len = 48

[data]
source = "jsonl"
path = "{folder}/train.jsonl"
eval_path = "{folder}/test.jsonl"
prompt_column = "prompt"
tokenizer_vocab_size = 300

[train]
max_steps = 6
batch_size = 4
seq_len = 64
mixed_precision = "fp32"

[optimizer]
lr = 2e-3

[checkpoint]
interval = 2

[metrics]
interval = 1
tensorboard = false
"""


def scheduler_config(name: str, **keys: float) -> SchedulerConfig:
    """The ``[scheduler]`` section of that name."""
    return registry.schedules.get(name)(**keys)


def optimizer_config(name: str, **keys: Any) -> OptimizerConfig:
    """The ``[optimizer]`` section of that name."""
    return registry.optimizer_configs.get(name)(**keys)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(folder: Path, count: int = 16) -> list[dict[str, Any]]:
    """``count`` rows, each with a picture of its own whose halves have a colour each; a question asks for one of them."""
    names = list(COLOURS)
    rows = []
    for k in range(count):
        left, right = names[k % 4], names[k // 4 % 4]
        picture = Image.new("RGB", (16, 16), COLOURS[left])
        picture.paste(COLOURS[right], (8, 0, 16, 16))
        picture.putpixel((0, 0), (k, k, k))
        picture.save(folder / f"{k}.png")
        side = ("left", "right")[k % 2]
        rows.append({"image": f"{k}.png", "prompt": f"what is on the {side}?", "answer": (left, right)[k % 2]})
    return rows


def make_job(folder: Path, *, config: str = CONFIG, extra: str = "") -> Path:
    """Writes the dataset and ``config`` into ``folder``; returns the TOML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(folder)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[::2])
    return write_config(folder, config=config, extra=extra)


def write_config(folder: Path, name: str = "job.toml", *, config: str = CONFIG, extra: str = "") -> Path:
    path = folder / name
    path.write_text(config.replace("{folder}", str(folder)) + extra, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*argv: object) -> Ended:
    """The command in this process. An exception that the command line lets through comes out here, too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run([str(word) for word in argv])
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def start(*argv: object, **env: str) -> Forked:
    """The command in a process of its own."""
    return Forked(run_module, ("kempnerforge", [str(word) for word in argv]), environment(**env))


def launch(*argv: object, module: Sequence[str] = ("kempnerforge",), **env: str) -> subprocess.Popen[str]:
    """As ``start``, in a new interpreter, as a user starts it."""
    command = [sys.executable, "-m", *module, *map(str, argv)]
    return subprocess.Popen(command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: Forked | subprocess.Popen[str], timeout: float = 120) -> Ended:
    """Waits for it; what takes longer than ``timeout`` seconds fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"pid {process.pid} took more than {timeout} s:\n{err[-3000:]}") from None
    return Ended(process.wait(), out, err)


def spawn(*argv: object, timeout: float = 120, **env: str) -> Ended:
    """``start``, then wait."""
    return end_of(start(*argv, **env), timeout)


def two_ranks(*argv: object, timeout: float = 120) -> Ended:
    """The command on two ranks, in the environment that ``torchrun`` gives; its code is the first that is not 0."""
    ended = run_ranks("from kempnerforge.cli.main import main; main()", 2, *argv, timeout=timeout)
    code = next((one.returncode for one in ended if one.returncode), 0)
    return Ended(code, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended))


def metrics(run_dir: Path, *, timing: bool = False) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, those keys left out that no two runs share unless ``timing``."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows if timing else [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def losses(run_dir: Path) -> list[float]:
    """Training loss by step."""
    return [row["train/loss"] for row in metrics(run_dir) if "train/loss" in row]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint (the newest of a run), model and optimizer."""
    found = resolve(path)
    values = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_info(found).items()}
    load(found, values)
    return values


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bitwise equality, name by name."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


@contextlib.contextmanager
def a_trainer(job: JobConfig, hooks: Sequence[Hook] = ()) -> Iterator[Trainer]:
    """A trainer of ``job`` in a world of one, without a run directory."""
    world = worlds.start(job.distributed)
    try:
        yield Trainer(assemble(job), world, hooks)
    finally:
        worlds.stop()


class Recorder(Hook):
    """Keeps what the trainer tells its hooks.

    Args:
        prepare: called before the first step.
    """

    def __init__(self, prepare: Callable[[Trainer], object] | None = None) -> None:
        self.prepare = prepare
        self.results: list[StepResult] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.closed = False

    def start(self, trainer: Trainer) -> None:
        if self.prepare is not None:
            self.prepare(trainer)
        self.weights.append(weights_of(trainer))

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self.results.append(result)
        self.weights.append(weights_of(trainer))

    def close(self) -> None:
        self.closed = True


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole."""
    return {name.removeprefix("model."): plain(value).clone() for name, value in model_tensors(trainer.model).items()}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; in a world of one that is all of it."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def optimizers_of(job: JobConfig, model: VLM) -> Optimizers:
    assert job.vlm is not None
    return Optimizers(model, job.resolved_stages(), job.vlm.module_patterns)


def random_tensors(shapes: Iterable[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]
