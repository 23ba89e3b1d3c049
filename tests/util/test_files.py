"""Files and directories that appear whole or not at all, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kempnerforge.util.files import move_aside, same_files, scratch
from tests.training.tiny import environment

KILLED = """
import os, signal, sys
from pathlib import Path
from kempnerforge.interop.write import fresh
with fresh(Path(sys.argv[1])) as part:
    (part / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """Import, export and fetch write through ``scratch``; the next one cleans up."""
    out = tmp_path / "new" / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment()).returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    assert not out.exists() and left.name.startswith(".out.part-")
    other = out.parent / f".out.part-{os.getppid()}"
    other.mkdir()
    with scratch(out) as folder:
        assert not left.exists() and other.exists(), "that of a process that is still there stays"
        (folder / "made").mkdir()
        (folder / "made").rename(out)
    assert sorted(path.name for path in out.parent.iterdir()) == [other.name, "out"]


def test_scratch_takes_away_what_it_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), scratch(tmp_path / "a" / "b" / "out") as folder:
        (folder / "half").write_text("x")
        raise OSError("full")
    assert not any(tmp_path.iterdir())


def test_moved_aside_twice_in_a_second(tmp_path: Path) -> None:
    names = []
    for text in "abc":
        (tmp_path / "run").write_text(text)
        names.append(move_aside(tmp_path / "run"))
    assert [path.read_text() for path in names] == ["a", "b", "c"] and len(set(names)) == 3


def test_same_files(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert same_files(a, b) and not same_files(a, c) and not same_files(tmp_path / "none", a)
    (b / "more").write_text("")
    assert not same_files(a, b)
