"""``kempnerforge data`` and the page of ``kempnerforge inspect``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import CONFIG, call, make_job, rows_of, write_config, write_rows

HOSTILE = '<script>alert(1)</script>\x1b[2J"><img src=x onerror=alert(2)>'
OUTSIDE = re.compile(r"(?:src|href)=\"(?!data:)|url\(|@import|<script|<link(?! rel=\"icon\" href=\"data:)")


def job_of(folder: Path, rows: list[dict[str, Any]], *, config: str = CONFIG, extra: str = "") -> Path:
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", [{"image": None, "prompt": "q", "answer": "red"}])
    return write_config(folder, config=config, extra=extra)


# ---- data check ------------------------------------------------------------------------------------------------------


def test_check_says_what_is_there(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended = call("data", "check", job, "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    train, held_out = found["sources"]
    assert (train["name"], train["split"], train["read"], train["bad"], train["usable"]) == ("train", "train", 16, 0, True)
    assert (held_out["name"], held_out["split"], held_out["read"], held_out["modes"]) == ("held out", "test", 8, [])
    assert train["totals"]["images"] == train["totals"]["views"] == train["totals"]["texts"] == 16 and train["distinct_images"] == 16
    assert train["positions"]["max"] == train["text_tokens"]["max"] + 4  # positions of an image
    assert [mode["mode"] for mode in train["modes"]][:3] == ["pad", "group", "pack"]
    assert train["limits"] == {"max_text_len": 48, "seq_len": 64, "too_long": 0, "shortened": 0}
    assert train["recommended"]["max_text_len"] == 64 and train["recommended"]["seq_len"] == 128
    (shared,) = found["shared_images"]  # the held-out rows are every second one of the others
    assert shared["images"] == 8 and shared["first"][0] == ["train.jsonl:1", "test.jsonl:1"]
    assert Path(found["page"]) == tmp_path / "run" / "data-check" / "index.html"
    page = Path(found["page"]).read_text()
    assert page.count("<svg") >= 4 and "8 held-out samples are also in the training data as 8 images" in page and not OUTSIDE.search(page)


def test_all_that_is_shared_is_listed_and_check_warns(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    rows = rows_of(tmp_path)
    rows[0] |= {"answer": 3, "id": "first"}
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [rows[0], *rows[4:12]])
    found = json.loads(call("data", "check", job, "--json").out)
    listed = [json.loads(line) for line in Path(found["leaks"]).read_text().splitlines()]
    assert {(line["shared"], line["held_out"]) for line in listed} == {
        *(("image", f"test.jsonl:{k}") for k in range(2, 10)), *(("question", f"test.jsonl:{k}") for k in range(2, 10)),
        ("image", "test.jsonl:1 (first)"), ("question", "test.jsonl:1 (first)"), ("id", "test.jsonl:1 (first)"),
    }  # fmt: skip
    ended = call("check", job, "--json")
    warnings = "\n".join(json.loads(ended.out)["warnings"])
    assert ended.code == 0 and "9 held-out samples share images" in warnings and "1 held-out samples share ids" in warnings
    assert 'data of stages train: 1 values are a number: taken as text, the first as "3"' in warnings
    assert "note: 1 values are a number" in call("inspect", job).out


def test_check_as_text(tmp_path: Path) -> None:
    ended = call("data", "check", make_job(tmp_path), "--out", tmp_path / "seen", "--limit", 12)
    assert ended.code == 0 and (tmp_path / "seen" / "index.html").exists() and not (tmp_path / "run").exists()
    assert (
        "== train: 12 of 16 samples read" in ended.out
        and "held out: 8 samples, 8 questions; of 8 samples 0 cannot be read" in ended.out
        and "group (the job's)" in ended.out
        and "recommended: vlm.max_text_len = 64" in ended.out
    )
    assert "warning: stages train: " in ended.err and re.search(r"train.jsonl:\d+ and test.jsonl:\d", ended.err)


def test_check_lists_what_cannot_be_used(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    rows[3]["image"], rows[5]["answer"], rows[7]["answer"] = "gone.png", " ", "red " * 90
    (tmp_path / "9.png").write_bytes(b"no image")
    job = job_of(tmp_path, rows)
    ended = call("data", "check", job, "--json")
    found = json.loads(ended.out)
    assert ended.code == 2 and found["sources"][0]["usable"] is False
    lines = [json.loads(line) for line in Path(found["bad_samples"]).read_text().splitlines()]
    assert [(line["id"], line["kind"]) for line in lines] == [
        ("train.jsonl:4", "image"), ("jsonl/train[5]", "row"), ("train.jsonl:8", "length"), ("train.jsonl:10", "image")
    ]  # fmt: skip
    assert found["sources"][0]["bad_kinds"] == {"image": 2, "row": 1, "length": 1}
    assert all(line["reason"] for line in lines) and lines[0]["index"] == 3
    ended = call("data", "check", job, "--data.max_bad_fraction=0.3", "--no-images")
    assert ended.code == 0 and "unusable: 2, " in ended.out


def test_check_of_stages_and_text(tmp_path: Path) -> None:
    stages = '[[stages]]\nname = "a"\nsteps = 1\n[[stages]]\nname = "b"\nsteps = 1\n[[stages]]\nname = "c"\nsteps = 1\ntrain.seq_len = 60\n'
    job = make_job(tmp_path, extra=stages)
    found = json.loads(call("data", "check", job, "--json").out)
    assert [(one["name"], one["limits"]["seq_len"]) for one in found["sources"]] == [("a, b", 64), ("c", 60), ("held out", 60)]
    (tmp_path / "text.txt").write_text("red green blue " * 300)
    lines = [line for line in CONFIG.splitlines() if not line.startswith(("eval_path", "prompt_column"))]
    config = (
        "\n".join(lines).replace('"jsonl"', '"text"').replace("train.jsonl", "text.txt").replace('[vision_encoder]\ntype = "vit"', "[X]")
    )
    config = re.sub(r"^\[(X|adapter|vlm)\]\n((?!\[).*\n?)*", "", config, flags=re.MULTILINE)
    ended = call("data", "check", write_config(tmp_path, "text.toml", config=config + "\n"), "--json")
    (text,) = json.loads(ended.out)["sources"]
    assert ended.code == 0 and text["bad"] == 0 and text["totals"]["images"] == 0 and text["positions"]["max"] == 64


def test_hostile_rows_stay_text(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    for row in rows:
        row["prompt"] = row["answer"] = HOSTILE
    rows[2]["image"] = HOSTILE + ".png"
    job = job_of(tmp_path, rows, config=CONFIG.replace("48", "400").replace("= 64", "= 512"))
    ended = call("data", "check", job, "--data.max_bad_fraction=0.5")
    assert ended.code == 0 and "\x1b[2J" not in ended.out + ended.err
    seen = call("inspect", job, "-n", 16, "--data.max_bad_fraction=0.5")
    assert seen.code == 0 and "\x1b[2J" not in seen.out and "\\x1b[2J" in seen.out
    for name in ("data-check", "inspect"):
        page = (tmp_path / "run" / name / "index.html").read_text()
        assert "<script" not in page and "onerror=alert" not in re.sub(r"&[a-z]+;.*?onerror", "", page) and "\x1b" not in page
        assert "&lt;script&gt;" in page or name == "data-check"


@pytest.mark.parametrize("argv", [("check",), ("fetch",), ("look", "a.toml"), ()])
def test_wrong_usage(argv: tuple[str, ...]) -> None:
    ended = call("data", *argv)
    assert ended.code == 2 and "usage: kempnerforge data" in ended.err


def test_wrong_values(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    for argv in (("--workers", 0), ("--limit", -1)):
        ended = call("data", "check", job, *argv)
        assert ended.code == 2 and f"argument {argv[0]}: {argv[1]}: must be " in ended.err
    assert call("data", "check", tmp_path / "none.toml").code == 2


def test_fetch_asks_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []

    def fetch(name: str, root: Path, say: Callable[[str], None]) -> Path:
        say("takes a minute")
        asked.append((name, root))
        return root / name

    monkeypatch.setattr("kempnerforge.data.collections.fetch.fetch", fetch)
    ended = call("data", "fetch", "stamps", "--root", tmp_path)
    assert (
        ended.code == 0 and ended.out == f"{tmp_path / 'stamps'}\n" and ended.err == "takes a minute\n" and asked == [("stamps", tmp_path)]
    )
    assert call("data", "fetch", "stamps", "--data.path=x").code == 2


def test_fetch_knows_what_there_is(tmp_path: Path) -> None:
    ended = call("data", "fetch", "nothing", "--root", tmp_path)
    assert ended.code == 2 and "nothing" in ended.err and "stamps" in ended.err and ended.out == ""


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_as_json_and_as_a_page(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no image")
    ended = call("inspect", job, "-n", 16, "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    (stage,) = found["stages"]
    assert stage["findings"] == [] and stage["name"] == "train" and len(stage["rows"]) == 16
    assert stage["skipped"][0]["sample"] == "jsonl/train[5]" and "not an image" in stage["skipped"][0]["reason"]
    assert stage["sources"][0]["source"] == "jsonl" and stage["sources"][0]["samples"] == 16
    shares = stage["shares"]
    assert shares["positions"] == sum(shares[key] for key in ("padding", "image", "prompt", "trained")) and shares["image"] == 64
    assert stage["useful_share"] == pytest.approx(1 - shares["padding"] / shares["positions"])
    for row in stage["rows"]:  # what is trained is the answer and EOS
        pieces = [piece for segment in row["segments"] for piece in segment["pieces"] if piece["trained"]]
        text = "".join(piece["text"] for piece in pieces)
        assert text.removesuffix("<eos>") in ("red", "green", "blue", "yellow") and pieces[-1]["what"] == "special"
    page = Path(found["page"]).read_text()
    assert page.count("data:image/png;base64,") == 16 and not OUTSIDE.search(page) and page.count('<article class="card row">') == 16
    assert "nothing found wrong" in page and "jsonl/train[5]" in page


def test_inspect_shows_packs_and_conversations(tmp_path: Path) -> None:
    turns = '\n[data.turns]\nuser = "U: {prompt}\\n"\nassistant = "A: "\n'
    config = CONFIG.replace('prompt_column = "prompt"', 'prompt_column = "prompt"\nbatching = "pack"\ntemplate = "turns"')
    config = config.replace("max_text_len = 48", "max_text_len = 60").replace("seq_len = 64", "seq_len = 128")
    job = make_job(tmp_path, config=config, extra=turns)
    ended = call("inspect", job, "-n", 5, "--json")
    assert ended.code == 0, ended
    (stage,) = json.loads(ended.out)["stages"]
    assert stage["findings"] == [] and all(len(row["samples"]) > 1 for row in stage["rows"])
    assert sum(len(row["samples"]) for row in stage["rows"]) >= 5 > len(stage["rows"])
    shown = call("inspect", job, "-n", 5)
    assert "  sample 1 (train.jsonl:" in shown.out and "\\nA: [" in shown.out


def test_inspect_of_a_mixture_shows_each_source(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"prompt": f"say {k}", "answer": "yes"} for k in range(40)])
    make_job(tmp_path)
    parts = f'''
[data]
source = "mixture"
tokenizer_vocab_size = 300
weights = [0.1, 0.9]
[[data.parts]]
source = "jsonl"
path = "{tmp_path}/train.jsonl"
eval_path = "{tmp_path}/test.jsonl"
prompt_column = "prompt"
[[data.parts]]
source = "jsonl"
path = "{folder}/train.jsonl"
prompt_column = "prompt"
image_column = ""
'''
    config = re.sub(r"\[data\]\n([^\[]*)", "", CONFIG)
    job = write_config(tmp_path, "mixture.toml", config=config, extra=parts)
    ended = call("inspect", job, "-n", 3, "--json")
    assert ended.code == 0, ended
    (stage,) = json.loads(ended.out)["stages"]
    assert [source["source"] for source in stage["sources"]] == ["jsonl #1", "jsonl #2"]
    seen = [sample["part"] for row in stage["rows"] for sample in row["samples"]]
    assert seen.count(0) == seen.count(1) == 3 and stage["findings"] == []
    assert stage["sources"][0]["samples"] < stage["sources"][1]["samples"]
    assert "source jsonl #2: " in call("inspect", job, "-n", 3).out
    checked = json.loads(call("data", "check", job, "--json").out)["sources"][0]
    assert [(part["name"], part["samples"], part["totals"]["images"]) for part in checked["sources"]] == [
        ("jsonl #1", 16, 16),
        ("jsonl #2", 40, 0),
    ]


def test_inspect_refuses_wrong_numbers(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert call("inspect", job, "-n", 0).code == call("inspect", job, "--step", -1).code == 2


# ---- data lm-eval ----------------------------------------------------------------------------------------------------


def test_held_out_questions_become_a_task(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended = call("data", "lm-eval", job, tmp_path / "task", "--limit", 3)
    assert ended.code == 0 and "task kempnerforge_vqa, 3 questions, 0 left out" in ended.err, ended
    assert {path.name for path in (tmp_path / "task").iterdir()} == {"kempnerforge_vqa.yaml", "questions.parquet", "vqa.py"}
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").write_bytes(b"no image")
    ended = call("data", "lm-eval", job, tmp_path / "task", "--eval.max_new_tokens=9")
    assert ended.code == 0 and "7 questions, 1 left out" in ended.err and "left out: test.jsonl:2: image " in ended.err, ended
    assert "max_gen_toks: 9\n" in (tmp_path / "task" / "kempnerforge_vqa.yaml").read_text()
    ended = call("data", "lm-eval", job, tmp_path / "task", "--limit", -1)
    assert ended.code == 2 and "argument --limit: -1: must be at least 0" in ended.err
    ended = call("data", "lm-eval", job, tmp_path / "task", "--data.eval_path=")
    assert ended.code == 2 and "names no held-out data" in ended.err, ended
