"""A progress bar for commands that read and write files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def reporting(stream: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes what is being done, how much of it is done, and how much there is. Only terminals see it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=stream), transient=True, disable=not stream.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
