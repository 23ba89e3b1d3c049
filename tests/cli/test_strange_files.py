"""Files of others that no reader may trust: JSON without an end, of any depth or size. Each command ends with one line, soon and in little memory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kempnerforge import load_pretrained
from kempnerforge.config.errors import InputError
from kempnerforge.interop.processors import followed
from kempnerforge.model.hf_towers import read_config
from tests.cli.conftest import Trained
from tests.interop.tiny_vlms import save
from tests.training.tiny import call, write_config

SECONDS, ROOM, LARGE = 30, 4 << 30, 5 << 30
"""That a command may take, bytes of memory on top of what the process has, and those of a file."""


@contextmanager
def limited() -> Iterator[None]:
    """Reading that waits for ever, or that has no end, fails here."""

    def too_late(*args: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its data, an export of it, and a model of transformers in ``hf``, whose weights have an index."""
    made = tmp_path_factory.mktemp("strange") / "all"
    shutil.copytree(trained.folder, made, ignore=shutil.ignore_patterns("job.toml"))
    write_config(made)
    assert call("export", made / "run", made / "export", "--format=kempnerforge").code == 0
    save("llava", made / "hf")
    (made / "rows.json").write_text(json.dumps([json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]))
    return made


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    """A copy, whose config names it."""
    shutil.copytree(folder, tmp_path / "all", symlinks=True)
    write_config(tmp_path / "all")
    return tmp_path / "all"


IMPORT = ("import", "{here}/hf", "{here}/out")
GENERATE = ("generate", "{here}/run/checkpoints/{step}", "{here}/0.png")
CHECK = ("data", "check", "{here}/job.toml", "--out={here}/checked")
Read = tuple[str, ...] | Callable[[Path], object]
JSON: dict[str, Read] = {
    "hf/config.json": IMPORT,
    "hf/generation_config.json": IMPORT,
    "hf/preprocessor_config.json": IMPORT,
    "hf/processor_config.json": IMPORT,
    "hf/tokenizer.json": IMPORT,
    "hf/tokenizer_config.json": IMPORT,
    "hf/model.safetensors.index.json": IMPORT,
    "hf/config.json of a tower": lambda here: read_config(str(here / "hf")),
    "hf/processor_config.json and its class": lambda here: followed(here / "hf", "llava"),
    "export/asked.json": lambda here: load_pretrained(here / "export"),
    "run/checkpoints/{step}/manifest.json": GENERATE,
    "train.jsonl": CHECK,
    "test.jsonl": CHECK,
    "rows.json": (*CHECK, "--data.path={here}/rows.json", "--data.source=hf_dataset"),
}
"""File -> the command that reads it, or the call."""
CONTENTS: dict[str, Callable[[Path], object]] = {
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep and whole": lambda path: path.write_text('[{"a":' * 300 + "0" + "}]" * 300),
    "digits": lambda path: path.write_text('[{"a": 1' + "0" * 100_000 + "}]"),
    "large": lambda path: path.write_text('[{"a": "') or _grow(path),
}


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(LARGE)  # no block of it is on the disk


def ends_with_one_line(here: Path, argv: Read) -> str:
    """The line with which a command or call ends, within the limits."""
    if callable(argv):
        with limited(), pytest.raises(InputError) as caught:
            argv(here)
        return str(caught.value)
    words = [word.replace("{here}", str(here)).replace("{step}", resolve_name(here)) for word in argv]
    with limited():
        ended = call(*words)
    said = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert ended.code == 2 and len(said) == 1 and "Traceback" not in ended.err, ended
    return said[0]


def resolve_name(here: Path) -> str:
    return sorted(path.name for path in (here / "run" / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", JSON)
def test_json_of_others_has_limits(name: str, content: str, here: Path) -> None:
    path = here / name.split(" ")[0].replace("{step}", resolve_name(here))
    CONTENTS[content](path)
    said = ends_with_one_line(here, JSON[name])
    assert (path.name in said or str(path.parent) in said) and len(said) < 700, said  # transformers names the directory
