"""The fault matrix as a table: each test says what it saw, and the table is written when the session ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.ranks import STEPS, Faults, Ranks, codes, newest, staged_job
from tests.training.test_resume import assert_same_run

HEAD = "| fault | observed | weights, optimizer and metrics at the end |\n|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        observed: what the job did.
        end: True: the same command went on, and ended bitwise as the run that nothing happened to; or what else was compared; None: nothing.
    """

    test: str
    fault: str
    observed: str
    end: bool | str | None


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-table", default="", metavar="PATH", help="where the table goes (default: fault-matrix.md in the temporary folder)"
    )
    parser.addoption("--kills", type=int, default=60, metavar="N", help="kill -9 in the slow test")
    parser.addoption("--fuzz", type=int, default=20, metavar="N", help="mutations of each kind of file in the slow test")
    parser.addoption("--kill-runs", type=int, default=15, metavar="N", help="runs that they are spread over")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    said = {True: "bitwise those of a run without it", False: "**others**", None: "-"}
    table = HEAD + "".join(f"| {row.fault} | {row.observed} | {said.get(row.end, row.end)} |\n" for row in rows)
    path = Path(config.getoption("--fault-table", default="") or Path(tempfile.gettempdir()) / "fault-matrix.md")
    path.write_text(table, encoding="utf-8")
    terminalreporter.section("fault matrix")
    terminalreporter.write(table)
    terminalreporter.write_line(f"written to {path}")


Observe = Callable[..., None]


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Observe:
    """``observe(fault, observed, end)`` adds a ``Row``."""

    def add(fault: str, observed: str, end: bool | str | None = None) -> None:
        request.config.stash[ROWS].append(Row(request.node.nodeid, fault, observed.replace("|", "/"), end))

    return add


@dataclass(frozen=True)
class Job:
    """The staged job in a folder, and a run of it that nothing happened to.

    Attributes:
        path: the TOML.
        reference: a run directory.
        world: number of ranks.
        argv: options of every run.
    """

    folder: Path
    path: Path
    reference: Path
    world: int = 2
    argv: tuple[str, ...] = ()

    def ranks(self, run: Path, *argv: object, faults: Faults | None = None) -> Ranks:
        """Starts or continues ``run``."""
        words = "train", self.path, f"--run.dir={run}", *self.argv, *argv
        return Ranks(run.with_name(f"{run.name}.logs"), *words, faults=faults, world=self.world)

    def until(self, step: int, run: Path) -> Path:
        """``run`` as it would be had it been killed between ``step`` and the next checkpoint, every checkpoint kept."""
        shutil.copytree(self.reference, run)
        for name in ("report.html", "summary.json"):
            (run / name).unlink()
        for later in (run / "checkpoints").glob("step-*"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        return run

    def finish(self, run: Path, *argv: object) -> bool:
        """Continues ``run`` to its end by the same command. Asserts that it is the reference, bitwise."""
        with self.ranks(run, *argv) as ranks:
            ended = ranks.wait()
        assert codes(ended) == [0] * self.world, ranks.err()
        assert newest(run) == STEPS
        assert_same_run(run, self.reference)
        return True


def run_once(folder: Path, world: int = 2, argv: tuple[str, ...] = ()) -> Job:
    made = Job(folder, staged_job(folder), folder / "reference", world, argv)
    with made.ranks(made.reference) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0] * world, ranks.err()
    return made


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """By two ranks."""
    return run_once(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def shared_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """By two groups of two ranks: the groups share each row, the ranks of a group each layer."""
    return run_once(tmp_path_factory.mktemp("shared"), 4, ("--distributed.tensor_parallel=2", "--distributed.context_parallel=2"))
