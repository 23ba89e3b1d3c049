"""A text model in ``transformers.Trainer``: what most scripts around a class of transformers do, with the same weights, samples, batch size and
compute dtype as ``kempnerforge bench`` of the same config. It needs ``pip install accelerate``.

Usage: python benchmarks/hf_trainer.py CONFIG [--section.key=value ...] [--steps 10] [--warmup 5]

Prints a JSON object: median seconds of a step, and useful tokens a second (padding is not counted).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kempnerforge.config import load_config
from kempnerforge.convert.peer import TransformersLoop
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import SampleError
from kempnerforge.data.text.encode import Encoded
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import assemble


class Samples(torch.utils.data.Dataset[Encoded]):
    """The training samples that are not too long, encoded when they are asked for; of several texts the first."""

    def __init__(self, loop: TransformersLoop) -> None:
        self.source, self.encoder = loop.assembly.data.sources[0], loop.assembly.data.encoder(loop.stage)
        self.kept: list[int] = []
        for index in range(len(self.source)):
            with contextlib.suppress(SampleError):
                self.encoded(index)
                self.kept.append(index)

    def encoded(self, index: int) -> Encoded:
        sample = self.source[index]
        return self.encoder.encode(replace(sample, texts=sample.texts[:1]), 0)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Encoded:
        return self.encoded(self.kept[index])


class Watch(TrainerCallback):
    """When steps end, and how many useful tokens they had."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    args, overrides = parser.parse_known_args()
    job = load_config(args.config, overrides)
    assembly = assemble(job)
    initialise(assembly.model, assembly.tokenizer)
    dtype = compute_dtype(job.train.mixed_precision, torch.device("cpu"))
    loop, watch = TransformersLoop(assembly, assembly.stages[0], torch.device("cpu"), dtype), Watch()

    def batch(rows: list[Encoded]) -> dict[str, torch.Tensor]:
        made = collate(rows, assembly.tokenizer.pad_id, None)
        watch.tokens.append(made.useful_tokens)
        labels = torch.nn.functional.pad(made.labels, (1, 0), value=IGNORE)[:, :-1]  # the class shifts them itself
        return {"input_ids": made.input_ids, "labels": labels, "attention_mask": (made.sample_ids >= 0).long()}

    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(
            folder,
            max_steps=args.warmup + args.steps,
            per_device_train_batch_size=assembly.stages[0].train.step_rows,
            learning_rate=assembly.stages[0].optimizer.lr,
            optim="adamw_torch_fused",
            max_grad_norm=job.train.grad_clip_norm or 1.0,
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            seed=job.train.seed,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(loop.model, how, data_collator=batch, train_dataset=Samples(loop), callbacks=[watch]).train()
    times = [b - a for a, b in zip(watch.ends[args.warmup - 1 :], watch.ends[args.warmup :], strict=False)]
    tokens = watch.tokens[args.warmup : args.warmup + args.steps]
    print(json.dumps({"step_s": statistics.median(times), "tokens_per_s": sum(tokens) / sum(times)}))


if __name__ == "__main__":
    main()
