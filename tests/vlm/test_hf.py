"""Models of transformers as one unit: what they compute is what transformers computes, and they train as every other arch does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kempnerforge import load_pretrained
from kempnerforge.config import ConfigError, FreezeSpec, JobConfig, LoRAConfig, ModelConfig, TrainConfig, VLMConfig, load_config
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import MASKS
from kempnerforge.convert.verify import agreement, class_logits, load_class, make_probe, our_logits
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.pack import join
from kempnerforge.data.sample import Sample, Text
from kempnerforge.eval.generate import Sampling
from kempnerforge.inference.processor import Processor
from kempnerforge.training.freeze import apply_freeze, match_names, trainable_names
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.optimizers.muon import MuonRule
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.vlm.hf import HF, OWN_MASKS
from tests.dist import ROOT
from tests.interop.tiny_vlms import GRIDS, IMAGE, IMAGE_SIZES, MODELS, SIZED, SQUARES, TEXT, TOWER, VOCAB, internvl, save
from tests.params import quick
from tests.training.tiny import CONFIG, assert_same_tensors, call, losses, make_job, metrics, tensors
from tests.vlm.tiny import all_logits, copies, differing, picture

ALIASES = ("transformer", "vision_encoder", "adapter")


def _gemma3() -> Any:
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text = transformers.Gemma3TextConfig(**TEXT | {"num_key_value_heads": 1}, **window)
    vision = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


MAKERS: dict[str, Callable[[], Any]] = {**MODELS, "gemma3": _gemma3, "internvl": internvl, **GRIDS, **SIZED}
IMAGE_TOKENS = dict.fromkeys(MAKERS, 16) | dict.fromkeys(("idefics3", "smolvlm", "gemma3", "idefics2", "internvl", *GRIDS), 4)
IMAGE_TOKENS |= {"llava_next": 4 + 4 * (4 + 1), "llava_onevision": 4 + 2 * (2 + 1), "mistral3": 2 * (2 + 1), "pixtral": 4 * (4 + 1)}
by_model = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    with pytest.MonkeyPatch.context() as patch:
        for name, make in MAKERS.items():
            patch.setitem(MODELS, name, make)
        for name, path in paths.items():
            save(name, path)
    return paths


def job_of(path: Path, **sections: Any) -> JobConfig:
    """A job that trains the model at ``path``."""
    config = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
    kinds = {config.get("model_type"), config.get("vision_config", {}).get("model_type")}
    sized = {"image_size": max(IMAGE_SIZES.get(kind, 0) for kind in kinds)}
    own = sized | sections.pop("own", {})
    job = JobConfig(
        **{
            "model": ModelConfig(max_seq_len=128),
            "vlm": VLMConfig.for_arch("hf", path=str(path), max_text_len=64, **own),
            "data": JsonlConfig(path="unread", template="paligemma"),
            "train": TrainConfig(max_steps=4, seq_len=96, mixed_precision="fp32"),
            **sections,
        }
    )
    job.validate()
    return job


def built(path: Path, **sections: Any) -> Assembly:
    """As at the start of a run."""
    assembly = assemble(job_of(path, **sections), data=False)
    initialise(assembly.model)
    return assembly


def batch_of(assembly: Assembly, *samples: Sample) -> Batch:
    encoder = assembly.data.encoder(assembly.stages[0])
    return collate([encoder.encode(sample, seed=0) for sample in samples], assembly.tokenizer.pad_id, None)


ONE = Sample("one", (picture(0),), (Text("what is in the picture?", "a cat"),))
OTHER = Sample("other", (picture(1),), (Text("where?", "caption en"),))
BLIND = Sample("no image", (), (Text("what is", "user"),))


# ---- the same function ----------------------------------------------------------------------------------------------


@by_model
def test_logits_are_those_of_transformers(name: str, saved: dict[str, Path]) -> None:
    assembly = built(saved[name])
    model = assembly.model.eval()
    theirs = load_class(saved[name], type(model.hf_model).__name__)
    probe = make_probe(assembly, IMAGE, VOCAB)
    want = class_logits(theirs, probe.inputs)
    assert want.std() > 0.1
    limit = 3e-6 if name in ("mistral3", "pixtral") else 1e-6  # its images are one sequence with a mask in the class
    assert agreement(our_logits(model, probe.batch), want).difference <= limit
    assert model.num_image_tokens == IMAGE_TOKENS[name]
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert len(list(model.shard_units())) == TOWER["num_hidden_layers"] + TEXT["num_hidden_layers"]


@by_model
def test_tokens_are_those_of_generate(name: str, saved: dict[str, Path]) -> None:
    """Prompts of unequal lengths, padded on the left, until each writes its end; greedy, and with beams."""
    assembly = built(saved[name])
    model = assembly.model.eval()
    theirs = load_class(saved[name], type(model.hf_model).__name__)
    images = [Image.effect_noise((28, 28), 90), Image.effect_noise((28, 28), 30)]
    asked = Processor(assembly)(images, ["what is in the picture?", "cat"])
    inputs = dict(asked)
    assert asked.attention_mask[1, 0] == 0 and asked.pixel_values is not None
    if name in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = asked.pixel_values[:, None]
    if name in IMAGE_SIZES:
        assert asked.batch.images is not None
        taken: Any = model.images
        inputs |= taken.arguments(model.normalise(asked.batch.images))
    if name in GRIDS:
        inputs["mm_token_type_ids"] = (asked.batch.kinds == Kind.IMAGE).int()
    if name in OWN_MASKS or name == "paligemma2":
        inputs["token_type_ids"] = (asked.batch.kinds == Kind.IMAGE).long() * (name == "gemma3")
    made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    free = made[:, asked.input_ids.shape[1] :].tolist()
    end = free[0][6]
    assert model.generate(replace(asked, end_id=-1), max_new_tokens=12) == free
    up_to_end = lambda row: row[: row.index(end)] if end in row else row
    assert model.generate(replace(asked, end_id=end), max_new_tokens=12) == [up_to_end(row) for row in free]
    made = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=end, num_beams=3)
    beams = [up_to_end(row) for row in made[:, asked.input_ids.shape[1] :].tolist()]
    assert model.generate(replace(asked, end_id=end), max_new_tokens=6, sampling=Sampling(beams=3)) == beams


@by_model
def test_gradients_are_those_of_transformers(name: str, saved: dict[str, Path]) -> None:
    """The loss is a sum over trained tokens, and reaches every part."""
    assembly = built(saved[name])
    theirs = load_class(saved[name], type(assembly.model.hf_model).__name__)
    probe = make_probe(assembly, IMAGE, VOCAB)
    inputs = dict(probe.inputs)
    if name in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[:, -4:-1] = inputs["input_ids"][:, -3:]
    want = torch.nn.functional.cross_entropy(theirs(**inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    want.backward()
    got = assembly.model(replace(probe.batch, labels=labels, targets=(labels.flatten() != IGNORE).nonzero().flatten()))
    got.total.backward()
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=0)
    grads = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    torch.testing.assert_close({k: p.grad for k, p in assembly.model.named_parameters() if p.grad is not None}, grads, rtol=1e-3, atol=1e-4)
    for alias in ALIASES:
        assert any(grads[key].any() for key in match_names(list(grads), alias, assembly.job.module_patterns(), ""))


LEAKS = [(name, mask) for name in ("paligemma", "paligemma2") for mask in ("model", "causal")] + [(name, "model") for name in SIZED]


@pytest.mark.parametrize(("name", "mask"), quick(LEAKS, *LEAKS[:4], ("mistral3", "model")))
def test_nothing_of_an_answer_is_seen_before_it(name: str, mask: str, saved: dict[str, Path]) -> None:
    """In training, where the class alone would need ``token_type_ids``; with its own mask image and prompt do see the whole prompt."""
    assembly = built(saved[name], own={"attention_mask": mask})
    model = assembly.model.train()
    batch = batch_of(assembly, ONE)
    want = all_logits(model, batch)
    kinds = batch.kinds[0]
    for place in range(len(kinds)):
        if kinds[place] == Kind.IMAGE:
            continue
        ids = batch.input_ids.clone()
        ids[0, place] = 7 if ids[0, place] != 7 else 8
        moved = (all_logits(model, replace(batch, input_ids=ids)) - want)[0].abs().amax(-1) > 1e-6
        ahead = mask == "model" and name not in SIZED and kinds[place] == Kind.PROMPT
        assert torch.equal(moved, torch.arange(len(kinds)) >= (0 if ahead else place)), place


@pytest.mark.parametrize("name", IMAGE_SIZES)
def test_positions_of_packs_are_those_of_each_sample_alone(name: str, saved: dict[str, Path]) -> None:
    """Where an image takes fewer positions than it has tokens: after an image, between two, and in texts that share one."""
    assembly = built(saved[name])
    model, encoder = assembly.model.eval(), assembly.data.encoder(assembly.stages[0])
    shared = Sample("shared", (picture(2),), (Text("what is", "a cat"), Text("where is the cat", "user")))
    inside = Sample("inside", (picture(5),), (Text("what <image> is", "a cat"), Text("where is <image> the cat", "user")))
    between = Sample("between", (picture(3), picture(4)), (Text("<image>what is<image>where", "caption en"),))
    rows = [encoder.encode(sample, seed=0) for sample in (ONE, shared, between, BLIND, inside)]
    alone = [collate([row], assembly.tokenizer.pad_id, None) for row in rows]
    together = collate([join(rows)], assembly.tokenizer.pad_id, None)
    with torch.no_grad():
        want = sum(float(model(batch).loss) for batch in alone)
        assert float(model(together).loss) == pytest.approx(want, rel=1e-5)
    for sample, batch in ((shared, alone[1]), (inside, alone[4])):
        with torch.no_grad():
            each = sum(float(model(batch_of(assembly, replace(sample, texts=(text,)))).loss) for text in sample.texts)
            assert float(model(batch).loss) == pytest.approx(each, rel=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [56, 28, 40])
def test_views_are_those_of_its_image_processor(name: str, size: int, saved: dict[str, Path]) -> None:
    """Its resizing rounds twice, ours once; tiles of an image that has their size are equal."""
    model = built(saved[name], own={"image_size": size}, train=TrainConfig(max_steps=1, seq_len=128, mixed_precision="fp32")).model
    settings = {"image_grid_pinpoints": SQUARES, "do_normalize": False, "do_rescale": False}
    sides = {"size": {"height": 28, "width": 28}} if name == "llava_onevision" else {"size": {"shortest_edge": 28}, "crop_size": 28}
    kind = "LlavaNextImageProcessorPil" if name == "llava_next" else "LlavaOnevisionImageProcessorPil"
    theirs = getattr(transformers, kind)(**settings, **sides)
    image = Image.effect_noise((size, size), 20).convert("RGB")  # far from 0 and 255, where it also clips twice
    want = theirs(images=image, return_tensors="pt")
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, H)
    taken: Any = model.images
    got = taken.cut(pixels)
    assert got.shape == want["pixel_values"].shape
    apart = (got.float() - want["pixel_values"].float()).abs().flatten(2).amax(-1)[0]  # (V,)
    assert apart.max() <= 2 and (size not in (56, 28) or not apart[1:].any())
    assert taken.arguments(got)["image_sizes"] == want["image_sizes"].tolist()


@pytest.mark.parametrize("name", ["llava", "idefics3", *SIZED])
def test_rows_without_an_image_run_the_tower_all_the_same(name: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one that is all 0 after normalisation as well, which Idefics 3 by itself drops."""
    assembly = built(saved[name])
    model, batch = assembly.model, batch_of(assembly, BLIND)
    monkeypatch.setattr(HF, "normalisation", ((0.0,) * 3, (1.0,) * 3))
    assert batch.images is not None and len(batch.images) == 0
    model(batch).total.backward()
    seeing = match_names([n for n, _ in model.named_parameters()], "adapter", assembly.job.module_patterns(), "")
    assert [n for n in seeing if (grad := model.get_parameter(n).grad) is None or grad.any()] == []
    mixed = batch_of(assembly, BLIND, ONE)
    only = replace(mixed, targets=mixed.targets[mixed.targets < mixed.input_ids.shape[1]])
    torch.testing.assert_close(model(only).loss, model(batch).loss, rtol=1e-5, atol=1e-6)


# ---- parts and names ------------------------------------------------------------------------------------------------


@by_model
def test_aliases_are_the_parts(name: str, saved: dict[str, Path]) -> None:
    assembly = built(saved[name])
    names = [n for n, _ in assembly.model.named_parameters()]
    found = [n for alias in ALIASES for n in match_names(names, alias, assembly.job.module_patterns(), "")]
    assert sorted(found) == sorted(names)
    assert "lm_head.weight" not in MuonRule().takes(assembly.model)


@pytest.mark.parametrize("name", ["paligemma", "llava", "smolvlm", "llava_next", "mistral3"])
def test_freezing_moves_exactly_what_it_says(name: str, saved: dict[str, Path]) -> None:
    assembly = built(saved[name])
    model, patterns = assembly.model, assembly.job.module_patterns()
    names = [n for n, _ in model.named_parameters()]
    layer = next(n for n in names if ".layers.1." in n and "vision" not in n).partition(".layers.1.")[0] + ".layers.1.*"
    batch = batch_of(assembly, ONE, OTHER)
    model(batch).total.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-3}  # not rounding
    for specs in (
        [FreezeSpec("vision_encoder"), FreezeSpec("adapter")],
        [FreezeSpec("transformer")],
        [FreezeSpec("*"), FreezeSpec(layer, False)],
    ):
        trainable = trainable_names(names, specs, patterns)
        apply_freeze(model, trainable)
        before, optimizer = copies(model), torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()
        moved = {n.removeprefix("model.") for n in differing(before, copies(model))}
        tied = {"lm_head.weight"} - set(names)
        assert trainable & learning <= moved <= trainable | tied, specs
    with pytest.raises(ValueError, match=r"freeze.module = 'vision_tower': matches no parameter; aliases: transformer, vision_encoder"):
        trainable_names(names, [FreezeSpec("vision_tower")], patterns)


@by_model
def test_shapes_alone_are_enough_to_count(name: str, saved: dict[str, Path]) -> None:
    """On the meta device, where nothing may look at a value."""
    assembly = assemble(job_of(saved[name]), device="meta", data=False)
    batch = batch_of(assembly, ONE, BLIND)
    output = assembly.model(batch.to("meta"))
    output.total.backward()
    assert output.logits.shape == (batch.num_targets, VOCAB)


def test_low_rank_adapters_go_around_pretrained_weights(saved: dict[str, Path]) -> None:
    plain = built(saved["llava"])
    assembly = built(saved["llava"], lora=[LoRAConfig("transformer", rank=2, dora=True)])
    names = [n for n, _ in assembly.model.named_parameters()]
    adapters = match_names(names, "lora", assembly.job.module_patterns(), "")
    assert len(adapters) == 3 * (7 * 2 + 1) and all("vision" not in n for n in adapters)
    batch = batch_of(plain, ONE)
    torch.testing.assert_close(all_logits(assembly.model, batch), all_logits(plain.model, batch), rtol=1e-4, atol=1e-5)


def test_casting_leaves_rotary_frequencies_alone(saved: dict[str, Path]) -> None:
    model = built(saved["llava"]).model
    before = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    model.to(torch.bfloat16)
    assert any("inv_freq" in n for n in before)
    assert all(torch.equal(model.get_buffer(n), b) for n, b in before.items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- a run ----------------------------------------------------------------------------------------------------------

RUN = CONFIG.split("[model]")[0] + (
    '[model]\nmax_seq_len = 64\n[vlm]\narch = "hf"\npath = "{model}"\nmax_text_len = 48\n'
    + '[scheduler]\nname = "constant"\n'
    + CONFIG[CONFIG.index("[data]") :].replace('source = "jsonl"', 'source = "jsonl"\ntemplate = "paligemma"')
)


def write(folder: Path, model: Path) -> Path:
    return make_job(folder, config=RUN.replace("{model}", str(model)))


@pytest.fixture(scope="module")
def run(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, with its report."""
    folder = tmp_path_factory.mktemp("run")
    ended = call("train", write(folder, saved["paligemma"]), "--train.max_steps=4")
    assert ended.code == 0, ended.err
    return folder


def test_a_run_begins_with_the_pretrained_weights_and_learns(run: Path, saved: dict[str, Path]) -> None:
    found = losses(run / "run")
    assert len(found) == 4 and found[-1] < found[0]
    assert "eval/exact_match" in metrics(run / "run")[-1] and (run / "run" / "report.html").is_file()
    own, trained = load_file(saved["paligemma"] / "model.safetensors"), tensors(run / "run")
    towers = {k.removeprefix("model."): v for k, v in trained.items() if k.startswith("model.model.vision_tower.")}
    assert len(towers) > 10 and all(torch.equal(v, theirs(own, k)) for k, v in towers.items()), "they are frozen"


def theirs(own: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of a file in the layout of the hub, which has other prefixes."""
    hits = [key for key in own if key.endswith(name.removeprefix("model.vision_tower."))]
    assert len(hits) == 1, name
    return own[hits[0]]


def test_resume_is_never_having_stopped(run: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    """Bitwise, and without the weights that it began with."""
    model = Path(shutil.copytree(saved["paligemma"], tmp_path / "model"))
    job = write(tmp_path, model)
    assert call("train", job, "--train.max_steps=2").code == 0
    (model / "model.safetensors").unlink()
    assert call("train", job, "--train.max_steps=4").code == 0
    assert_same_tensors(tensors(tmp_path / "run"), tensors(run / "run"))


def test_checkpoints_are_evaluated_asked_and_exported(run: Path, tmp_path: Path) -> None:
    ended = call("eval", run / "run")
    assert ended.code == 0 and "exact_match" in ended.out, ended.err
    asked = call("generate", run / "run", run / "0.png", "--prompt", "what is on the left?", "--max-new-tokens", "3")
    assert asked.code == 0, asked.err
    model, processor = load_pretrained(run / "run", device="cpu")
    inputs = processor(images=run / "0.png", text="what is on the left?")
    want = model.generate(inputs, max_new_tokens=5)
    ended = call("export", run / "run", tmp_path / "hf")
    assert ended.code == 0, ended.err
    refused = call("export", run / "run", tmp_path / "own", "--format", "kempnerforge")
    assert (
        refused.code == 2 and "is a model of transformers; it goes out with --format hf" in refused.err and not (tmp_path / "own").exists()
    )
    theirs = load_class(tmp_path / "hf", "PaliGemmaForConditionalGeneration")
    again = job_of(tmp_path / "hf")
    initialise(other := assemble(again, data=False).model)
    assert other.eval().generate(inputs, max_new_tokens=5) == want
    both = dict(inputs) | {"token_type_ids": torch.zeros_like(inputs.input_ids)}
    made = theirs.generate(**both, max_new_tokens=5, do_sample=False, eos_token_id=inputs.end_id)[0, inputs.input_ids.shape[1] :]
    assert made.tolist()[: len(want[0])] == want[0]


@pytest.mark.parametrize("name", quick([*SIZED, "internvl"], "llava_next"))
def test_models_of_other_shapes_train_resume_and_go_out(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    job = write(tmp_path, saved[name])
    job.write_text(job.read_text().replace("max_text_len = 48", f"max_text_len = 40\nimage_size = {IMAGE_SIZES.get(name, 0)}"))
    for steps in (2, 4):
        ended = call("train", job, f"--train.max_steps={steps}")
        assert ended.code == 0, ended.err
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    ended = call("export", tmp_path / "run", tmp_path / "hf")
    assert ended.code == 0 and "max|difference|" in ended.out, ended.err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == {"pixtral": "llava"}.get(name, name)


def test_weights_of_another_run_go_before_the_pretrained_ones(run: Path, saved: dict[str, Path]) -> None:
    job = job_of(saved["paligemma"])
    job.run.init_from = str(run / "run")
    assembly = assemble(job, data=False)
    initialise(assembly.model)
    trained = tensors(run / "run")
    assert all(torch.equal(p, trained[f"model.{n}"]) for n, p in assembly.model.named_parameters())


def test_other_weights_than_pretrained_ones_are_random(saved: dict[str, Path]) -> None:
    random, loaded = built(saved["llava"], own={"pretrained": False, "freeze": []}), built(saved["llava"])
    assert len(differing(copies(random.model), copies(loaded.model))) > 30
    again = built(saved["llava"], own={"pretrained": False, "freeze": []})
    assert differing(copies(random.model), copies(again.model)) == []


# ---- mistakes -------------------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, **keys: Any) -> Path:
    """A copy with other keys in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for key, value in keys.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"model": ModelConfig(dim=512)}, "does not read model.dim"),
        ({"vision_encoder": ViTConfig(image_size=32)}, "does not read vision_encoder.image_size"),
        ({"train": TrainConfig(max_steps=1, feature_cache="features")}, "set train.feature_cache = ''"),
        ({"own": {"path": ""}}, "path = '': arch 'hf' needs a directory or a hub id"),
    ],
)
def test_what_it_would_not_read_is_refused(section: dict[str, Any], words: str, tmp_path: Path) -> None:
    own = {"path": str(tmp_path)} | section.pop("own", {})
    job = JobConfig(**{"train": TrainConfig(max_steps=1), **section}, vlm=VLMConfig.for_arch("hf", **own))
    with pytest.raises(ConfigError, match=words):
        job.validate()


def test_images_have_a_size_that_the_model_can_take(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="image_size = -1: must be >= 0"):
        job_of(saved["llava"], own={"image_size": -1})
    with pytest.raises(ValueError, match="image_size = 14: the images of path = .* have 28 pixels along a side; leave it out"):
        built(saved["llava"], own={"image_size": 14})
    cases = {
        ("qwen3_vl", 15): "image_size = 15: Qwen3VLForConditionalGeneration takes images of any size; choose a multiple of 14",
        ("idefics2", 63): "image_size = 63: Idefics2ForConditionalGeneration takes .* choose a multiple of 7, at most 56, such as 56",
        ("mistral3", 20): "image_size = 20: Mistral3ForConditionalGeneration takes images of any size; choose a multiple of 14",
        ("llava_next", 0): "image_size = 0: LlavaNextForConditionalGeneration cuts an image into views of 28 pixels .* such as 56",
    }
    for (name, size), words in cases.items():
        with pytest.raises(ValueError, match=words):
            built(saved[name], own={"image_size": size})


def test_models_that_do_not_fit_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    llava = saved["llava"]
    text = tmp_path / "text"
    transformers.LlamaConfig(**TEXT).save_pretrained(text)
    qwen = tmp_path / "qwen"
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "image_size": 28}
    transformers.Qwen2VLConfig(text_config=TEXT, vision_config=vision).save_pretrained(qwen)
    shutil.copyfile(llava / "preprocessor_config.json", qwen / "preprocessor_config.json")
    unknown = edited(saved["idefics3"], tmp_path / "unknown")
    (unknown / "preprocessor_config.json").unlink()
    for made in (transformers.Blip2Config, transformers.InstructBlipConfig, transformers.Kosmos2Config):
        made().save_pretrained(tmp_path / made.model_type)
    own = edited(llava, tmp_path / "own", model_type="mine")
    written = json.loads((own / "config.json").read_text()) | {"auto_map": {"AutoConfig": "mine.Config"}}
    (own / "config.json").write_text(json.dumps(written))
    cases = {
        tmp_path / "none": "no such directory",
        tmp_path / "blip-2": "Blip2ForConditionalGeneration cannot be used .* cannot begin from a stream of words and features",
        tmp_path / "instructblip": "its features of an image depend on the words of the prompt",
        tmp_path / "kosmos-2": "gives no features of images .* has no get_image_features",
        text: "model_type 'llama' is no model of transformers that reads images and words .*`kempnerforge import`",
        qwen: "vlm.image_size = 0: Qwen2VLForConditionalGeneration takes images of any size; choose a multiple of 28, such as 448",
        unknown: "preprocessor_config.json",
        edited(llava, tmp_path / "count", image_seq_length=9): "an image gives 16 tokens, but image_seq_length = 9",
        edited(llava, tmp_path / "short", text_config={"max_position_embeddings": 100}): "sees 100 positions .*model.max_seq_len = 128",
        edited(
            saved["paligemma2"], tmp_path / "chunks", text_config={"layer_types": ["chunked_attention", "full_attention"]}
        ): "has layers with chunked_attention, for which there is no mask here",
        edited(saved["pixtral"], tmp_path / "without first", vision_feature_select_strategy="default"): "'default': must be 'full'",
        own: "model_type 'mine' is code in the directory",
        edited(saved["llava_next"], tmp_path / "pairs", image_grid_pinpoints=[[28, 40]]): "multiples of 28, the side of a view",
        edited(saved["mistral3"], tmp_path / "rows"): r"its tokenizer has no '\[IMG_BREAK\]', which is between the rows",
        edited(llava, tmp_path / "few", text_config={"vocab_size": 120}): "its embedding has 120 rows, and the tokenizer 173 tokens",
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llava / name, tmp_path / "rows" / name)
    for path, words in cases.items():
        job = job_of(path, **({"own": {"image_size": 0}} if path == qwen else {}))
        with pytest.raises(ValueError, match=words):
            assemble(job, read(saved["llava"]), data=False)


def read(path: Path) -> Any:
    from kempnerforge.data.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(path)


def test_wrong_weights_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    path = edited(saved["llava"], tmp_path / "wrong")
    weights = load_file(path / "model.safetensors")
    key = next(key for key in weights if key.endswith("layers.0.mlp.up_proj.weight"))
    weights[key.replace("up_proj", "upp_proj")] = weights.pop(key)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: .*layers.0.mlp.up_proj.weight; 1 left over: .*upp_proj"):
        built(path)


def test_the_example_loads() -> None:
    job = load_config(ROOT / "configs" / "models" / "hf-paligemma.toml")
    assert job.vlm is not None and job.vlm.arch == "hf" and job.vlm.files == "models/paligemma-3b-pt-224"
    assert VLMConfig.class_for("hf").masks == ("model", *MASKS)
