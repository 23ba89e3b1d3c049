"""``kempnerforge generate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.asking import add_sampling, sampling_of
from kempnerforge.util.errors import InputError, visible
from kempnerforge.util.process import answer_stream

if TYPE_CHECKING:
    from kempnerforge.eval.masks import MaskDecoder

HELP = """Ask a trained model about images.

Takes a checkpoint, run or export, images, and a prompt as in the training data (the template is added; a directory of transformers takes
the text as its processor does, with its token for an image). Each image is asked about alone,
unless the prompt says where images are: with "<image>" in it k times, k images at a time are asked about together. Greedy unless
--temperature is given. Text-only models take no image. Boxes and points that an answer holds (PaliGemma's <loc> tokens, Molmo's <point> tags) are
decoded: --json lists them as shares of width and height, --draw draws them, never on the files that are asked about."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory, export, or directory of transformers")
    parser.add_argument("images", type=Path, nargs="*", help="image files, or folders of them")
    parser.add_argument("--prompt", default="", help="the question (default: empty, as for captions)")
    add_sampling(parser)
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="PATH",
        help="write the image with the boxes and points of its answer on it; of several images, into a folder",
    )
    parser.add_argument(
        "--mask-decoder", type=Path, metavar="FILE", help="decoder of PaliGemma's <seg> codes, vae-oid.npz: draw their masks, too"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, boxes and points in it, instead of text as it is written"
    )


def run(args: argparse.Namespace) -> int:
    from kempnerforge.eval.codecs import decode
    from kempnerforge.inference.model import TrainedModel

    sampling = sampling_of(args)
    decoder = _mask_decoder(args)
    images = [image for path in args.images for image in _images_at(path)]
    model = TrainedModel.open(args.checkpoint, args.overrides)
    groups = model.groups(args.prompt, images)
    places = _places(args.draw, groups, images)
    answers, failed, out = [], False, answer_stream()
    for group, place in zip(groups, places, strict=True):
        names = [str(image) for image in group]
        found = {"image": names[0] if len(names) == 1 else None, "images": names, "prompt": args.prompt}
        if not args.json and len(groups) > 1:
            print(f"{visible(', '.join(names))}: ", end="", flush=True, file=out)
        try:
            answer = model.ask(args.prompt, group, args.max_new_tokens, sampling)
            for piece in answer:
                if not args.json:
                    print(piece, end="", flush=True, file=out)
            marks = decode(answer.text)
            answers.append({**found, "answer": answer.text, **marks.to_json(), "drawn": _draw(group, answer.text, place, decoder)})
        except InputError as error:
            if len(groups) == 1:
                raise
            failed = True
            answers.append({**found, "error": str(error)})
            print(f"error: {visible(str(error))}", file=sys.stderr)
        if not args.json:
            print(file=out)
    if args.json:
        print(json.dumps({"checkpoint": str(model.path), "answers": answers}))
    elif model.has_images and not images:
        print("note: no image was given; the model answered without one", file=sys.stderr)
    return 2 if failed else 0


def _images_at(path: Path) -> list[Path]:
    """``path``, or the images in the folder that it is, by name; hidden files are none."""
    from kempnerforge.eval.draw import SUFFIXES

    if not path.is_dir():
        return [path]
    shown = (file for file in path.iterdir() if not file.name.startswith("."))
    found = sorted(file for file in shown if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise InputError(f"{path}: has no files with {', '.join(SUFFIXES)}")
    return found


def _places(draw: Path | None, groups: Sequence[Sequence[Path]], images: Sequence[Path]) -> list[Path | None]:
    """Where each question's picture is written: ``draw`` itself for a single question, else a file of the
    image's name in that folder.

    Raises:
        ValueError: there is no image to draw on, a file is named for several, two images have one name, or a
            file cannot be written there or is one of ``images``.
    """
    from kempnerforge.eval.draw import check_place

    if draw is None:
        return [None] * len(groups)
    if not groups[0]:
        raise InputError("--draw needs an image")
    places = [draw]
    if not draw.suffix or draw.is_dir():
        places = [draw / f"{group[0].stem}.png" for group in groups]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise InputError(f"--draw {draw}: two images would be written to {twice}")
        draw.mkdir(parents=True, exist_ok=True)
    elif len(groups) > 1:
        raise InputError(f"--draw {draw}: a file, and there are {len(groups)} questions; name a folder")
    for place in places:
        check_place(place, images)
    return [*places]


def _mask_decoder(args: argparse.Namespace) -> MaskDecoder | None:
    """Raises InputError if the file cannot be used, or nothing is drawn."""
    if args.mask_decoder is None:
        return None
    if args.draw is None:
        raise InputError("--mask-decoder: only --draw reads it")
    from kempnerforge.eval.masks import load_mask_decoder

    return load_mask_decoder(args.mask_decoder)


def _draw(images: Sequence[Path], answer: str, place: Path | None, decoder: MaskDecoder | None) -> str | None:
    """Draws what ``answer`` marks on the first image; returns where, None if nothing was asked for."""
    if place is None:
        return None
    from kempnerforge.eval.draw import save_drawn

    save_drawn(images[0], answer, place, decoder)
    return str(place)
