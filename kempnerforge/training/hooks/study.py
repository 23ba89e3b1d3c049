"""Records what a study reads of a run in addition to its scores: the cost and the samples of each step, the
initial weights, and each answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import model_tensors
from kempnerforge.config import HookConfig, registry
from kempnerforge.eval.answers import ask
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.hooks.diagnosis import peak_memory_gib
from kempnerforge.training.hooks.evaluation import Evaluation, Interrupted, Voting
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text

INITIAL, PREDICTIONS = "initial.json", "predictions.jsonl"
TIMED = 16
"""Questions that are asked one by one."""


@registry.register_hook_config
@dataclass
class StudyHookConfig(HookConfig):
    """Records what a comparison of runs needs. ``kempnerforge study`` puts it into the config of each cell.

    In each step's line of ``metrics.jsonl``: ``study/samples``, ``study/trained_tokens``, ``study/flops``
    (forward and backward, counted by torch on the meta device, vision tower included) and
    ``study/sample_ids`` (the sum of 32-bit hashes of the ids of the step's samples). In the last one
    ``study/peak_memory_gib`` and ``study/latency_s``, the median time to answer one question alone. Beside it
    ``initial.json``: a digest of each parameter before the first step; and ``predictions.jsonl``, as
    ``kempnerforge eval --predictions`` writes it, of the evaluation at the end.
    """

    type: str = "study"


@registry.register_hook("study")
class StudyHook(Hook):
    def __init__(self, cfg: StudyHookConfig, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._flops: TrainingFlops | None = None

    def start(self, trainer: Trainer) -> None:
        self._flops = TrainingFlops(trainer.assembly.job)
        if trainer.step == 0:
            found = {name: _digest(tensor) for name, tensor in model_tensors(trainer.model).items()}
            if trainer.world.is_main:
                write_text(self.run_dir / INITIAL, json.dumps(found, indent=0) + "\n")

    def step(self, trainer: Trainer, result: StepResult) -> None:
        data, flops = trainer.data, self._flops
        assert data is not None and flops is not None
        trainable = trainer.freeze.trainable(trainer.step - 1)
        flops_here = float(sum(flops.count(batch, trainable) for batch in data.batches))
        ids = float(sum(hash_of(name) for batch in data.batches for name in batch.sample_names))
        total, seen = trainer.sum(trainer.world.once([flops_here, ids], of_batch=True))
        trainer.record(
            {
                "study/samples": float(data.counts.samples),
                "study/trained_tokens": float(data.counts.targets),
                "study/flops": total,
                "study/sample_ids": seen,
            }
        )

    def finish(self, trainer: Trainer) -> None:
        trainer.record({"study/peak_memory_gib": max(trainer.world.gather(peak_memory_gib(trainer.world.device)))})
        if seconds := _latencies(trainer):
            trainer.record({"study/latency_s": median(seconds)})
        final, held_out = next(hook for hook in trainer.hooks if isinstance(hook, Evaluation)).final, trainer.assembly.data.examined
        if trainer.world.is_main and final.tasks and held_out is not None:
            write_predictions(self.run_dir / PREDICTIONS, final, held_out.skipped)


def _latencies(trainer: Trainer) -> list[float]:
    """Seconds to answer each of a few held-out questions, one after another; the first one warms up."""
    exam = trainer.assembly.exam(Voting(trainer), trainer.world.device)
    asked = exam.held_out.draw(1 + TIMED, exam.encoder.seed) if exam.held_out is not None and exam.cfg.at_end else {}
    seconds = []
    try:
        for number, question in asked.items():
            begin = time.perf_counter()
            ask(exam, {number: question})
            seconds.append(time.perf_counter() - begin)
    except (Interrupted, InputError):  # asked to stop; or an image cannot be read, which the evaluation has said
        return []
    return seconds[1:]


def hash_of(sample: str) -> int:
    """32 bits of a sample's id: sums over a step of at most 2^20 samples are exact in float64."""
    return int.from_bytes(hashlib.blake2b(sample.encode("utf-8", "surrogatepass"), digest_size=4).digest())


def _digest(tensor: torch.Tensor) -> str:
    """The shape, and 16 hex digits of the values; of a sharded one on all ranks together."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    values = whole.detach().cpu().contiguous().reshape(-1)
    return f"{tuple(whole.shape)} {hashlib.blake2b(values.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()}"
