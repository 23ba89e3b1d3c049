"""``kempnerforge generate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """Ask a trained model about images.

Takes a checkpoint or run directory, images, and a prompt as in the training data (the template is added). Each image is asked about alone,
unless the prompt says where images stand: with "<image>" in it k times, k images at a time are asked about together. Greedy unless
--temperature is given. Text-only models take no image. Boxes and points that an answer holds (PaliGemma's <loc> tokens, Molmo's <point> tags) are
decoded: --json lists them as shares of width and height, --draw draws them."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Of the files that are taken from a folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("images", type=Path, nargs="*", help="image files, or folders of them")
    parser.add_argument("--prompt", default="", help="the question (default: empty, as for captions)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most (default: 64, or what the model has room for)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="PATH",
        help="write the image with the boxes and points of its answer on it; of several images, into a folder",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, boxes and points in it, instead of text as it is written"
    )


def run(args: argparse.Namespace) -> int:
    from kempnerforge.eval.codecs import decode
    from kempnerforge.eval.generate import Sampling
    from kempnerforge.training.answer import Answerer

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    images = [image for path in args.images for image in _images_at(path)]
    model = Answerer(args.checkpoint, args.overrides)
    groups = model.groups(args.prompt, images)
    places = _places(args.draw, groups)
    answers, failed = [], False
    for group, place in zip(groups, places, strict=True):
        names = [str(image) for image in group]
        found = {"image": names[0] if len(names) == 1 else None, "images": names, "prompt": args.prompt}
        if not args.json and len(groups) > 1:
            print(f"{', '.join(names)}: ", end="", flush=True)
        try:
            answer = model.ask(args.prompt, group, args.max_new_tokens, sampling)
            for piece in answer:
                if not args.json:
                    print(piece, end="", flush=True)
            marks = decode(answer.text)
            answers.append({**found, "answer": answer.text, **marks.to_json(), "drawn": _draw(group, answer.text, place)})
        except ValueError as error:
            if len(groups) == 1:
                raise
            failed = True
            answers.append({**found, "error": str(error)})
            print(f"error: {error}", file=sys.stderr)
        if not args.json:
            print()
    if args.json:
        print(json.dumps({"checkpoint": str(model.path), "answers": answers}))
    elif model.has_images and not images:
        print("note: no image was given; the model answered without one", file=sys.stderr)
    return 2 if failed else 0


def _images_at(path: Path) -> list[Path]:
    """``path``, or the images in the folder that it is, by name."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"{path}: has no files with {', '.join(SUFFIXES)}")
    return found


def _places(draw: Path | None, groups: Sequence[Sequence[Path]]) -> list[Path | None]:
    """Where each question's picture is written: ``draw`` itself for a single question, else a file of the image's name in that folder.

    Raises:
        ValueError: there is no image to draw on, a file is named for several, or two images have one name.
    """
    if draw is None:
        return [None] * len(groups)
    if not groups[0]:
        raise ValueError("--draw needs an image")
    if len(groups) == 1 and draw.suffix:
        return [draw]
    if draw.suffix and not draw.is_dir():
        raise ValueError(f"--draw {draw}: a file, and there are {len(groups)} questions; name a folder")
    names = [f"{group[0].stem}.png" for group in groups]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--draw {draw}: two images would be written to {draw / twice}")
    draw.mkdir(parents=True, exist_ok=True)
    return [draw / name for name in names]


def _draw(images: Sequence[Path], answer: str, place: Path | None) -> str | None:
    """Draws what ``answer`` marks on the first image; returns where, None if nothing was asked for."""
    if place is None:
        return None
    from kempnerforge.eval.draw import save_drawn

    save_drawn(images[0], answer, place)
    return str(place)
