"""Kills a training run again and again with SIGKILL, continues it each time, and compares the end with a run that was left alone.

Usage: python benchmarks/kill_resume.py OUT_DIR [--config CONFIG] [--kills 10] [--seed 0] [--reference RUN_DIR] [--section.key=value ...]

Prints each kill, then whether all tensors of the final checkpoints, weights and optimizer state, are bitwise equal. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from kempnerforge.checkpoint import load, resolve, tensor_info
from kempnerforge.util.metrics import read_metrics


def start(config: str, run_dir: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kempnerforge", "train", config, f"--run.dir={run_dir}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def last_step(run_dir: Path) -> int:
    return max(read_metrics(run_dir / "metrics.jsonl").rows, default=0)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    found = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensor_info(path).items()}
    load(path, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help="a run of the same config that was left alone (default: train one)")
    args, overrides = parser.parse_known_args()
    rng, run_dir, reference = random.Random(args.seed), args.out / "killed", args.reference or args.out / "reference"
    if args.reference is None and start(args.config, reference, overrides).wait():
        sys.exit("the reference run failed")
    total = last_step(reference)
    moments = sorted(rng.randrange(total) for _ in range(args.kills))  # steps near which it is killed, at any point of a step
    for number, moment in enumerate(moments, 1):
        process = start(args.config, run_dir, overrides)
        while last_step(run_dir) < moment and process.poll() is None:
            time.sleep(0.2)
        time.sleep(rng.random())
        assert process.poll() is None, "the run ended by itself"
        process.kill()
        process.wait()
        saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
        print(f"kill {number} at step {last_step(run_dir)}, checkpoints {saved}", flush=True)
    code = start(args.config, run_dir, overrides).wait()
    mine, theirs = tensors(run_dir), tensors(reference)
    different = [name for name in theirs if name not in mine or not torch.equal(mine[name], theirs[name])]
    equal = code == 0 and mine.keys() == theirs.keys() and not different
    print(f"exit code {code}; {len(theirs)} tensors of {resolve(run_dir).name}, different: {different or 'none'}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
