"""``~`` and variables in every field that holds a path, and where relative paths start."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config import ConfigError, JobConfig, load_config, registry
from kempnerforge.config.build import SECTIONS, UNIONS, Argument, convert, fields_of, nearest
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.inference.model import TrainedModel, load_pretrained
from kempnerforge.util.errors import InputError, Problems
from kempnerforge.util.paths import PathText, expand, start_of
from tests.training.tiny import call, make_job


def dataclasses_in(wanted: Any) -> Iterator[type]:
    """All config classes that a value of type ``wanted`` may be made of."""
    if dataclasses.is_dataclass(wanted) and wanted not in seen:
        seen.add(wanted)
        union = next((union for base, union in UNIONS.items() if base is wanted), None)
        for cls in [wanted] if union is None else [union.class_for(name) for name in union.entries.names()]:
            yield typing.cast(type, cls)
            for kind in fields_of(cls).values():
                yield from dataclasses_in(kind)
    for part in typing.get_args(wanted):
        yield from dataclasses_in(part)


seen: set[Any] = set()
CLASSES = sorted(set(dataclasses_in(JobConfig)), key=lambda cls: cls.__name__)
TEXTS = [(cls, name, kind) for cls in CLASSES for name, kind in fields_of(cls).items() if kind in (str, PathText)]


def test_every_field_with_the_name_of_a_path_is_one() -> None:
    words = ("path", "dir", "root", "file", "folder", "cache", "from", "manifest", "tokenizer", "codec")
    named = {f"{cls.__name__}.{name}" for cls, name, _ in TEXTS if any(word in name.split("_") for word in words)}
    marked = {f"{cls.__name__}.{name}" for cls, name, kind in TEXTS if kind == PathText}
    assert named == marked and len(marked) > 15
    assert fields_of(JobConfig)["plugins"] == list[PathText]


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, name, kind in TEXTS if kind == PathText])
@pytest.mark.parametrize("form", ["toml", "argument"])
def test_every_path_is_expanded(cls: type, name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/else")
    monkeypatch.setenv("DATA", "/mnt/data")
    for text, full in {
        "~/a": "/somewhere/else/a",
        "$HOME/a": "/somewhere/else/a",
        "${DATA}/b.json": "/mnt/data/b.json",
        "a/~b": "a/~b",
    }.items():
        value = Argument(text, text) if form == "argument" else text
        assert convert(fields_of(cls)[name], value, ("x", name), problems := Problems()) == full and not problems.lines


@pytest.mark.parametrize(
    ("text", "words"), [("~no one-of-this-name/a", "no user 'no one-of-this-name'"), ("$NOWHERE/a", "$NOWHERE is not set")]
)
def test_what_cannot_be_expanded(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_job(tmp_path)
    with pytest.raises(ConfigError, match=rf"\[run\] dir = \"{text.replace('$', '.')}\": .*{words.replace('$', '.')}"):
        load_config(config, [f"--run.dir={text}"])
    Path(text).mkdir(parents=True)
    assert expand(text if text[0] == "$" else f"./{text}").endswith(text), "a folder that is called so"


def test_no_folder_is_named_after_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    config = make_job(tmp_path)
    config.write_text(config.read_text().replace(f'dir = "{tmp_path}/run"', 'dir = "~/run"').replace(f"{tmp_path}/train", "$HOME/../train"))
    assert call("train", config, "--train.max_steps=1", "--eval.at_end=false").code == 0
    assert (tmp_path / "home" / "run" / "checkpoints").is_dir() and not list(tmp_path.rglob("~*"))
    assert load_config(tmp_path / "home" / "run" / "config.toml").run.dir == str(tmp_path / "home" / "run")
    for argv in (
        ("inspect", "~/run/config.toml", "--out=~/page"),
        ("export", "~/run", "~/out", "--format=kempnerforge"),
        ("generate", "~/run", "$HOME/../0.png", "--prompt=what?", "--max-new-tokens=1"),
    ):
        ended = call(*argv)
        assert ended.code == 0, ended
    assert (tmp_path / "home" / "page" / "index.html").is_file() and (tmp_path / "home" / "out").is_dir() and not list(tmp_path.rglob("~*"))


def test_functions_that_take_a_path_expand_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = make_job(tmp_path)
    assert call("train", config, "--train.max_steps=1", "--eval.at_end=false").code == 0
    export_model(Path("~/run"), Path("~/out"), "kempnerforge", verify=False)
    for path in ("~/run", Path("$HOME/run"), "~/out"):
        load_pretrained(path)
    assert Tokenizer.from_pretrained("~/run/tokenizer").vocab_size == Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer").vocab_size
    assert load_config("~/job.toml") == load_config(config) and TrainedModel.restore(Path("~/run")).path.is_relative_to(tmp_path)
    with pytest.raises(InputError, match="NOWHERE is not set"):
        load_pretrained("$NOWHERE/run")
    with pytest.raises(InputError, match=str(tmp_path / "none")):
        import_model(Path("~/none"), Path("~/imported"))
    assert not list(tmp_path.rglob("~*")) and not list(tmp_path.rglob("$*"))


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start at the working directory; ``extends`` and ``plugins`` at the file; a message says where it has looked."""
    monkeypatch.chdir(tmp_path)
    make_job(tmp_path / "jobs")
    (tmp_path / "jobs" / "sub").mkdir()
    (tmp_path / "jobs" / "lab.py").write_text("loaded = True\n")
    child = tmp_path / "jobs" / "sub" / "child.toml"
    child.write_text('extends = "../job.toml"\nplugins = ["../lab.py"]\n[data]\npath = "jobs/train.jsonl"\nroot = "jobs"\n')
    job = load_config("jobs/sub/child.toml")
    assert job.plugins == [str(tmp_path / "jobs" / "lab.py")] and call("check", "jobs/sub/child.toml").code == 0
    where = f"(relative to the working directory, {tmp_path})"
    for argv in (
        ("check", "none.toml"),
        ("check", child, "--data.path=none.jsonl"),
        ("check", child, "--data.tokenizer=./none"),
        ("train", child, "--run.init_from=none"),
        ("generate", "none", "jobs/0.png"),
    ):
        ended = call(*argv)
        assert ended.code == 2 and where in ended.err, ended
    assert start_of("/a") == "" and os.getcwd() in start_of("a")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[train]\nlr = 1e-3", "[train] lr = 0.001: unknown key; did you mean [optimizer] lr?"),
        ("lr = 1e-3\n[train]\nmax_steps = 1", "[lr]: unknown section; did you mean [optimizer] lr?"),
        ("[vlm]\narch = 'mot'\ncross_attention_n_heads = 2", "a key of arch = 'cross_attention'; here arch = 'mot'"),
        ("[vlm]\narch = 'joint_decoder'\nfactor = 2", "did you mean [adapter] factor?"),
        (
            "[adapter]\nfactor = 2",
            "a key of type = 'attention_pool', 'avg_pool', 'patch_merger', 'pixel_shuffle'; here type = 'mlp_2layer'",
        ),
        ("[vision_encoder]\ntype = 'vit'\npretrained = true", "; here type = 'vit'"),
        ("[data]\nsource = 'easy_vqa'\ntexts_column = 'x'", "; here source = 'easy_vqa'"),
        ("[model]\ndimm = 2", "did you mean 'dim'?"),
    ],
)
def test_an_unknown_key_that_is_known_elsewhere(text: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f"{text}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.toml")
    assert hint in str(error.value), error.value


def test_hints_are_of_keys_that_are_there() -> None:
    assert SECTIONS.keys() == {name for name in fields_of(JobConfig) if name not in ("stages", "lora", "hooks", "plugins")}
    assert registry.list_vlm_configs() == UNIONS[SECTIONS["vlm"]].entries.names() and nearest("dimm", ["dim"]) == "did you mean 'dim'?"
