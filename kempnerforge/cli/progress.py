"""What commands that turn one model into another share: options, a progress bar, and what they say in the
end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from kempnerforge.cli.numbers import real


@contextmanager
def reporting(stream: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes what is being done, how much of it is done, and how much there is. Only terminals
    see it.
    """
    from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

    from kempnerforge.util.screen import Screen, TaskText, bars

    columns = TaskText("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with bars(Screen(stream), *columns, transient=True, disable=not stream.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def add_comparison(parser: argparse.ArgumentParser, no_verify: str) -> None:
    """Options about comparing the two models, and of the output."""
    parser.add_argument(
        "--tolerance", type=real(0), default=1e-4, help="of the largest difference, in units of the largest logit (default: 1e-4)"
    )
    parser.add_argument("--no-verify", action="store_true", help=no_verify)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def print_result(path: Path, difference: float | None, lines: Sequence[str], as_json: bool) -> None:
    """Where the new model is, and what was found out about it."""
    if as_json:
        print(json.dumps({"path": str(path), "difference": difference, "notes": lines}))
    else:
        print("\n".join([*lines, f"written: {path}"]))
