"""``kempnerforge export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kempnerforge.cli.progress import add_comparison, print_result, reporting
from kempnerforge.util.errors import InputError

HELP = """Write a trained model for others to load.

"--format hf" writes what a class of transformers loads: config.json, safetensors under the names of files on the hub, tokenizer, processor. It
is loaded again on the spot, and the largest difference of its logits to ours is printed. Averaged weights are taken where there are any,
LoRA adapters are folded in, new tokens become rows of the embedding. A model that no class of transformers is goes out with "--format
kempnerforge": safetensors and config.toml, which kempnerforge.load_pretrained reads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("out", type=Path, help="directory to write; new or empty")
    parser.add_argument("--format", default="hf", choices=("hf", "kempnerforge"), help="default: hf")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the weights (default: fp32)")
    parser.add_argument("--family", help="of a language model in transformers, such as mistral (default: the first that fits)")
    add_comparison(parser, no_verify="do not load what was written; it takes the memory of both models in fp32")


def run(args: argparse.Namespace) -> int:
    if other := [word for word in args.overrides if not word.startswith("--plugins=")]:
        raise InputError(f"export: {' '.join(other)}: not understood")
    from kempnerforge.convert.commands import export_model

    with reporting(sys.stderr) as progress:
        done = export_model(
            args.checkpoint,
            args.out,
            args.format,
            args.family,
            dtype=args.dtype,
            verify=not args.no_verify,
            tolerance=args.tolerance,
            progress=progress,
            moved=args.overrides,
        )
    print_result(done.path, done.difference, done.lines, args.json)
    return 0
