"""Everything that a user can get wrong: one clear line and exit code 2, or a counted skip where a single sample is at fault."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Trained
from tests.training.tiny import CONFIG, Ended, call, make_job, metrics, rows_of, write_config, write_rows


@dataclass(frozen=True)
class Bad:
    """A kind of bad input.

    Attributes:
        name: of the kind.
        says: what the error line must contain, each of them.
        edit: pairs of text that is replaced in the config.
        extra: text after the config.
        argv: further arguments.
        prepare: changes the dataset in its folder.
        command: that reads the config.
    """

    name: str
    says: tuple[str, ...]
    edit: tuple[tuple[str, str], ...] = ()
    extra: str = ""
    argv: tuple[str, ...] = ()
    prepare: Callable[[Path], object] | None = None
    command: str = "train"


def rewrite(change: Callable[[list[dict]], object]) -> Callable[[Path], object]:
    """Changes the rows of train.jsonl."""

    def prepare(folder: Path) -> None:
        rows = rows_of(folder)
        change(rows)
        write_rows(folder / "train.jsonl", rows)

    return prepare


def spoil_images(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(b"<html>404</html>")


ODD_GRID = (("image_size = 16", "image_size = 24"), ('type = "linear"', 'type = "pixel_shuffle"'))
TEXT = (
    CONFIG.split("[vision_encoder]")[0]
    + '[data]\nsource = "text"\npath = "{folder}/text.txt"\n[train]\nmax_steps = 2\nbatch_size = 2\nseq_len = 16\n'
)
FREEZE = ("freeze = []", 'freeze = [{ module = "%s" }]')

TABLE = [
    Bad("unknown key", ("[model] dimm", "unknown key", "did you mean 'dim'?"), edit=(("[model]\ndim", "[model]\ndimm"),)),
    Bad("unknown section", ("modell", "unknown section", "did you mean 'model'?"), edit=(("[model]", "[modell]"),)),
    Bad("wrong type", ("[model] dim", '"32"', "must be an integer, not a string"), edit=(("[model]\ndim = 32", '[model]\ndim = "32"'),)),
    Bad("boolean for a number", ("[train] batch_size", "true", "must be an integer"), edit=(("batch_size = 4", "batch_size = true"),)),
    Bad("NaN", ("[optimizer] lr", "nan", "finite"), edit=(("lr = 2e-3", "lr = nan"),)),
    Bad("infinite", ("[optimizer] lr", "inf", "finite"), edit=(("lr = 2e-3", "lr = inf"),)),
    Bad("out of range", ("[train] batch_size", "0", ">= 1"), edit=(("batch_size = 4", "batch_size = 0"),)),
    Bad("duplicate key", ("job.toml", "line", "given twice"), edit=(("lr = 2e-3", "lr = 2e-3\nlr = 1e-3"),)),
    Bad("duplicate table", ("job.toml", "line", "given twice"), extra="\n[model]\ndim = 64\n"),
    Bad("syntax error", ("job.toml", "line", "not valid TOML"), edit=(("lr = 2e-3", "lr = = 2e-3"),)),
    Bad("unknown arch", ("[vlm] arch", "joint_decodr", "joint_decoder"), edit=(("joint_decoder", "joint_decodr"),)),
    Bad("arch without its files", ("[vlm] path = ''", "directory or a hub id"), edit=(("joint_decoder", "hf"),)),
    Bad("unknown source", ("[data] source", "jsonlines", "jsonl"), edit=(('"jsonl"', '"jsonlines"'),)),
    Bad("unknown encoder", ("[vision_encoder] type", "vitt", "vit"), edit=(('"vit"', '"vitt"'),)),
    Bad("odd grid", ("[adapter] factor", "2", "3 x 3"), edit=ODD_GRID),
    Bad("text too long", ("max_text_len = 48", "52", "train.seq_len = 50"), edit=(("seq_len = 64\nmixed", "seq_len = 50\nmixed"),)),
    Bad("row longer than model", ("[train] seq_len = 128", "model.max_seq_len = 64"), argv=("--train.seq_len=128",)),
    Bad("nothing to train", ("[train] max_steps = 0", "add a stage"), argv=("--train.max_steps=0",)),
    Bad("source of images without [vlm]", ("[data] source", "easy_vqa", "[vlm]"), edit=((CONFIG.split("[train]")[0], ""),)),
    Bad("missing prompt field", ("[data] prompt_template", "{prompt}"), argv=("--data.prompt_template=Q:",)),
    Bad("accumulation", ("[train] batch_size = 4", "grad_accum_steps = 3"), argv=("--train.grad_accum_steps=3",)),
    Bad("vocabulary too small", ("model.vocab_size = 10", "tokenizer has"), argv=("--model.vocab_size=10",)),
    Bad(
        "freeze pattern without a hit",
        ("job.toml: [vlm] freeze[0].module = 'vision_encodr'", "matches no parameter", "vision_encoder"),
        edit=((FREEZE[0], FREEZE[1] % "vision_encodr"),),
    ),
    Bad(
        "lr_scale pattern without a hit",
        ("command line: [optimizer] lr_scale = 'adaptor'", "adapter"),
        argv=("--optimizer.lr_scale.adaptor=0.1",),
    ),
    Bad("everything frozen", ("everything is frozen",), edit=((FREEZE[0], FREEZE[1] % "*"),)),
    Bad("missing data file", ("data.path", "none.jsonl", "No such file"), argv=("--data.path=none.jsonl",)),
    Bad("missing held-out file", ("data.eval_path", "none.jsonl", "No such file"), argv=("--data.eval_path=none.jsonl",)),
    Bad("data path is a directory", ("data.path", "directory"), argv=("--data.path=.",)),
    Bad("empty data", ("train.jsonl", "no rows"), prepare=lambda folder: (folder / "train.jsonl").write_text("")),
    Bad(
        "missing column", ("no column 'question' for data.prompt_column", "answer, image, prompt"), argv=("--data.prompt_column=question",)
    ),
    Bad("column missing in a row", ("1 of 16 rows", "'answer'"), prepare=rewrite(lambda rows: rows[3].pop("answer"))),
    Bad(
        "bad JSON line",
        ("train.jsonl", "1 bad lines", "line 2", "not JSON"),
        prepare=lambda f: (f / "train.jsonl").write_text('{"a": 1}\n{"image"\n'),
    ),
    Bad("JSON that is no object", ("line 1", "object is needed"), prepare=lambda f: (f / "train.jsonl").write_text("[1]\n")),
    Bad("non-UTF-8 rows", ("line 1", "not UTF-8"), prepare=lambda f: (f / "train.jsonl").write_bytes(b'{"image": "\xe9"}\n')),
    Bad("all images unreadable", ("held-out data", "8 of 8 samples cannot be read", "not an image"), prepare=spoil_images),
    Bad("all images unreadable, none asked about", ("cannot be used", "not an image"), prepare=spoil_images, argv=("--data.eval_path=",)),
    Bad(
        "too many bad samples",
        ("max_bad_fraction", "of 16 samples"),
        prepare=rewrite(lambda rows: rows[3].update(answer=" ")),
        argv=("--train.batch_size=16",),
    ),
    Bad("no token of any answer fits", ("cannot be used", "max_text_len = 4"), argv=("--vlm.max_text_len=4",)),
    Bad("tokenizer that is none", ("data.tokenizer", "./nowhere", "no such directory"), argv=("--data.tokenizer=./nowhere",)),
    Bad("missing text file", ("data.path", "text.txt", "No such file"), edit=((CONFIG, TEXT),)),
    Bad("empty text", ("text.txt", "empty"), edit=((CONFIG, TEXT),), prepare=lambda folder: (folder / "text.txt").write_text(" \n")),
    Bad(
        "non-UTF-8 text",
        ("text.txt", "not UTF-8: byte 3"),
        edit=((CONFIG, TEXT),),
        prepare=lambda folder: (folder / "text.txt").write_bytes(b"caf\xe9 "),
    ),
    Bad("override without a value", ("--model.dim", "needs a value"), argv=("--model.dim",)),
    Bad("override of an unknown key", ("command line", "[model] dimm", "did you mean 'dim'?"), argv=("--model.dimm=3",)),
    Bad("mistyped option", ("--frehs",), argv=("--frehs",)),
    Bad("argument too many", ('"more"', "--section.key=value"), argv=("more",)),
    Bad("stage without steps", ("[[stages]] #1 steps", "missing"), extra='\n[[stages]]\nname = "one"\n'),
    Bad("stage changes the arch", ("[[stages]] #1 vlm", "unknown key"), extra='\n[[stages]]\nname = "one"\nsteps = 2\nvlm.arch = "mot"\n'),
    Bad("run directory is a file", ("train.jsonl", "File exists"), argv=("--run.dir={folder}/train.jsonl",)),
    Bad("run directory below a file", ("train.jsonl", "Not a directory"), argv=("--run.dir={folder}/train.jsonl/run",)),
    Bad("run directory that cannot be made", ("/proc/run", "cannot be made"), argv=("--run.dir=/proc/run",)),
    Bad("run directory with a name too long", ("run.dir = ", "cannot be made: File name too long"), argv=(f"--run.dir={'a' * 300}",)),
    Bad("tokenizer that can be no hub id", ("data.tokenizer = 'a/b/c': no such directory",), argv=("--data.tokenizer=a/b/c",)),
    Bad("inspect into a file", ("train.jsonl", "File exists"), argv=("--out={folder}/train.jsonl",), command="inspect"),
]


def one_line(ended: Ended, *says: str) -> None:
    """Exit code 2 and one line on stderr that says so."""
    assert ended.code == 2, ended
    lines = [line for line in ended.err.splitlines() if not line.startswith(("train ", "step "))]  # progress
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    for part in says:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize("bad", TABLE, ids=[bad.name for bad in TABLE])
def test_one_line_and_exit_code_2(bad: Bad, tmp_path: Path):
    make_job(tmp_path)
    config = CONFIG
    for old, new in bad.edit:
        assert old in config
        config = config.replace(old, new)
    job = write_config(tmp_path, config=config, extra=bad.extra)
    if bad.prepare is not None:
        bad.prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    one_line(call(bad.command, job, *(word.replace("{folder}", str(tmp_path)) for word in bad.argv)), *bad.says)
    assert sorted(tmp_path.rglob("*")) == before, "a refused command writes nothing"


@pytest.mark.parametrize("command", ["train", "check", "inspect"])
def test_missing_config(command: str, tmp_path: Path):
    one_line(call(command, tmp_path / "none.toml"), "none.toml", "no such file")


def test_arch_without_a_model(tmp_path: Path):
    source = "from dataclasses import dataclass\nfrom kempnerforge.config import VLMConfig, registry\n"
    source += "@registry.register_vlm_config\n@dataclass\nclass PaperConfig(VLMConfig):\n    arch: str = 'on_paper'\n"
    (tmp_path / "paper.py").write_text(source)
    make_job(tmp_path)
    job = write_config(tmp_path, config='plugins = ["paper.py"]\n' + CONFIG.replace("joint_decoder", "on_paper"))
    one_line(call("train", job), "vlm.arch = 'on_paper'", "no model is built for it yet", "joint_decoder")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_errors_of_a_config_at_once(tmp_path: Path):
    make_job(tmp_path)
    job = write_config(
        tmp_path, config=CONFIG.replace("lr = 2e-3", "lr = nan").replace("n_heads = 2\nactivation", "n_heads = 3\nactivation")
    )
    ended = call("train", job, "--train.batch_size=many")
    lines = ended.err.removeprefix("error: ").splitlines()
    assert ended.code == 2 and len(lines) == 3
    for part in ("[optimizer] lr", "[model] n_heads = 3", "[train] batch_size"):
        assert sum(part in line for line in lines) == 1, lines


CHECKPOINTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("nothing there", "{folder}/none", ("none", "no such directory")),
    ("a file", "{folder}/train.jsonl", ("train.jsonl", "not a directory")),
    ("another directory", "{folder}/empty/checkpoints", ("no checkpoint here",)),
    ("a run without checkpoints", "{folder}/empty", ("no checkpoint here",)),
    ("an unfinished checkpoint", "{folder}/step-00000002", ("step-00000002", "manifest.json", "not finished")),
]


@pytest.mark.parametrize("command", ["generate", "eval"])
@pytest.mark.parametrize(("path", "says"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS])
def test_path_that_is_no_checkpoint(command: str, path: str, says: tuple[str, ...], tmp_path: Path):
    write_rows(tmp_path / "train.jsonl", [])
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "step-00000002").mkdir()
    one_line(call(command, path.replace("{folder}", str(tmp_path))), *says)


QUESTIONS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no such image", ("{folder}/none.png",), ("none.png", "no such file")),
    ("no image", ("{folder}/train.jsonl",), ("train.jsonl", "not an image")),
    ("long prompt", ("{folder}/0.png", "--prompt", "why? " * 40), ("the prompt's", "positions", "model.max_seq_len = 64")),
    ("long answer", ("{folder}/0.png", "--max-new-tokens=100"), ("--max-new-tokens = 100", "model.max_seq_len = 64")),
    ("no token", ("{folder}/0.png", "--max-new-tokens=0"), ("--max-new-tokens = 0",)),
    ("top-p", ("{folder}/0.png", "--temperature=1", "--top-p=0"), ("top_p = 0.0",)),
    ("beams", ("{folder}/0.png", "--temperature=1", "--beams=2"), ("beams = 2", "draws nothing")),
    ("override", ("{folder}/0.png", "--model.dim=64"), ("step-00000006", "another shape in the checkpoint")),
    ("surrogate", ("{folder}/0.png", "--prompt", "\udce9"), ("surrogate",)),
]


@pytest.mark.parametrize(("argv", "says"), [row[1:] for row in QUESTIONS], ids=[row[0] for row in QUESTIONS])
def test_question_that_cannot_be_asked(argv: tuple[str, ...], says: tuple[str, ...], trained: Trained):
    one_line(call("generate", trained.run, *(word.replace("{folder}", str(trained.folder)) for word in argv)), *says)


def test_evaluation_without_questions(trained: Trained):
    one_line(call("eval", trained.run, "--data.eval_path="), "data.eval_path = ''", "no held-out data")


def bomb() -> bytes:
    """A PNG of 20000 x 20000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def truncated_jpeg(folder: Path) -> str:
    Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "half.jpg", "JPEG")
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    return "half.jpg"


def huge_png(folder: Path) -> str:
    (folder / "huge.png").write_bytes(bomb())
    return "huge.png"


SKIPPED: list[tuple[str, Callable[[Path], dict], str]] = [
    ("truncated JPEG", lambda folder: {"image": truncated_jpeg(folder)}, "cannot be decoded"),
    ("PNG of 20000 x 20000", lambda folder: {"image": huge_png(folder)}, "exceeds 64000000 pixels"),
    ("empty answer", lambda folder: {"answer": ""}, "empty answer"),
    ("prompt longer than max_text_len", lambda folder: {"prompt": "why? " * 60}, "max_text_len = 48"),
    ("missing image", lambda folder: {"image": "gone.png"}, "no such file"),
    ("image outside of the root", lambda folder: {"image": "../../../etc/passwd"}, "leaves the data root"),
    ("URL", lambda folder: {"image": "https://example.org/a.png"}, "not fetched"),
    ("answer that is an object", lambda folder: {"answer": {}}, "must be a string"),
    ("answer that is null", lambda folder: {"answer": None}, "column 'answer' is null"),
    ("lone surrogate", lambda folder: {"answer": "\ud800"}, "surrogate"),
]


def test_a_single_bad_sample_is_skipped_and_counted(tmp_path: Path):
    make_job(tmp_path)
    rows = rows_of(tmp_path)
    rows[5] |= {"image": truncated_jpeg(tmp_path)}
    write_rows(tmp_path / "train.jsonl", rows)
    ended = call("train", tmp_path / "job.toml", "--data.max_bad_fraction=0.1", "--train.max_steps=4", "--eval.at_end=false")
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    last = metrics(tmp_path / "run")[-1]
    assert last["data/bad_samples"] == 1 and last["data/samples"] == 16  # another sample is in
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == ["jsonl/train[5]"] and "cannot be decoded" in listed[0]["reason"], listed


def test_bad_samples_of_every_kind_are_skipped(tmp_path: Path):
    """Each is met once at least; another one is in for it."""
    make_job(tmp_path)
    rows = rows_of(tmp_path)
    bad = [rows[5] | change(tmp_path) for _, change, _ in SKIPPED]
    write_rows(tmp_path / "train.jsonl", [*rows, *bad, *rows[:2]])
    ended = call("train", tmp_path / "job.toml", "--data.max_bad_fraction=0.9", "--train.max_steps=7", "--eval.at_end=false")
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    last = metrics(tmp_path / "run")[-1]
    assert last["data/bad_samples"] >= len(bad) and last["data/samples"] == 28
    listed = {row["id"]: row["reason"] for row in map(json.loads, (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines())}
    assert listed.keys() == {f"jsonl/train[{16 + k}]" for k in range(len(bad))}
    for k, (kind, _, says) in enumerate(SKIPPED):
        assert says in listed[f"jsonl/train[{16 + k}]"], (kind, listed)


# ---- something else where a file or folder is expected ------------------------------------------------------------------------

OTHER: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "nothing": lambda path: path.write_bytes(b""),
    "a JSON list": lambda path: path.write_text("[1, 2]"),
    "a model's folder with another config": lambda path: (path.mkdir(), (path / "config.json").write_text("[1]")),
    "a config of text for numbers": lambda path: (
        path.mkdir(),
        (path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'),
    ),
}


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_something_else_than_was_meant(make: Callable[[Path], object], tmp_path: Path):
    """Every command, in every place for a path that it reads."""
    job, other = make_job(tmp_path), tmp_path / "other"
    make(other)
    table = [(command, other) for command in ("train", "check", "inspect", "eval")]
    table += [("data", "check", other), ("data", "lm-eval", other, tmp_path / "out"), ("generate", other, tmp_path / "0.png")]
    table += [("export", other, tmp_path / "out"), ("import", other, tmp_path / "out")]
    table += [("check", job, f"--{key}={other}") for key in ("data.path", "data.eval_path", "data.tokenizer", "eval.text_path")]
    table += [("train", job, f"--run.init_from={other}")]
    for argv in table:
        ended = call(*argv)
        assert ended.code == 2 and ended.err.startswith("error: ") and len(ended.err) < 900, (argv, ended)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "out").exists()
