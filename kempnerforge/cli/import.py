"""``kempnerforge import``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = """Make a run directory of a model that was trained elsewhere.

SOURCE is a directory with config.json and safetensors: a language model of transformers (Llama, SmolLM2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3,
Gemma 1 to 3), PaliGemma, LLaVA-1.5, Idefics3, SmolVLM, or nanoVLM; or a GGUF file of the Llama architecture. Every tensor must have its place.
The class of transformers and ours are run on the same batch, and the largest difference of their logits is printed. OUT holds a checkpoint
at step 0, the tokenizer, and a config to train on from it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="directory with config.json and safetensors, or a .gguf file")
    parser.add_argument("out", type=Path, help="directory to write; new or empty")
    parser.add_argument("--tokenizer", type=Path, help="directory with the tokenizer (default: SOURCE)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of the largest difference, in units of the largest logit (default: 1e-4)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare; it takes the memory of both models in fp32")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.overrides:
        raise ValueError(f"import: {' '.join(args.overrides)}: not understood")
    from kempnerforge.cli.progress import reporting
    from kempnerforge.training.convert import import_model

    with reporting(sys.stderr) as progress:
        done = import_model(args.source, args.out, args.tokenizer, verify=not args.no_verify, tolerance=args.tolerance, progress=progress)
    if args.json:
        print(json.dumps({"path": str(done.path), "difference": done.difference, "notes": done.lines}))
    else:
        print("\n".join([*done.lines, f"written: {done.path}"]))
    return 0
