"""What the trainer costs: a step of a config by the trainer with all its hooks, against the same model in a bare PyTorch loop.

The bare loop has no FSDP, no hooks, no logging, no counting: autocast, backward, clip_grad_norm_, optimizer. It gets the same batches from
the same loader. Both run in turns in one process; the figures are medians over all steps, and their ratio.

Usage: python benchmarks/step_overhead.py [CONFIG] [--rounds 6] [--steps 20]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from kempnerforge.util.process import tune_memory

tune_memory()

import torch  # noqa: E402

from kempnerforge.config import RunConfig, Stage, load_config  # noqa: E402
from kempnerforge.config.optimizer import AdamWConfig  # noqa: E402
from kempnerforge.data.batching.batch import Batch  # noqa: E402
from kempnerforge.distributed import world as worlds  # noqa: E402
from kempnerforge.distributed.world import compute_dtype  # noqa: E402
from kempnerforge.training.hooks import default_hooks  # noqa: E402
from kempnerforge.training.optimizers.muon import Muon, MuonRule  # noqa: E402
from kempnerforge.training.setup import Assembly, assemble  # noqa: E402
from kempnerforge.training.trainer import Trainer  # noqa: E402


def bare_step(assembly: Assembly, stage: Stage, dtype: torch.dtype, muon_class: type) -> Callable[[], None]:
    """One step of the plain loop."""
    model, cfg = assembly.model, stage.optimizer
    assert isinstance(cfg, AdamWConfig)
    batches: Iterator[Batch] = assembly.data.batches(stage, stage.start)
    named = dict(model.named_parameters())
    to_muon = MuonRule().takes(model) if cfg.name == "muon" else frozenset()
    extra = {"adjust_lr_fn": "original"} if muon_class is not Muon else {}
    optimizers: list[torch.optim.Optimizer] = []
    if to_muon:
        optimizers.append(muon_class([named[n] for n in sorted(to_muon)], lr=cfg.muon_lr, momentum=cfg.muon_momentum, **extra))
    rest = [p for n, p in named.items() if n not in to_muon]
    optimizers.append(torch.optim.AdamW(rest, lr=cfg.lr, betas=cfg.betas, fused=True))

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(batch).loss / batch.num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def trainer_step(trainer: Trainer) -> Callable[[], None]:
    def step() -> None:
        result = trainer.train_step()
        trainer.step += 1
        for hook in trainer.hooks:
            hook.step(trainer, result)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    job = load_config(args.config, ["--eval.interval=0", "--eval.at_end=false"])
    world = worlds.start(job.distributed)
    dtype = compute_dtype(job.train.mixed_precision, world.device)
    with tempfile.TemporaryDirectory() as folder:
        for stage in job.resolved_stages():
            run_dir = Path(folder) / stage.name
            assembly = assemble(replace(job, run=RunConfig(str(run_dir))))
            assembly.tokenizer.save(run_dir / "tokenizer")
            hooks, _ = default_hooks(assembly, run_dir)
            trainer = Trainer(assembly, world, hooks)
            trainer.step = stage.start
            for hook in hooks:
                hook.start(trainer)
            trainer.apply_freeze()
            runs = {
                "trainer": trainer_step(trainer),
                "bare, torch.optim.Muon": bare_step(assemble(job), stage, dtype, torch.optim.Muon),
                "bare, our Muon": bare_step(assemble(job), stage, dtype, Muon),
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for round_ in range(args.rounds + 1):  # the first round warms up
                for name, step in runs.items():
                    for _ in range(args.steps):
                        begin = time.perf_counter()
                        step()
                        if round_:
                            times[name].append(time.perf_counter() - begin)
            for hook in hooks:
                hook.close()
            mine = statistics.median(times["trainer"])
            for name, values in times.items():
                median = statistics.median(values)
                print(f"{stage.name:12s} {name:24s} {median * 1e3:8.1f} ms   trainer / this = {mine / median:.3f}", flush=True)
    worlds.stop()


if __name__ == "__main__":
    main()
