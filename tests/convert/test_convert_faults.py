"""``kempnerforge import`` and ``export`` where something is wrong: said so by name, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import kempnerforge
from kempnerforge.checkpoint import find
from kempnerforge.cli.main import run
from kempnerforge.config import load_config
from kempnerforge.config.adapter import LinearAdapterConfig
from kempnerforge.config.vision import ClipConfig
from kempnerforge.convert import commands as convert
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.inference import model as restoring
from kempnerforge.inference.model import TrainedModel
from kempnerforge.interop import write
from kempnerforge.interop.write import fresh
from tests.convert.test_convert import llava_like, ours
from tests.interop.tiny_vlms import TOWER, save
from tests.training.tiny import call, make_job


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    save("llava", path)
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ours(tmp_path_factory.mktemp("ours") / "run", **llava_like())


# ---- what is left behind --------------------------------------------------------------------------------------------


def test_a_fresh_directory_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for out in (tmp_path / "a" / "b", tmp_path / "empty", tmp_path / "link"):
        with pytest.raises(KeyboardInterrupt), fresh(out) as part:
            (part / "folder").mkdir()
            (part / "folder" / "file").write_text("half")
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"] and not any((tmp_path / "empty").iterdir())
    with fresh(tmp_path / "link") as part:
        (part / "file").write_text("whole")
    assert (tmp_path / "link" / "file").read_text() == "whole" and (tmp_path / "link").is_symlink()
    with pytest.raises(ValueError, match="already there"), fresh(tmp_path / "empty"):
        pass


def test_an_import_that_is_interrupted_can_be_done_again(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_training", interrupted)
        assert run(["import", str(llava), str(tmp_path / "out"), "--no-verify"]) == 130
    assert not (tmp_path / "out").exists()
    import_model(llava, tmp_path / "out", verify=False)


@pytest.mark.parametrize("command", ["import", "export"])
def test_where_nothing_can_be_written_is_found_first(
    command: str, llava: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "load_external", lambda *args, **more: pytest.fail("read all the same"))
    monkeypatch.setattr(TrainedModel, "restore", lambda *args, **more: pytest.fail("read all the same"))
    assert run([command, str(llava if command == "import" else run_dir), "/proc/nothing/out"]) == 2
    assert "/proc/nothing" in capsys.readouterr().err


# ---- from there on --------------------------------------------------------------------------------------------------


def test_an_imported_model_trains_on_as_it_says(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is a run directory already; the config in it makes another one, wherever one stands."""
    data = make_job(tmp_path / "data").parent
    monkeypatch.chdir(tmp_path)
    import_model(llava, Path("runs/mine"), verify=False)
    job = load_config(Path("runs/mine/config.toml"))
    assert Path(job.run.init_from) == tmp_path / "runs" / "mine" and Path(job.run.dir).resolve() != Path("runs/mine").resolve()
    keys = (f"--data.path={data}/train.jsonl", f"--data.root={data}", "--train.max_steps=1", "--train.batch_size=2")
    ended = call("train", "runs/mine/config.toml", *keys, "--metrics.tensorboard=false")
    assert ended.code == 0, ended.err
    assert find(tmp_path / job.run.dir / "checkpoints") is not None


def test_a_checkpoint_by_another_name(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step-00000007", tmp_path / "best-model")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/exact_match": 0.25}\n')  # of something else
    export_model(tmp_path / "best-model", tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "At step 7" in card and "None were measured" in card


def test_metrics_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    rows = [{"step": 5, "eval/a": 0.5}, {"step": 7, "eval/a": 0.75}, {"step": 9, "eval/a": 1.0}, [], {"step": "7", "eval/a": 2}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    export_model(tmp_path / "run", tmp_path / "out", "kempnerforge")
    assert "| `eval/a` | 0.75 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("shard_bytes", [write.SHARD_BYTES, 20_000])
def test_our_own_form_needs_nothing_else(shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the directory that the tower came from, nor that all fits in one file."""
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER))
    tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    encoder = ClipConfig(feature_layer=-2, path=str(tmp_path / "tower"))
    made = ours(tmp_path / "run", **llava_like(vision_encoder=encoder, adapter=LinearAdapterConfig()))
    (tmp_path / "tower" / "model.safetensors").unlink()  # a checkpoint has its weights
    before, reading = kempnerforge.load_pretrained(made, device="cpu", dtype=torch.float32)
    save_all = write.save_tensors
    monkeypatch.setattr(convert, "save_tensors", lambda out, tensors, progress: save_all(out, tensors, shard_bytes, progress))
    export_model(made, tmp_path / "out", "kempnerforge")
    shutil.rmtree(tmp_path / "tower")
    after, processor = kempnerforge.load_pretrained(tmp_path / "out", device="cpu")
    batch = reading(images=torch.zeros(9, 9, 3, dtype=torch.uint8).numpy(), text="what?").batch
    assert before.normalisation == after.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert processor(text="what?").input_ids.tolist() == reading(text="what?").input_ids.tolist()
    with torch.no_grad():
        assert torch.equal(before.encode(batch.images), after.encode(batch.images))  # type: ignore[arg-type]
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)
    files[0].write_bytes(b"cut off")
    with pytest.raises(ValueError, match="model.*safetensors: cannot be read"):
        kempnerforge.load_pretrained(tmp_path / "out")


def test_weights_are_fp32_unless_asked_otherwise(llava: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "auto" is bf16, as on a GPU."""
    monkeypatch.setattr(restoring, "compute_dtype", lambda asked, device: torch.float32 if asked == "fp32" else torch.bfloat16)
    import_model(llava, tmp_path / "imported", verify=False)
    export_model(run_dir, tmp_path / "exported", "kempnerforge", dtype="bf16", verify=False)
    for path in (llava, run_dir, tmp_path / "imported", tmp_path / "exported"):
        for dtype, want in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
            model, _ = kempnerforge.load_pretrained(path, device="cpu", dtype=dtype)
            assert {p.dtype for p in model.parameters()} == {want}, (path, dtype)


def test_pixels_are_as_exact_in_another_dtype(run_dir: Path) -> None:
    model, _ = kempnerforge.load_pretrained(run_dir, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("form", ["hf", "kempnerforge"])
def test_a_family_that_nothing_reads(form: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(run_dir), str(tmp_path / "out"), "--format", form, "--family", "mistral"]) == 2
    assert "--family = 'mistral': only a language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- files that are broken ------------------------------------------------------------------------------------------


def set_key(name: str, *keys: str, value: Any = None) -> Callable[[Path], object]:
    """Changes a value of a JSON file, or takes it out."""

    def change(path: Path) -> None:
        table = inner = json.loads((path / name).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        (path / name).write_text(json.dumps(table))

    return change


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def split(path: Path, metadata: dict[str, Any], more: dict[str, torch.Tensor]) -> None:
    """As two shards with an index; the second one has ``more`` than it says."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    (path / "model.safetensors").unlink()
    places = {name: f"{'ab'[k > 5]}.safetensors" for k, name in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        kept = {name: tensors[name] for name in names if places[name] == file}
        save_file(kept | (more if file[0] == "b" else {}), path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(metadata | {"weight_map": places}))


CONFIG, IMAGES = "config.json", "preprocessor_config.json"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list": (put(CONFIG, "[]"), r"config\.json: holds no JSON object"),
    "wrong type": (set_key(CONFIG, "text_config", "hidden_act", value=3), r"config\.json: llava: .*hidden_act.* expected str"),
    "a number for a table": (set_key(CONFIG, "vision_config", value=3), r"config\.json"),
    "no heads": (
        set_key(CONFIG, "text_config", "num_attention_heads", value=0),
        r"config\.json: text_config.num_attention_heads = 0: must be at least 1",
    ),
    "kind in a list": (set_key(CONFIG, "model_type", value=["llava"]), r"config\.json"),
    "images a list": (put(IMAGES, "[]"), r"preprocessor_config\.json: holds no JSON object"),
    "images cut off": (put(IMAGES, "{"), r"preprocessor_config\.json: not JSON"),
    "mean of one": (set_key(IMAGES, "image_mean", value=0.5), r"its image processor has image_mean = 0\.5, .*three numbers each"),
    "rows": (
        set_key(CONFIG, "text_config", "vocab_size", value=341),
        r"LlavaForConditionalGeneration are 2 of another shape: lm_head\.weight \(340, 32\), not",
    ),
    "index": (lambda path: split(path, {}, {}), "does not load it; KeyError: 'metadata'"),
    "shard": (lambda path: split(path, {"metadata": {}}, {"more.weight": torch.ones(2)}), "has no place for 1: more.weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, why = BROKEN[name]
    shutil.copytree(llava, tmp_path / "source")
    change(tmp_path / "source")
    assert run(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(why, said), said
    assert not (tmp_path / "out").exists()


def test_settings_that_a_file_leaves_out(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "source")
    set_key(CONFIG, "text_config", "model_type")(tmp_path / "source")
    done = import_model(tmp_path / "source", tmp_path / "out")
    assert done.difference is not None and done.difference <= 1e-5


def test_a_model_that_reads_backwards_is_none_of_ours(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    config = hf.Gemma3TextConfig(**sizes, head_dim=16, vocab_size=50, use_bidirectional_attention=True)
    hf.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json: use_bidirectional_attention = true: of a gemma3_text only null or false can be read"
    ):
        kempnerforge.load_pretrained(tmp_path)
