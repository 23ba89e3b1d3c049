"""``kempnerforge report``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kempnerforge.util.errors import InputError, visible
from kempnerforge.util.paths import place_of

HELP = """Draw the loss and score curves of runs as figures for a paper.

Takes run directories, finished or not, each as DIRECTORY or NAME=DIRECTORY. One run gives a figure for each curve of its report; several
give a figure for each value, with a line for each run. --pdf writes files with embedded fonts, --png 300 dots an inch. It needs matplotlib:
pip install "kempnerforge[paper]". The page report.html of a run is written by training."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or NAME=DIRECTORY")
    parser.add_argument("--pdf", type=Path, metavar="DIR", help="write PDF files there")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write PNG files there")
    parser.add_argument("--over", choices=("steps", "seconds"), default="steps", help="the x axis (default: steps)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.pdf is None and args.png is None:
        raise InputError("nothing to write: give --pdf DIR or --png DIR")
    places = places_of(args.runs)
    from kempnerforge.report.figures import save
    from kempnerforge.training.figures import figures_of, read_run

    runs = {name: read_run(place) for name, place in places.items()}
    for name, one in runs.items():
        if one.metrics.unreadable:
            print(f"warning: {visible(name)}: {one.metrics.unreadable} unreadable lines of its metrics are left out", file=sys.stderr)
    written = []
    for name, figure in figures_of(runs, args.over):
        for folder, suffix in ((args.pdf, "pdf"), (args.png, "png")):
            if folder is not None:
                written.append(save(figure, folder / f"{name}.{suffix}"))
    if not written:
        raise InputError(f"{', '.join(args.runs)}: no values to draw over {args.over} yet")
    print(
        json.dumps({"written": [str(path) for path in written]})
        if args.json
        else "\n".join(f"written: {visible(str(path))}" for path in written)
    )
    return 0


def places_of(words: list[str]) -> dict[str, Path]:
    """The directory of each run by its name: as given, or as the directory is called.

    Raises:
        InputError: two runs have the same name.
    """
    places: dict[str, Path] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        given = bool(name and equals) and "/" not in name and not place_of(word).exists()
        place = place_of(directory if given else word)
        name = name if given else place.resolve().name
        if name in places:
            raise InputError(f"{places[name]} and {place} are both called {name!r}: give names, as in first={places[name]} second={place}")
        places[name] = place
    return places
