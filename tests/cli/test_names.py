"""Names with marks of rich or controls of a terminal in them are printed as they are written, by every command."""

from __future__ import annotations

import json
import os
import pty
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kempnerforge.inference.answer import Answer
from kempnerforge.util.errors import visible
from kempnerforge.util.process import HARMLESS
from tests.params import quick
from tests.processes import Forked, run_module
from tests.training.tiny import CONFIG, Ended, end_of, environment, rows_of, spawn, write_rows

NAMES = {
    "marks": "a[bold]b[red]c[link=x]:smile:<img src=x onerror=alert(1)>&\"'",
    "controls": "a\x1b[31mb\x1b]0;title\x07\rc\x9b2J\u202e\x08\x7f",
}
STAGE = '\n[[stages]]\nname = "{name}[/x]"\nsteps = 3\n'
SEEN = "a\x1b[2J\x9b[\t\r\nb"
"""An answer."""


@dataclass(frozen=True)
class Place:
    """A folder with the name, and in it a job whose images, samples, answers and stage have it, and its run."""

    name: str
    folder: Path
    trained: Ended

    def argv(self, words: tuple[str, ...]) -> list[str]:
        found = list(words)
        for key, value in {"{folder}": str(self.folder), "{run}": f"{self.folder}/run", "{name}": self.name}.items():
            found = [word.replace(key, value) for word in found]
        return found


@pytest.fixture(scope="module", params=quick(NAMES, "controls"))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    name = NAMES[request.param]
    folder = tmp_path_factory.mktemp("names") / name
    folder.mkdir()
    rows = rows_of(folder)
    for row in rows:
        (folder / row["image"]).rename(folder / f"{name}{row['image']}")
        row |= {"image": f"{name}{row['image']}", "answer": f"{name} {row['answer']}", "id": f"{name} {row['image']}"}
    rows[3]["image"] = f"{name} is not there.png"
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[::2])
    table = {key: [row[key] for row in rows] for key in ("prompt", "answer")}
    pyarrow.parquet.write_table(pyarrow.table(table | {"image": [None] * len(rows)}), folder / "rows.parquet")
    written = lambda text: json.dumps(text)[1:-1]
    config = CONFIG.replace("max_steps = 6", "max_steps = 0").replace("= 48", "= 160").replace("= 64", "= 256")
    config = config.replace('prompt_column = "prompt"', 'prompt_column = "prompt"\nmax_bad_fraction = 0.5')
    text = config.replace("{folder}", written(str(folder))) + STAGE.replace("{name}", written(name))
    (folder / "job.toml").write_text(text, encoding="utf-8")
    return Place(name, folder, spawn("train", folder / "job.toml"))


def assert_shown(said: str, name: str) -> None:
    """``name`` is in what was ``said``, and nothing that a terminal obeys, or a traceback."""
    assert not [char for char in said if not char.isprintable() and char not in HARMLESS], said
    assert visible(name) in said and "Traceback" not in said, said


DONE = {
    "check": ("check", "{folder}/job.toml"),
    "config": ("check", "{folder}/job.toml", "--print-config"),
    "inspect": ("inspect", "{folder}/job.toml", "-n", "16"),
    "Parquet": ("inspect", "{folder}/job.toml", "--data.source=hf_dataset", "--data.path={folder}/rows.parquet", "--data.eval_path="),
    "data check": ("data", "check", "{folder}/job.toml", "--workers=1"),
    "lm-eval": ("data", "lm-eval", "{folder}/job.toml", "{folder}/task"),
    "eval": ("eval", "{run}", "--eval.max_new_tokens=2"),
    "report": ("report", "{run}", "--png={folder}/figures"),
    "export": ("export", "{run}", "{folder}/export", "--format=kempnerforge"),
    "train": ("train", "{folder}/job.toml"),
    "train --fresh": ("train", "{folder}/job.toml", "--fresh", "--eval.at_end=false"),
}
REFUSED = {
    "train": ("train", "{folder}/none.toml"),
    "check": ("check", "{folder}/none.toml"),
    "inspect": ("inspect", "{folder}/none.toml"),
    "data check": ("data", "check", "{folder}/none.toml"),
    "fetch": ("data", "fetch", "{name}"),
    "lm-eval": ("data", "lm-eval", "{folder}/none.toml", "{folder}/task"),
    "generate": ("generate", "{run}", "{folder}/none.png"),
    "chat": ("chat", "{run}", "{folder}/none.png"),
    "serve": ("serve", "{folder}/none"),
    "eval": ("eval", "{folder}/none"),
    "report": ("report", "{folder}/none", "--png={folder}/figures"),
    "import": ("import", "{folder}/none", "{folder}/out"),
    "export": ("export", "{folder}/none", "{folder}/out"),
    "a section": ("check", "{folder}/job.toml", "--{name}.dim=1"),
    "a key": ("check", "{folder}/job.toml", "--model.{name}=1"),
    "a column": ("check", "{folder}/job.toml", "--data.prompt_column={name}"),
    "a plugin": ("check", "{folder}/job.toml", "--plugins={name}.py"),
    "a meant change": ("train", "{folder}/job.toml", "--allow-change={name}"),
    "a number": ("inspect", "{folder}/job.toml", "-n", "{name}"),
    "a command": ("{name}",),
}


def test_training(place: Place) -> None:
    assert place.trained.code == 0
    assert_shown(place.trained.err, place.name)
    for page in place.folder.glob("run/*.html"):
        assert_harmless(page)


@pytest.mark.parametrize("command", DONE)
def test_commands_that_do_something(command: str, place: Place) -> None:
    ended = spawn(*place.argv(DONE[command]))
    assert ended.code == 0, ended
    assert_shown(ended.out + ended.err, place.name)
    for page in place.folder.glob("run/*/index.html"):
        assert_harmless(page)


@pytest.mark.parametrize("command", REFUSED)
def test_commands_that_are_refused(command: str, place: Place) -> None:
    ended = spawn(*place.argv(REFUSED[command]))
    assert ended.code == 2 and not ended.out, ended
    assert not [char for char in ended.err if not char.isprintable() and char not in HARMLESS], ended.err
    assert "Traceback" not in ended.err and place.name[:8].encode("unicode_escape").decode() in ended.err, ended.err


def assert_harmless(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert not [char for char in html if not char.isprintable() and char not in HARMLESS]


def speaking(argv: list[str], terminal: str = "") -> None:
    """The command with a model that answers ``SEEN``, on a terminal if one is named."""
    if terminal:
        number = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        for stream in range(3):
            os.dup2(number, stream)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(k, "r" if k == 0 else "w", closefd=False, buffering=1) for k in range(3))
    Answer.__iter__ = lambda self: iter(SEEN)  # type: ignore[method-assign]
    run_module("kempnerforge", argv)


def on_terminal(argv: list[str], typed: str = "") -> tuple[int, str]:
    """The exit code of the command, and what it has written to a terminal on which ``typed`` was typed."""
    screen, end = pty.openpty()
    process = Forked(speaking, (argv, os.ttyname(end)), environment(COLUMNS="400", TERM="xterm"))
    os.write(screen, typed.encode())
    said = bytearray()
    os.set_blocking(screen, False)
    while process.poll() is None:
        try:
            said += os.read(screen, 2**16)
        except BlockingIOError:
            process._process.join(0.02)
    for _ in range(100):
        try:
            said += os.read(screen, 2**16)
        except OSError:
            break
    os.close(end)
    os.close(screen)
    return process.wait(), said.decode(errors="surrogateescape").replace("\r\n", "\n")


def test_answers_on_a_terminal_and_in_a_file(place: Place) -> None:
    """A terminal gets what can be shown of them; a program all of it, byte for byte."""
    argv = place.argv(("generate", "{run}", "{folder}/{name}0.png"))
    code, said = on_terminal(argv)
    assert code == 0 and said == "a\\x1b[2J\\x9b[\t\\r\nb\n"
    ended = end_of(Forked(speaking, (argv,), environment()))
    assert ended.code == 0 and ended.out == SEEN.replace("\r\n", "\n") + "\n"


def test_screens(place: Place) -> None:
    """A bar with the stage's name, errors of a conversation, rows in colours."""
    code, said = on_terminal(place.argv(("train", "{folder}/job.toml", "--run.dir={folder}/other", "--eval.at_end=false")))
    assert (
        code == 0 and f"{visible(place.name)}[/x]" in said and (place.name not in said or place.name.isprintable()) and "\x1b[2K" in said
    ), said
    code, said = on_terminal(place.argv(("chat", "{run}")), "/image [/x]\nx\n/quit\n")
    assert code == 0 and "a\\x1b[2J" in said and visible(place.name) in said and "error: image [/x]: no such file\n" in said, said
    asked = ("generate", "{run}", "{folder}/{name}0.png", "{folder}/{name}1.png")
    for argv in (
        asked,
        ("inspect", "{folder}/job.toml"),
        ("check", "{folder}/job.toml"),
        ("data", "check", "{folder}/job.toml", "--workers=1"),
    ):
        code, said = on_terminal(place.argv(argv))
        assert code == 0 and visible(place.name) in said and (place.name not in said or place.name.isprintable()), said
        assert "\x1b[31m" not in said and "\x07" not in said and "\x9b" not in said
