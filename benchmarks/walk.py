"""The files that a job goes through from ``train(job)`` to its first step, followed while a small run starts.

Usage: PYTHONPATH=. python benchmarks/walk.py [--list]

Two runs on the tests' tiny data are started under a profile function (``sys.setprofile``), which sees each
call of a function of this package: a fresh run, and the run that continues it. Counted is what happens before
``Trainer.train_step`` is called:

* The job is a ``JobConfig`` or a dataclass with one in a field (``Assembly``).
* An entry is a call, from a function of another file, of a function that is given the job: as an argument, or
as ``self`` unless that is the
  ``JobConfig``. (To ask the job, as ``job.module_patterns()`` does, is no entry. Neither is a return.)
* files: how many files are entered.
* climbs: how many entries are of a file that was entered before, with an entry of another file in between.

Prints both figures of each run; with ``--list`` also the entries in their order, climbs marked with ``*``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import kempnerforge
from kempnerforge.config import JobConfig, load_config
from kempnerforge.training.run import train
from kempnerforge.training.trainer import Trainer
from tests.training.tiny import make_job

PACKAGE = str(Path(kempnerforge.__file__).parent) + "/"
FIRST_STEP = Trainer.train_step.__code__


class Walk:
    """The files that are entered, in order; a profile function."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.done = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or self.done or not code.co_filename.startswith(PACKAGE):
            return
        self.done = code is FIRST_STEP
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals[name] for name in names if not (name == "self" and isinstance(frame.f_locals[name], JobConfig))]
        if any(map(holds_a_job, given)) and code.co_filename != _caller(frame):
            self.entries.append(code.co_filename.removeprefix(PACKAGE))

    def climbs(self) -> list[bool]:
        """Whether each entry is one."""
        found, before = [], ""
        seen = set[str]()
        for file in self.entries:
            found.append(file in seen and file != before)
            seen.add(file)
            before = file
        return found


def _caller(frame: FrameType) -> str:
    """The file of the nearest function of this package that has led to ``frame``."""
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(PACKAGE):
        above = above.f_back
    return above.f_code.co_filename if above is not None else ""


def holds_a_job(value: Any) -> bool:
    if isinstance(value, JobConfig):
        return True
    if isinstance(value, type) or not is_dataclass(value):
        return False
    return any(isinstance(getattr(value, f.name, None), JobConfig) for f in fields(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    listed = parser.parse_args().list
    with tempfile.TemporaryDirectory() as folder:
        toml = make_job(Path(folder))
        for name, steps in (("fresh", 4), ("continued", 6)):
            job, walk = load_config(toml, [f"--train.max_steps={steps}", "--scheduler.name=constant"]), Walk()
            sys.setprofile(walk)
            try:
                train(job)
            finally:
                sys.setprofile(None)
            climbs = walk.climbs()
            print(f"{name}: {len(set(walk.entries))} files, {sum(climbs)} climbs")
            for file, climb in zip(walk.entries, climbs, strict=True) if listed else ():
                print(f"  {'*' if climb else ' '} {file}")


if __name__ == "__main__":
    main()
