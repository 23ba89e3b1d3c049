"""What each command prints, writes and returns."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers as hf
from PIL import Image

from kempnerforge.cli.main import COMMANDS, parser, split_overrides
from kempnerforge.config import load_config, to_toml
from tests.cli.conftest import Trained
from tests.interop.tiny_vlms import TEXT, write_tokenizer
from tests.training.tiny import call, end_of, launch, make_job, metrics, start

TWO_STAGES = """
[[stages]]
name = "first"
steps = 2
[[stages]]
name = "second"
steps = 2
train.batch_size = 2
freeze = [{ module = "vision_encoder" }]
optimizer.lr_scale = { adapter = 0.5 }
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- help and exit codes ---------------------------------------------------------------------------------------------


def test_help_names_every_command():
    ended = call("--help")
    assert ended.code == 0 and all(f"\n    {name} " in ended.out for name in COMMANDS), ended.out
    for word in ("--section.key=value", "130 interrupted after saving"):
        assert word in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_worth_reading(name: str):
    ended = call(name, "--help")
    assert ended.code == 0 and ended.err == ""
    assert len(ended.out.split("options:")[0]) > 250 and "exit codes: 0 done; 2" in ended.out
    options = ended.out.split("options:")[1].split("Any key")[0]
    for line in options.splitlines():
        words = line.split()
        if words and words[0].startswith("--") and words[0] not in ("--top-k", "--top-p", "--seed"):
            assert len(words) > 3 or options.split(line)[1].startswith("\n" + " " * 20), f"{name}: {line!r} explains nothing"


@pytest.mark.parametrize("argv", [(), ("trian",), ("train",), ("generate",), ("inspect", "a.toml", "-n", "many")])
def test_wrong_usage_is_exit_code_2(argv: tuple[str, ...]):
    ended = call(*argv)
    assert ended.code == 2 and "usage: kempnerforge" in ended.err and ended.out == ""


def numbers(commands: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """Every option that is a number, and the words of its command."""
    for action in commands._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from numbers(command, (*words, name))
        elif getattr(action.type, "__name__", "") in ("int", "float"):
            yield words, action


def test_numbers_on_the_command_line_have_a_range():
    """A number that makes no sense is refused with the name of its option, before anything is read."""
    tried = list(numbers(parser()))
    for words, action in tried:
        (option, *_), needed = action.option_strings, ["a"] * 3
        for value in ("9223372036854775808", "-9223372036854775809", "1e999", "nan", "-inf", "many"):
            ended = call(*words, f"{option}={value}" if option.startswith("--") else f"{option}{value}", *needed)
            assert ended.code == 2 and f"argument {option}: " in ended.err and "Traceback" not in ended.err, (words, ended)
    found = {option for _, action in tried for option in action.option_strings}
    assert {"--nproc", "--limit", "--workers", "-n", "--step", "--port", "--tolerance", "--top-k", "--temperature", "--seed"} <= found


@pytest.mark.parametrize(
    "argv",
    [
        *(("train", "a", f"--nproc={value}") for value in (0, -1, 5000)),
        *(("eval", "a", f"--limit={value}") for value in (-1, 1 << 31)),
        *(("data", "lm-eval", "a", "b", f"--limit={value}") for value in (-1, 1 << 31)),
        *(("inspect", "a", word) for word in ("-n0", "-n=-3", "--step=-1")),
        *(("generate", "a", word) for word in ("--temperature=-1", "--top-k=-1", "--top-p=1.5", "--top-p=-1", "--max-new-tokens=-1")),
        *(("serve", "a", f"--port={value}") for value in (-1, 65536)),
        ("import", "a", "b", "--tolerance=-1"),
    ],
)
def test_numbers_out_of_their_range(argv: tuple[str, ...]):
    ended = call(*argv)
    assert ended.code == 2 and f"argument {argv[-1].partition('=')[0].rstrip('0123456789')}: " in ended.err, ended


def test_module_and_script_are_the_same_program(tmp_path: Path):
    ended = end_of(launch("train", tmp_path / "none.toml"))
    assert ended.code == 2 and ended.err == f"error: {tmp_path / 'none.toml'}: no such file\n"


@pytest.mark.parametrize("lines", [0, 1])
def test_output_may_be_cut_off(lines: int, tmp_path: Path):
    """As `| head -0` and `| head -1` do it; the rest is written by rich."""
    process = start("check", make_job(tmp_path))
    assert process.stdout is not None and process.stderr is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and error == ""


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_in_both_forms_wherever_they_stand(tmp_path: Path):
    job = make_job(tmp_path)
    first = call("train", job, "--print-config", "--model.dim=64", "--optimizer.lr=1e-4", "--data.prompt_template=Q: {prompt}")
    second = call("train", "--model.dim", "64", "--print-config", "--optimizer.lr", "1e-4", job, "--data.prompt_template", "Q: {prompt}")
    assert first.code == second.code == 0 and first == second
    (tmp_path / "out.toml").write_text(first.out)
    read = load_config(tmp_path / "out.toml")
    assert (read.model.dim, read.optimizer.lr, read.data.prompt_template) == (64, 1e-4, "Q: {prompt}")


def test_split_overrides():
    words = ["generate", "run", "--train.seed", "-1", "a.png", "--json", "--data.root=", "--data.path", "--prompt", "a.b"]
    kept, overrides = split_overrides(words)
    assert kept == ["generate", "run", "a.png", "--json", "--prompt", "a.b"]
    assert overrides == ["--train.seed", "-1", "--data.root=", "--data.path"]


def test_an_override_may_be_empty(tmp_path: Path):
    ended = call("train", make_job(tmp_path), "--print-config", "--data.eval_path", "")
    assert ended.code == 0 and 'eval_path = ""' in ended.out


# ---- train -----------------------------------------------------------------------------------------------------------


def test_print_config_is_the_resolved_toml_alone(tmp_path: Path):
    job = make_job(tmp_path, extra=TWO_STAGES)
    ended = call("train", job, "--print-config", "--train.max_steps=3")
    assert ended.code == 0 and ended.err == ""
    (tmp_path / "out.toml").write_text(ended.out)
    assert load_config(tmp_path / "out.toml") == load_config(job, ["--train.max_steps=3"])
    assert to_toml(load_config(tmp_path / "out.toml")) == ended.out
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(tmp_path: Path):
    job = make_job(tmp_path, extra=TWO_STAGES)
    before = tree(tmp_path)
    ended = call("train", job, "--dry-run", "--train.max_steps=4")
    assert ended.code == 0 and ended.out == "" and tree(tmp_path) == before and not (tmp_path / "run").exists()
    lines = ended.err.splitlines()
    assert lines[0].startswith("stage first: first batch 4 x ") and lines[1].startswith("stage second: first batch 2 x ")
    assert lines[-1] == "nothing was written"
    assert 5 < float(lines[0].split("loss ")[1].split()[0]) < 6  # ln(300) = 5.7


@pytest.mark.parametrize("argv", [("train", "--dry-run"), ("check",)])
def test_patterns_without_a_hit_are_found_without_training(argv: tuple[str, ...], tmp_path: Path):
    job = make_job(tmp_path, extra='\n[[vlm.freeze_schedule]]\nstart_step = 3\nspecs = [{ module = "vision_encodr" }]\n')
    ended = call(argv[0], job, *argv[1:])
    assert ended.code == 2 and "vision_encodr" in ended.err and "matches no parameter" in ended.err


def test_a_run_leaves_what_it_should(trained: Trained):
    found = {path.name for path in trained.run.iterdir()}
    assert {"config.toml", "checkpoints", "metrics.jsonl", "summary.json", "report.html", "tokenizer"} <= found
    assert load_config(trained.run / "config.toml") == load_config(trained.job)
    assert trained.ended.out == "" and "6/6" in trained.ended.err and "eval/exact_match" in trained.ended.err


def test_events_for_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=2", "--metrics.tensorboard=true", "--eval.at_end=false").code == 0
    events = EventAccumulator(str(tmp_path / "run" / "events")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert written == [(row["step"], pytest.approx(row["train/loss"])) for row in metrics(tmp_path / "run")]


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_prints_config_and_tables(tmp_path: Path):
    job = make_job(tmp_path, extra=TWO_STAGES)
    before = tree(tmp_path)
    ended = call("check", job)
    assert ended.code == 0 and tree(tmp_path) == before
    config = to_toml(load_config(job)).split("[model]")[1].splitlines()[1]
    assert config in call("check", job, "--print-config").out and config not in ended.out
    for part in (
        "stage first: steps 0 to 2",
        "stage second: steps 2 to 4",
        "transformer.layers",
        "vision_encoder",
        "adapter",
        "total",
        "MiB",
    ):
        assert part in ended.out, part
    second = ended.out.split("stage second")[1]
    row = next(line for line in second.splitlines() if "vision_encoder" in line)
    assert "frozen" in row and " 0 " in row


def test_check_json_is_one_object(tmp_path: Path, trained: Trained):
    job = make_job(tmp_path, extra=TWO_STAGES)
    ended = call("check", job, "--json", "--train.max_steps=2")
    found = json.loads(ended.out)
    assert ended.code == 0 and [stage["name"] for stage in found["stages"]] == ["first"]
    said = found["warnings"]  # the job of these tests is evaluated on what it trains on
    assert "'second' starts at step 2 and never runs" in said[0] and all("held-out samples share" in line for line in said[1:])
    first = found["stages"][0]
    assert first["parameters"] == first["trainable"] == json.loads((trained.run / "summary.json").read_text())["parameters"]
    assert first["parameters"] == sum(module["parameters"] for module in first["modules"].values())
    assert first["flops_per_sample"] > 0 and 0 < first["useful_share"] <= 1


def test_check_says_as_what_it_can_be_exported(tmp_path: Path):
    job = make_job(tmp_path)
    said = call("check", job).out
    found = json.loads(call("check", job, "--json").out)["export"]
    assert found["format"] == "kempnerforge" and "vision_encoder.type = 'vit', not 'clip'" in found["reason"]
    assert f"export: kempnerforge only, because {found['reason']}\n" in said
    sizes = "hidden_size = 32, num_attention_heads = 2, num_hidden_layers = 2, image_size = 16, patch_size = 8"
    tower = f'[vision_encoder]\ntype = "clip"\nsettings = {{ model_type = "clip_vision_model", {sizes} }}\n\n'
    parts = re.split(r"(?m)^(?=\[)", job.read_text().replace('"gelu"', '"swiglu"').replace('"linear"', '"mlp_2layer"'))
    job.write_text("".join(tower if part.startswith("[vision_encoder]") else part for part in parts))
    ended = call("check", job)
    assert ended.code == 0 and "export: hf (LlavaForConditionalGeneration)\n" in ended.out, ended
    as_json = json.loads(call("check", job, "--json").out)
    assert as_json["export"] == {"format": "hf", "class": "LlavaForConditionalGeneration", "reason": None}


def test_warnings_of_check_are_on_stderr(tmp_path: Path):
    ended = call("check", make_job(tmp_path, extra=TWO_STAGES), "--train.max_steps=2")
    first, *leaks = ended.err.splitlines()
    assert ended.code == 0 and first == "warning: stage 'second' starts at step 2 and never runs, train.max_steps = 2"
    assert len(leaks) == 2 and all("held-out samples share" in line and "with the training data" in line for line in leaks)


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_rows_with_trained_tokens_marked(tmp_path: Path):
    job = make_job(tmp_path, extra=TWO_STAGES)
    ended = call("inspect", job, "-n", 3, "--out", tmp_path / "seen")
    assert ended.code == 0, ended
    rows = [line for line in ended.out.splitlines() if "<eos>" in line]
    assert len(rows) == 6
    for row in rows:  # the answer and EOS, nothing else
        before, trained = row.split("?\\n")
        assert trained.startswith("[") and trained.endswith("<eos>]") and trained[1:-6] in ("red", "green", "blue", "yellow")
        assert "<bos>what is on the " in before and "[" not in before
    assert ended.out.count("== stage ") == 2
    for stage in ("first", "second"):
        with Image.open(tmp_path / "seen" / f"contact-sheet-{stage}.png") as sheet:
            assert min(sheet.size) > 100
    assert not (tmp_path / "run").exists()


def test_inspect_agrees_with_the_data(tmp_path: Path):
    """Read back from the labels, every question has the answer of its row."""
    job = make_job(tmp_path)
    truth = {(row["image"], row["prompt"]): row["answer"] for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())}
    ended = call("inspect", job, "-n", 16, "--out", tmp_path / "seen")
    blocks = ended.out.split("row ")[1:]
    seen = {}
    for block in blocks:
        number = int(block.split("train.jsonl:")[1].split(")")[0]) - 1
        text = next(line for line in block.splitlines() if "<eos>" in line)
        seen[f"{number}.png", text.split("<bos>")[1].split("\\n")[0]] = text.split("\\n[")[1].removesuffix("<eos>]")
    assert seen == truth


def test_inspect_looks_at_another_step(tmp_path: Path):
    job = make_job(tmp_path)
    outs = [call("inspect", job, "-n", 4, "--step", step, "--out", tmp_path / "seen").out for step in (0, 1, 4)]
    rows = [{line.split("(")[1].split(")")[0] for line in out.splitlines() if line.startswith("row ")} for out in outs]
    assert rows[0].isdisjoint(rows[1])  # one epoch has four steps


def test_inspect_names_what_is_skipped(tmp_path: Path):
    job = make_job(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no image")
    ended = call("inspect", job, "-n", 16, "--out", tmp_path / "seen")
    assert ended.code == 0 and "skipped: jsonl/train[5]: " in ended.out and "not an image" in ended.out


def test_inspect_fails_on_labels_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kempnerforge.inspection.rows_page.audit", lambda batch, eos_id, **known: ["row 0: no trained token"])
    ended = call("inspect", make_job(tmp_path), "-n", 2, "--out", tmp_path / "seen")
    assert ended.code == 2 and "WRONG: row 0: no trained token" in ended.out


# ---- generate and eval -----------------------------------------------------------------------------------------------


def test_generate_streams_the_text_that_json_has(trained: Trained):
    images = [trained.folder / "0.png", trained.folder / "7.png"]
    for argv in (
        (),
        ("--beams=3",),
        ("--temperature=2", "--seed=3"),
        ("--temperature=5", "--top-k=40", "--top-p=0.9", "--max-new-tokens=30"),
    ):
        as_json = call("generate", trained.run, images[0], "--prompt", "what is on the left?", "--json", *argv)
        streamed = call("generate", trained.run, images[0], "--prompt", "what is on the left?", *argv)
        assert as_json.code == streamed.code == 0
        found = json.loads(as_json.out)
        assert found["checkpoint"] == str(trained.run / "checkpoints" / "step-00000006")
        assert [(a["image"], a["prompt"]) for a in found["answers"]] == [(str(images[0]), "what is on the left?")]
        assert streamed.out == found["answers"][0]["answer"] + "\n"
    both = call("generate", trained.run, *images, "--prompt", "what is on the left?")
    answers = json.loads(call("generate", trained.run, *images, "--prompt", "what is on the left?", "--json").out)["answers"]
    assert both.out == "".join(f"{image}: {a['answer']}\n" for image, a in zip(images, answers, strict=True))


def test_generate_takes_an_export(trained: Trained, tmp_path: Path):
    """Of ours it is the run's answer. A directory of transformers has no config of ours."""
    words = (trained.folder / "0.png", "--prompt", "what is on the left?", "--json")
    assert call("export", trained.run, tmp_path / "own", "--format=kempnerforge").code == 0
    found = call("generate", tmp_path / "own", *words, "--train.mixed_precision=fp32")
    assert found.code == 0, found.err
    want = json.loads(call("generate", trained.run, *words, "--train.mixed_precision=fp32").out)["answers"]
    assert json.loads(found.out) == {"checkpoint": str(tmp_path / "own"), "answers": want}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", prefix=True)
    found = call("generate", tmp_path / "hf", "--prompt", "what is", "--json", "--max-new-tokens=4")
    assert found.code == 0 and len(json.loads(found.out)["answers"]) == 1, found.err
    ended = call("generate", tmp_path / "hf", "--train.seed=3")
    assert ended.code == 2 and f"--train.seed=3: {tmp_path}/hf is a model of transformers" in ended.err, ended.err


def test_generate_without_an_image_says_so(trained: Trained):
    ended = call("generate", trained.run)
    assert ended.code == 0 and "no image was given" in ended.err
    found = json.loads(call("generate", trained.run, "--json").out)
    assert found["answers"][0]["image"] is None


def test_images_may_stand_behind_options(trained: Trained):
    image, other = trained.folder / "0.png", trained.folder / "7.png"
    words = ("--prompt", "what is on the left?", "--json")
    outs = [call("generate", trained.run, *argv).out for argv in ((image, other, *words), (image, *words, other), (*words, image, other))]
    assert outs[0] == outs[1] == outs[2] and len(json.loads(outs[0])["answers"]) == 2
    assert call("generate", trained.run, *words, "--tempreature", image).code == 2


@pytest.mark.parametrize("words", [("--image", "0.png"), ("--image=0.png",)])
@pytest.mark.parametrize("name", ["generate", "chat"])
def test_an_image_needs_no_option(name: str, words: tuple[str, ...], trained: Trained):
    ended = call(name, trained.run, *words)
    assert ended.code == 2 and f"images are written without a name: kempnerforge {name} RUN a.png" in ended.err


def test_generate_draws_by_its_seed(trained: Trained):
    argv = ("generate", trained.run, trained.folder / "0.png", "--temperature=3", "--json")
    outs = [call(*argv, f"--seed={seed}").out for seed in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]


def test_eval_repeats_the_numbers_of_the_run(trained: Trained):
    summary = json.loads((trained.run / "summary.json").read_text())
    ended = call("eval", trained.run, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and found["step"] == 6 and found["unreadable"] == 0
    for key in ("exact_match", "exact_match_blind", "questions"):
        assert found[key] == summary[key]
    assert sum(total for _, total in found["by_answer"].values()) == found["questions"] == 8
    earlier = json.loads(call("eval", trained.run / "checkpoints" / "step-00000004", "--json", "--limit=3").out)
    assert earlier["step"] == 4 and earlier["questions"] == 3


def test_eval_as_a_table(trained: Trained):
    ended = call("eval", trained.run)
    assert ended.code == 0 and "exact_match_blind" in ended.out
    assert "/" in ended.err and "%" in ended.err


def test_checkpoint_works_without_its_run(trained: Trained, tmp_path: Path):
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(trained.run / "checkpoints" / "step-00000006", moved)
    argv = (trained.folder / "3.png", "--prompt", "what is on the left?", "--json")
    answers = [json.loads(call("generate", path, *argv).out)["answers"] for path in (trained.run, moved)]
    assert answers[0] == answers[1]


def test_eval_of_a_broken_checkpoint_falls_back_or_refuses(tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=4", "--eval.at_end=false").code == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    file = next(newest.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert json.loads(call("eval", tmp_path / "run", "--json").out)["step"] == 2
    ended = call("eval", newest)
    assert ended.code == 2 and "step-00000004" in ended.err and "bytes instead of" in ended.err
