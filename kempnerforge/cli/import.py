"""``kempnerforge import``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kempnerforge.cli.progress import add_comparison, print_result, reporting
from kempnerforge.util.errors import InputError

HELP = """Make a run directory of a model that was trained elsewhere.

SOURCE is a directory with config.json and safetensors: a language model of transformers (Llama, SmolLM2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3,
Gemma 1 to 3), PaliGemma, LLaVA-1.5 (also under the names of its own code), Idefics3, SmolVLM, or nanoVLM; or a GGUF file of the Llama
architecture. Every tensor must have its place. The class of transformers and ours are run on the same batch, and the largest difference of
their logits is printed. OUT holds a checkpoint at step 0, the tokenizer, and a config to train on from it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="directory with config.json and safetensors, or a .gguf file")
    parser.add_argument("out", type=Path, help="directory to write; new or empty")
    parser.add_argument("--tokenizer", type=Path, help="directory with the tokenizer (default: SOURCE)")
    add_comparison(parser, no_verify="do not compare; it takes the memory of both models in fp32")


def run(args: argparse.Namespace) -> int:
    if args.overrides:
        raise InputError(f"import: {' '.join(args.overrides)}: not understood")
    from kempnerforge.convert.commands import import_model

    with reporting(sys.stderr) as progress:
        done = import_model(args.source, args.out, args.tokenizer, verify=not args.no_verify, tolerance=args.tolerance, progress=progress)
    print_result(done.path, done.difference, done.lines, args.json)
    return 0
