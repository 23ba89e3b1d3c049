"""Runs the checks on the archs of a plugin through pytest, and reports the result of each check."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.contract.cases import CHOSEN, PLUGINS, Plugin, load, tiny_job
from kempnerforge.util.errors import InputError

if TYPE_CHECKING:
    import pytest

FILES = [Path(__file__).with_name(f"{name}_checks.py") for name in ("model", "generation", "training", "grid")]
MARKERS = ("dist: on two processes", "slow: minutes", "timeout(seconds): of the plugin pytest-timeout")


@dataclass
class Check:
    """A check and what it found.

    Attributes:
        cases: how many there were: masks, samples, sizes.
        seconds: their total time.
        failures: the error of each failed case, by its name.
    """

    name: str
    cases: int = 0
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def check_plugin(plugin: Plugin, *, slow: bool = False, only: Sequence[str] = (), done: Callable[[Check], object]) -> dict[str, Check]:
    """Runs the contract suite on the archs that ``plugin`` registers.

    Args:
        slow: the checks that take minutes, too.
        only: names of checks; empty: all.
        done: called with each check when its last case has run.

    Returns:
        The checks by name; those that have no case for such an arch are left out.

    Raises:
        InputError: the plugin cannot be imported, registers no arch or one that a small job cannot have,
            there is no such check, or pytest is not installed.
    """
    try:
        import pytest
    except ImportError:
        raise InputError("the contract suite needs the package pytest: pip install 'kempnerforge[contract]'") from None
    require_names(only)
    archs = load(plugin)
    if not archs:
        raise InputError(f'{plugin.name}: registers no arch; @registry.register_arch("my_arch") does, above the class of the model')
    for arch in archs:
        tiny_job(arch)
    PLUGINS[:], CHOSEN[:] = [plugin], archs
    reporter = Reporter(slow, only, done)
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "kempnerforge.contract.fixtures", "--confcutdir", str(FILES[0].parent)]
    ended = pytest.main([*options, "-c", os.devnull, "--rootdir", str(FILES[0].parent), *map(str, FILES)], plugins=[reporter])
    if ended == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED) or reporter.broken:
        raise RuntimeError(f"the checks cannot be collected: {reporter.broken or ended}")
    return {name: check for name, check in reporter.checks.items() if check.cases or check.failures}


def require_names(names: Sequence[str]) -> None:
    """Raises InputError if one of ``names`` is not the name of a check."""
    known = [name for file in FILES for name in re.findall(r"^def test_(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"--only {name}: no such check{f'; did you mean {near[0]}?' if near else ''}; known: {', '.join(known)}")


class Reporter:
    """A plugin of pytest that selects the checks and gathers what they find."""

    def __init__(self, slow: bool, only: Sequence[str], done: Callable[[Check], object]) -> None:
        self.slow, self.only, self.done = slow, only, done
        self.checks: dict[str, Check] = {}
        self.broken = ""
        self._left = Counter[str]()

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line("markers", marker)

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        items[:] = [
            item
            for item in items
            if (name_of(item.nodeid) in self.only or not self.only) and (self.slow or item.get_closest_marker("slow") is None)
        ]
        self._left = Counter(name_of(item.nodeid) for item in items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken = report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = name_of(report.nodeid)
        check = self.checks.setdefault(name, Check(name))
        check.seconds += report.duration
        if report.failed:
            check.failures[case_of(report.nodeid)] = why(report)
        if report.when == "call" and not report.skipped:
            check.cases += 1
        if report.when == "teardown":
            self._left[name] -= 1
            if not self._left[name] and (check.cases or check.failures):
                self.done(check)


def name_of(node: str) -> str:
    return node.partition("::")[2].partition("[")[0].removeprefix("test_")


def case_of(node: str) -> str:
    return node.partition("[")[2].removesuffix("]")


def why(report: pytest.TestReport) -> str:
    """The error as one line; an assertion with a message is the message, without the values that pytest puts
    after it.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).splitlines()
    message = list(takewhile(lambda line: not line.startswith("assert "), lines)) or lines
    return " ".join(line.strip() for line in message if line.strip())
