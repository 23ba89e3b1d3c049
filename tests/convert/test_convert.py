"""``kempnerforge import`` and ``export``, and ``load_pretrained`` on what they write."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors import safe_open

import kempnerforge
from kempnerforge.checkpoint import save_training
from kempnerforge.cli.main import run
from kempnerforge.config import JobConfig, ModelConfig, load_config, to_toml
from kempnerforge.config.adapter import LinearAdapterConfig
from kempnerforge.config.data import TextConfig
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.config.vision import ClipConfig, SiglipConfig, ViTConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.convert.commands import class_of, export_model, import_model
from kempnerforge.data.batching.batch import Kind
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.generate import Sampling
from kempnerforge.model.image_processor import pil_processor
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import TEXT, TOWER, rename, save, write_tokenizer

WORDS = ["what shape is it? circle", "what colour? red, or a caption en\n"]
VLM_KINDS = ("paligemma", "llava")


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in (*VLM_KINDS, "idefics3")}
    for name, path in paths.items():
        save(name, path)
    return paths


@pytest.fixture(scope="module")
def imported(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("imported")
    for name in VLM_KINDS:
        import_model(saved[name], out / name)
    return {name: out / name for name in VLM_KINDS}


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(path: Path, seed: int = 0, large: float = 0.5, **sections: Any) -> Path:
    """A checkpoint of a fresh model of ours, as a run leaves it."""
    tokenizer = Tokenizer.train(WORDS, 320)
    assembly = assemble(replace(JobConfig(), **sections), tokenizer, data=False)
    with torch.no_grad():
        for p in assembly.model.parameters():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel() + seed))
    tokenizer.save(path / "tokenizer")
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in (path / "tokenizer").iterdir()}
    files["config.toml"] = to_toml(assembly.job).encode()
    averages = {"transformer.norm.weight": torch.full((assembly.job.model.dim,), large)}
    save_training(path / "checkpoints", 7, assembly.model, [], {"step": 7, "samples_seen": 21}, files, 1, averages)
    return path


MODEL = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128, tie_embeddings=False, new_tokens=["<point>"])
SETTINGS = {"model_type": "clip_vision_model", **TOWER}


def llava_like(**changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "vision_encoder": ClipConfig(feature_layer=-2, settings=dict(SETTINGS)),
        "vlm": VLMConfig(max_text_len=64),
        "train": replace(JobConfig().train, max_steps=7, seq_len=128),
        **changes,
    }


# ---- import ---------------------------------------------------------------------------------------------------------


def test_import_says_how_far_apart_the_models_are(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("kempnerforge.cli.import")
    assert main.HELP
    assert run(["import", str(saved["paligemma"]), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["difference"] <= 1e-5
    assert "image token: id 3, from" in "\n".join(found["notes"])
    assert run(["import", str(saved["paligemma"]), str(tmp_path / "out")]) == 2
    assert "already there" in capsys.readouterr().err
    job = load_config(tmp_path / "out" / "config.toml")
    assert job.run.init_from == str(tmp_path / "out") and job.total_steps() > 0


def test_a_model_that_computes_otherwise_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different models"):
        import_model(saved["llava"], tmp_path / "out", tolerance=-1.0)
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_needs_one(saved: dict[str, Path], tmp_path: Path) -> None:
    rename(saved["idefics3"], tmp_path / "bare", {})
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer .*--tokenizer"):
        import_model(tmp_path / "bare", tmp_path / "out")
    write_tokenizer(tmp_path / "words", prefix=False)
    done = import_model(tmp_path / "bare", tmp_path / "out", tmp_path / "words")
    assert done.difference is not None and done.difference <= 1e-5


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VLM_KINDS)
def test_import_and_export_give_the_same_model(name: str, saved: dict[str, Path], imported: dict[str, Path], tmp_path: Path) -> None:
    done = export_model(imported[name], tmp_path / "out")
    assert done.difference is not None and done.difference <= 1e-5
    cls = hf.PaliGemmaForConditionalGeneration if name == "paligemma" else hf.LlavaForConditionalGeneration
    back, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    first = cls.from_pretrained(saved[name])
    tokens = torch.tensor([[3] * 16 + [1, 40, 41, 42, 60, 61]])
    inputs: dict[str, Any] = {"input_ids": tokens, "pixel_values": torch.rand(1, 3, 28, 28), "attention_mask": torch.ones_like(tokens)}
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    with torch.no_grad():
        assert (back(**inputs).logits - first(**inputs).logits).abs().max() <= 1e-5
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    classic = {"vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.model.embed_tokens.weight"}
    assert classic <= names and not [
        key for key in names if not key.startswith(("vision_tower.vision_model.", "language_model.", "multi_"))
    ]
    image, prompt = Image.new("RGB", (40, 30), (200, 30, 90)), PROMPTS[name][0]
    want = pil_processor(tmp_path / "out")(images=image, text=prompt, return_tensors="pt")
    got = kempnerforge.load_pretrained(tmp_path / "out")[1](images=image, text=prompt)
    assert torch.equal(got.input_ids, want["input_ids"]) and torch.equal(got.attention_mask, want["attention_mask"])
    assert got.pixel_values is not None and (got.pixel_values - want["pixel_values"]).abs().max() <= 1e-6
    assert "**Licence: not stated.**" in (tmp_path / "out" / "README.md").read_text()


def test_export_takes_averages_adapters_and_new_tokens(tmp_path: Path) -> None:
    run_dir = ours(tmp_path / "run", **llava_like(lora=[LoRAConfig(module="transformer.layers.*.q_proj", rank=2)]))
    done = export_model(run_dir, tmp_path / "out")
    assert done.difference is not None and done.difference <= 1e-5
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.language_model.norm.weight, torch.full((32,), 0.5))
    image = words.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == image == len(words) - 1
    assert words.convert_tokens_to_ids("<point>") == image - 1
    table = model.get_input_embeddings().weight
    assert len(table) == len(words)
    assert torch.allclose(table[-1], table[:-2].mean(0), atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "At step 7, 21 samples seen" in card and "added to the tokenizer" in card


@pytest.mark.parametrize("form", ["hf", "kempnerforge"])
def test_weights_are_rounded_when_asked(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = ours(tmp_path / "run", **llava_like())
    assert run(["export", str(run_dir), str(tmp_path / "out"), "--format", form, "--dtype", "bf16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert form == "kempnerforge" or 0 <= found["difference"] <= 1e-5  # both of the rounded weights
    line = next(line for line in found["notes"] if line.startswith("weights in bfloat16, rounded from float32: logits before and after"))
    assert line in (tmp_path / "out" / "README.md").read_text()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
    model, _ = kempnerforge.load_pretrained(tmp_path / "out", device="cpu", dtype=torch.float32)
    exact, _ = kempnerforge.load_pretrained(run_dir, device="cpu", dtype=torch.float32)
    weights = dict(exact.named_parameters())
    assert all(
        torch.equal(p, weights[k].bfloat16().float()) for k, p in model.named_parameters() if k in weights and p.shape == weights[k].shape
    )
    if form == "hf":
        assert hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    run_dir = ours(tmp_path / "run", **llava_like(), large=1e5)
    with pytest.raises(ValueError, match=r"--dtype = float16: transformer.norm.weight has a value of 1e\+05, which does not fit"):
        export_model(run_dir, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--dtype = 'fp8': allowed are fp32, bf16, fp16"):
        export_model(run_dir, tmp_path / "out", dtype="fp8")


def test_what_no_class_is_goes_out_in_our_own_form(tmp_path: Path) -> None:
    run_dir = ours(tmp_path / "run", **llava_like(adapter=LinearAdapterConfig()))
    with pytest.raises(ValueError, match=r"no class of transformers .*llava: \[adapter\] is .*--format kempnerforge"):
        export_model(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_model(run_dir, tmp_path / "out", "kempnerforge")
    model, processor = kempnerforge.load_pretrained(tmp_path / "out")
    same, _ = kempnerforge.load_pretrained(run_dir, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert processor(text="what?").batch.input_ids.shape[0] == 1
    assert "kempnerforge.load_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_text_run_goes_out_as_a_language_model(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = replace(JobConfig().train, max_steps=7, seq_len=64)
    text = {"data": TextConfig(path="train.txt"), "model": replace(MODEL, new_tokens=[]), "train": train}
    run_dir = ours(tmp_path / "run", **text)
    assert run(["export", str(run_dir), str(tmp_path / "out"), "--family", family]) == 0
    assert "max|difference|" in capsys.readouterr().out
    assert type(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__.lower().startswith(family)
    back = import_model(tmp_path / "out", tmp_path / "back")
    assert back.difference is not None and back.difference <= 1e-5
    assert run(["export", str(run_dir), str(tmp_path / "other"), "--family", "gemma"]) == 2


def siglip_like(**model: Any) -> dict[str, Any]:
    gemma = {"norm_plus_one": True, "embed_scale": True, "activation": "geglu", "tie_embeddings": True, **model}
    tower = SiglipConfig(settings=SETTINGS | {"model_type": "siglip_vision_model"})
    return llava_like(
        model=replace(MODEL, **gemma),
        vision_encoder=tower,
        adapter=LinearAdapterConfig(),
        vlm=VLMConfig(max_text_len=64, attention_mask="prefix"),
    )


OTHER = replace(JobConfig().train, max_steps=7, seq_len=128)
AS: dict[str, tuple[dict[str, Any], str]] = {
    "llava": (llava_like(), "LlavaForConditionalGeneration"),
    "llava with lora": (llava_like(lora=[LoRAConfig(module="transformer.layers.*.attention.*", rank=2)]), "LlavaForConditionalGeneration"),
    "two layers of the tower": (llava_like(vision_encoder=ClipConfig(feature_layer=[-1, -2], settings=dict(SETTINGS))), ""),
    "another adapter": (llava_like(adapter=LinearAdapterConfig()), ""),
    "own tower": (llava_like(vision_encoder=ViTConfig(image_size=16, patch_size=8, dim=24, n_layers=1, n_heads=2)), ""),
    "paligemma": (siglip_like(), "PaliGemmaForConditionalGeneration"),
    "paligemma of no family": (siglip_like(qk_norm=True), ""),
    "experts": (llava_like(vlm=VLMConfig.for_arch("moma", max_text_len=64)), ""),
    "gated blocks, another tower": (llava_like(vlm=VLMConfig.for_arch("cross_attention", max_text_len=64, cross_attention_every_n_layers=2)), ""),
    "text": ({"model": MODEL, "vlm": None, "data": TextConfig(path="a.txt"), "train": OTHER}, "LlamaForCausalLM"),
    "text with windows": (
        {"model": replace(MODEL, sliding_window=8), "vlm": None, "data": TextConfig(path="a.txt"), "train": OTHER},
        "MistralForCausalLM",
    ),
    "text of no family": (
        {"model": replace(MODEL, post_norms=True), "vlm": None, "data": TextConfig(path="a.txt"), "train": OTHER},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AS)
def test_what_a_config_can_be_is_known_without_weights(name: str, tmp_path: Path) -> None:
    sections, want = AS[name]
    assembly = assemble(replace(JobConfig(), **sections), Tokenizer.train(WORDS, 320), device="meta", data=False)
    run_dir = ours(tmp_path / "run", **sections)
    if want:
        assert class_of(assembly).name == want
        export_model(run_dir, tmp_path / "out", verify=False)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [want]
        return
    with pytest.raises(InputError, match="no (class|language model) of transformers") as refused:
        class_of(assembly)
    with pytest.raises(InputError) as same:
        export_model(run_dir, tmp_path / "out", verify=False)
    assert str(refused.value) in str(same.value)


# ---- load_pretrained ------------------------------------------------------------------------------------------------


def processor_of(name: str, path: Path) -> Any:
    words = hf.PreTrainedTokenizerFast.from_pretrained(path)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if name == "paligemma":
        words.add_special_tokens({"additional_special_tokens": ["<image>"]})
        images = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28}, **settings)
        images.image_seq_length = 16
        return hf.PaliGemmaProcessor(images, words)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **settings)
    return hf.LlavaProcessor(images, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1)


PROMPTS = {
    "paligemma": ["caption en", "answer en where is the cat", "<image>what is in the picture?"],
    "llava": ["USER: <image>\nwhat is in the picture? ASSISTANT:", "<image>\ncaption en"],
}


@pytest.mark.parametrize("name", VLM_KINDS)
@pytest.mark.parametrize("size", [(61, 37), (28, 28), (20, 90)])
def test_ids_and_pixels_are_those_of_the_processor(
    name: str, size: tuple[int, int], saved: dict[str, Path], imported: dict[str, Path]
) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = processor_of(name, saved[name])
    for path in (saved[name], imported[name]):
        _, ours_ = kempnerforge.load_pretrained(path)
        for prompt in PROMPTS[name]:
            want = theirs(images=image, text=prompt, return_tensors="pt")
            got = ours_(images=image, text=prompt)
            assert got["input_ids"].tolist() == want["input_ids"].tolist()
            assert got["attention_mask"].tolist() == want["attention_mask"].tolist()
            assert (got["pixel_values"] - want["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", VLM_KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_transformers(
    name: str, beams: int, saved: dict[str, Path], imported: dict[str, Path], picture: Image.Image
) -> None:
    """Two prompts of unequal length in one batch, with a cache, and each alone through transformers."""
    model, processor = kempnerforge.load_pretrained(imported[name], device="cpu", dtype=torch.float32)
    cls = hf.PaliGemmaForConditionalGeneration if name == "paligemma" else hf.LlavaForConditionalGeneration
    theirs = cls.from_pretrained(saved[name]).eval()
    prompts = PROMPTS[name][:2]
    other = picture.transpose(Image.Transpose.ROTATE_90)
    rows = model.generate(processor(images=[picture, other], text=prompts), max_new_tokens=9, sampling=Sampling(beams=beams))
    for row, prompt, image in zip(rows, prompts, (picture, other), strict=True):
        inputs = dict(processor(images=image, text=prompt))
        start = inputs["input_ids"].shape[1]
        if name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        made = theirs.generate(**inputs, max_new_tokens=9, do_sample=False, num_beams=beams)[0, start:].tolist()
        assert row == (made[: made.index(2)] if 2 in made else made)


def test_nothing_leaks_in_an_imported_prefix_model(imported: dict[str, Path], picture: Image.Image) -> None:
    """A word of the answer changes nothing before it; a word of the prompt changes all of the prompt."""
    model, processor = kempnerforge.load_pretrained(imported["paligemma"], device="cpu", dtype=torch.float32)
    batch = processor(images=picture, text="answer en where is the cat").batch
    kinds = batch.kinds.clone()
    kinds[:, -4:] = Kind.ANSWER
    batch = replace(batch, kinds=kinds, targets=torch.arange(kinds.numel()))

    def changed(position: int) -> list[int]:
        ids = batch.input_ids.clone()
        ids[0, position] = 50
        with torch.no_grad():
            moved = (model(replace(batch, input_ids=ids)).logits - model(batch).logits).abs().amax(1)
        return (moved > 1e-6).nonzero().flatten().tolist()

    length = kinds.shape[1]
    assert min(changed(length - 3)) == length - 3
    assert changed(17) == list(range(length))


def test_a_run_of_ours_gets_its_texts_as_in_training(tmp_path: Path, picture: Image.Image) -> None:
    run_dir = ours(tmp_path / "run", **llava_like())
    model, processor = kempnerforge.load_pretrained(run_dir, device="cpu", dtype=torch.float32)
    inputs = processor(images=[picture, picture], text=["what shape is it?", "what?"])
    alone = processor(images=picture, text="what?")
    assert inputs.input_ids.shape[0] == 2 and inputs.attention_mask[1, 0] == 0
    rows = model.generate(inputs, max_new_tokens=5)
    assert rows[1] == model.generate(alone, max_new_tokens=5)[0]
    assert isinstance(processor.decode(rows[0]), str)
    for images, text in (([picture], ["a", "b"]), (None, "<image>")):
        with pytest.raises(ValueError, match="must be as many"):
            processor(images=images, text=text)


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint here.*; models are loaded from checkpoints"):
        kempnerforge.load_pretrained(tmp_path)


def test_a_tower_of_settings_is_checked() -> None:
    with pytest.raises(ValueError, match="a table of settings"):
        SiglipConfig()
    with pytest.raises(ValueError, match="'widht' is no key of CLIPVisionConfig"):
        ours(Path("unused"), **llava_like(vision_encoder=ClipConfig(settings=SETTINGS | {"widht": 3})))
    with pytest.raises(ValueError, match="settings: model_type 'siglip_vision_model' is not of type 'clip'"):
        ours(Path("unused"), **llava_like(vision_encoder=ClipConfig(settings={"model_type": "siglip_vision_model"})))
    assert TEXT["vocab_size"] > 0
