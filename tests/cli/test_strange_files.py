"""Files of others that no reader may trust: JSON of any depth or size; pipes and devices, which have no end. Each command ends with one line,
soon and in little memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kempnerforge import load_pretrained
from kempnerforge.config.data import TextConfig
from kempnerforge.config.vision import EfficientNetLite0Config
from kempnerforge.data.collections.stamps import Stamps, StampsConfig
from kempnerforge.data.sources.text import TextSource
from kempnerforge.data.traces import image_digest
from kempnerforge.interop.processors import followed_processor
from kempnerforge.model.hf_files import read_named_config
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import check_files
from tests.cli.conftest import Trained
from tests.interop.tiny_vlms import save
from tests.training.tiny import call, make_job, write_config

SECONDS, ROOM, LARGE = 30, 4 << 30, 5 << 30
"""That a command may take, bytes of memory on top of what the process has, and those of a file."""


@contextmanager
def limited() -> Iterator[None]:
    """Reading that waits for ever, or that has no end, fails here."""

    def too_late(*args: object) -> None:
        pytest.fail(f"more than {SECONDS} s")  # NOTE: no OSError, as TimeoutError is, which readers would take for their file's

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
    "hf/config.json of a tower": lambda here: read_named_config(str(here / "hf")),
    "hf/processor_config.json and its class": lambda here: followed_processor(here / "hf", "llava"),
    "export/asked.json": lambda here: load_pretrained(here / "export"),
    "run/checkpoints/{step}/manifest.json": GENERATE,
    "run/checkpoints/{step}/config.toml": GENERATE,
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


def _safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


HEADERS = {
    "deep": _safetensors(b'{"a":' * 5000 + b"0" + b"}" * 5000),
    "digits": _safetensors(b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 100_000 + b'], "data_offsets": [0, 4]}}'),
    "long": _safetensors(b"{}", 2**63),
    "no JSON": _safetensors(b"\xff" * 64),
    "outside": _safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}'),
}
WEIGHTS: dict[str, Read] = {
    "hf/model.safetensors": IMPORT,
    "hf/model.safetensors of a tower": ("check", "{here}/job.toml", "--vision_encoder.type=clip", "--vision_encoder.path={here}/hf"),
    "export/model.safetensors": lambda here: load_pretrained(here / "export"),
    "lite0.safetensors": lambda here: build_vision_encoder(EfficientNetLite0Config(path=str(here / "lite0.safetensors"))),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_headers_of_weights_have_limits(name: str, header: str, here: Path) -> None:
    (here / name.split(" ")[0]).write_bytes(HEADERS[header])
    assert len(ends_with_one_line(here, WEIGHTS[name])) < 900


# ---- what is no file ----------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):  # whose names are short
        bound.bind(path.name)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


KINDS = {"pipe": _pipe, "device": _zeros, "socket": _socket, "folder": _folder}
DATA = (*CHECK, "--data.eval_path=")
TRAIN = ("train", "{here}/job.toml", "--train.max_steps=8")
STREAM = ("--data.source=hf_stream", "--data.num_samples=8")
OPENED: dict[str, Read] = {
    "job.toml": CHECK,
    "base.toml": ("check", "{here}/mine.toml"),
    "plugin.py": (*CHECK, '--plugins=["{here}/plugin.py"]'),
    # rows and what they name
    "train.jsonl": DATA,
    "test.jsonl": CHECK,
    "rows.json": (*DATA, "--data.path={here}/rows.json", "--data.source=hf_dataset"),
    "rows.csv": (*DATA, "--data.path={here}/rows.csv", "--data.source=hf_dataset"),
    "rows.parquet": (*DATA, "--data.path={here}/rows.parquet", "--data.source=hf_dataset"),
    "saved/state.json": (*DATA, "--data.path={here}/saved", "--data.source=hf_dataset"),
    "shard.jsonl": (*DATA, *STREAM, "--data.path={here}/shard.jsonl"),
    "shard-1.jsonl": (*DATA, *STREAM, "--data.path={here}/shard-*.jsonl"),
    "shard-1.parquet": (*DATA, *STREAM, "--data.path={here}/shard-*.parquet"),
    "a.tar": (*DATA, "--data.source=webdataset", "--data.path={here}/a.tar"),
    "tars/b.tar": (*DATA, "--data.source=webdataset", "--data.path={here}/tars"),
    "tars.jsonl": (*DATA, "--data.source=webdataset", "--data.path={here}/tars.jsonl"),
    "plain.txt": lambda here: TextSource(TextConfig(path=str(here / "plain.txt")), "train"),
    "perplexity.txt": ("eval", "{here}/run", "--eval.text_path={here}/perplexity.txt", "--eval.text_window=32"),
    "stamps/a/x.txt": lambda here: Stamps(StampsConfig(path=str(here / "stamps")), "train"),
    "0.png": ("generate", "{here}/run", "{here}/0.png"),
    "2.png": ("chat", "{here}/run", "{here}/2.png"),
    "1.png": lambda here: image_digest(here / "1.png"),
    # models
    "hf/config.json": IMPORT,
    "hf/generation_config.json": IMPORT,
    "hf/preprocessor_config.json": IMPORT,
    "hf/chat_template.jinja": IMPORT,
    "hf/tokenizer.json": IMPORT,
    "hf/tokenizer_config.json": IMPORT,
    "hf/model.safetensors": IMPORT,
    "hf/model.safetensors.index.json": IMPORT,
    "hf/chat_template.jinja of a tokenizer": (*CHECK, "--data.tokenizer={here}/hf"),
    "hf/model.safetensors of a tower": lambda here: read_named_config(str(here / "hf")),
    "hf/model.safetensors for use": lambda here: load_pretrained(here / "hf"),
    "model.gguf": ("import", "{here}/model.gguf", "{here}/out"),
    "lite0.safetensors": lambda here: build_vision_encoder(EfficientNetLite0Config(path=str(here / "lite0.safetensors"))),
    "export/config.toml": lambda here: load_pretrained(here / "export"),
    "export/model.safetensors": lambda here: load_pretrained(here / "export"),
    "export/asked.json": lambda here: load_pretrained(here / "export"),
    "export/tokenizer/chat_template.jinja": lambda here: load_pretrained(here / "export"),
    # checkpoints
    "run/checkpoints/{step}/manifest.json": GENERATE,
    "run/checkpoints/{step}/.metadata": GENERATE,
    "run/checkpoints/{step}/config.toml": GENERATE,
    "run/checkpoints/{step}/tokenizer/tokenizer.json": GENERATE,
    "run/checkpoints/{step}/__0_0.distcp": GENERATE,
    "run/.lock": TRAIN,
    "fresh": ("train", "{here}/job.toml", "--run.dir={here}/fresh"),
    # what is written
    "told.jsonl": ("eval", "{here}/run", "--predictions={here}/told.jsonl"),
    "drawn.png": ("generate", "{here}/run", "{here}/0.png", "--draw={here}/drawn.png"),
    "out": ("import", "{here}/hf", "{here}/out"),
    "checked": CHECK,
    "task": ("data", "lm-eval", "{here}/job.toml", "{here}/task"),
    "looked": ("inspect", "{here}/job.toml", "--out={here}/looked"),
}
"""What is put in the place of a file -> the command that meets it, or the call."""


FOLDERS = ("fresh", "out", "task", "checked", "looked", "drawn.png")
"""Which may be one."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPENED)
def test_what_is_no_file_is_refused(name: str, kind: str, here: Path) -> None:
    if kind == "folder" and name in FOLDERS:
        pytest.skip("a folder is meant")
    (here / "mine.toml").write_text('extends = "base.toml"\n')
    path = here / name.split(" ")[0].replace("{step}", resolve_name(here))
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.with_suffix(".png") if "stamps" in name else here / "shard-0.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    KINDS[kind](path)
    said = ends_with_one_line(here, OPENED[name])
    assert (path.name in said or (kind == "folder" and str(path.parents[1]) in said)) and len(said) < 700, said


def test_data_may_lie_beside_a_model(here: Path) -> None:
    (here / "hf" / "train.txt").touch()
    _grow(here / "hf" / "train.txt")
    (here / "hf" / "rows.json").mkdir()
    check_files(here / "hf")


SIDE = ("run/metrics.jsonl", "run/complete.json", "run/summary.json", "run/report.html", "run/config.toml")
"""Of a run that goes on without them."""


@pytest.mark.parametrize("kind", KINDS)
def test_side_files_that_are_none_do_not_stop_a_run(kind: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=2").code == 0
    for name in (*SIDE, "run/tokenizer/more.json"):
        KINDS[kind](tmp_path / name)
    with limited():
        ended = call("train", job, "--train.max_steps=3", "--allow-change=train.max_steps")
    assert ended.code == 0 and all((tmp_path / name).is_file() and not (tmp_path / name).is_symlink() for name in SIDE), ended
