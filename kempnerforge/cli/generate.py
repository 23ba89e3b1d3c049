"""``kempnerforge generate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = """Ask a trained model about images.

Takes a checkpoint or run directory, images, and a prompt as in the training data (the template is added). Each image is asked about alone,
unless the prompt says where images stand: with "<image>" in it k times, k images at a time are asked about together. Greedy unless
--temperature is given. Text-only models take no image."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("images", type=Path, nargs="*", help="image files")
    parser.add_argument("--prompt", default="", help="the question (default: empty, as for captions)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most (default: 64, or what the model has room for)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, instead of text as it is written")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.eval.generate import Sampling
    from kempnerforge.training.answer import Answerer

    model = Answerer(args.checkpoint, args.overrides)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    answers = []
    groups = model.groups(args.prompt, args.images)
    for images in groups:
        names = [str(image) for image in images]
        if not args.json and len(groups) > 1:
            print(f"{', '.join(names)}: ", end="", flush=True)
        stream = None if args.json else lambda piece: print(piece, end="", flush=True)
        text = model.answer(args.prompt, images, args.max_new_tokens, sampling, stream)
        answers.append({"image": names[0] if len(names) == 1 else None, "images": names, "prompt": args.prompt, "answer": text})
        if not args.json:
            print()
    if args.json:
        print(json.dumps({"checkpoint": str(model.path), "answers": answers}))
    elif model.has_images and not args.images:
        print("note: no image was given; the model answered without one", file=sys.stderr)
    return 0
