"""Qwen2.5-VL and Qwen3-VL as ours and back: the same logits, tokens and gradients as transformers' own classes, for images of any shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kempnerforge import load_pretrained
from kempnerforge.config import JobConfig, ModelConfig, VLMConfig
from kempnerforge.config.freeze import FreezeSpec
from kempnerforge.config.vision import SiglipConfig
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.convert.verify import compare_models, load_class
from kempnerforge.data.batching.batch import Batch, Kind, Part
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.interleave import ImageBlock, Prompt
from kempnerforge.inference.processor import Processor
from kempnerforge.interop.external import ExternalModel, image_job
from kempnerforge.interop.external_tokenizer import tokenizer_of
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlms import VLM_FAMILIES, fitting
from kempnerforge.model.image_processor import Normalisation, read_image_settings
from kempnerforge.model.patch_merger import PatchMergerConfig
from kempnerforge.model.qwen_vl import cut
from kempnerforge.training.freeze import trainable_names
from kempnerforge.training.setup import Assembly, assemble
from tests.interop import tiny_vlms

LAYOUT = VLM_FAMILIES["qwen3_vl"].layouts[0]
"""Names of both classes in memory."""
KINDS = ("qwen2_5_vl", "qwen3_vl")
SPECIAL = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
each = pytest.mark.parametrize("kind", KINDS)


def save(kind: str, path: Path) -> None:
    """A random model, with room for images of 16 x 16 tokens, and a tokenizer."""
    tiny_vlms.save(kind, path)
    tiny_vlms.write_tokenizer(path, prefix=False, more=SPECIAL)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    config["image_token_id"] = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(SPECIAL[1])
    (path / "config.json").write_text(json.dumps(config))
    mean = [0.5] * 3 if kind == "qwen3_vl" else [0.48145466, 0.4578275, 0.40821073]
    images = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 196, "max_pixels": 12845056, "image_mean": mean}
    images |= {"image_std": [0.5] * 3, "patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}
    (path / "preprocessor_config.json").write_text(json.dumps(images))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, path in paths.items():
        save(kind, path)
    return paths


def built(external: ExternalModel, image_size: int = 0) -> Assembly:
    job = external.job
    if image_size:
        job = replace(job, vision_encoder=replace(job.vision_encoder, image_size=image_size))
    assembly = assemble(job, tokenizer_of(external), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    assembly.model.eval()
    return assembly


@pytest.fixture(scope="module")
def ours(saved: dict[str, Path]) -> dict[str, Assembly]:
    return {kind: built(open_external(path), 56) for kind, path in saved.items()}


@pytest.fixture(scope="module")
def theirs(saved: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_class(path, open_external(path).architecture) for kind, path in saved.items()}


def batch_of(it: Assembly, model: Any, rows: list[str], shapes: list[tuple[int, int]]) -> tuple[Batch, dict[str, Tensor]]:
    """Rows of random words (w) and images (i) of so many rows and columns of tokens, padded on the left, for ours and for theirs."""
    rng, image_id, words = torch.Generator().manual_seed(1), model.config.image_token_id, range(3, 300)
    prompts, numbers, grids = list[Prompt](), list[range](), iter(shapes)
    for row in rows:
        ids = [words[int(torch.randint(len(words), (), generator=rng))] for kind in row if kind == "w"]
        at = tuple(row[:k].count("w") for k, kind in enumerate(row) if kind == "i")
        blocks = tuple(ImageBlock.of([()], 0, (Part(*next(grids)),)) for _ in at)
        prompts.append(Prompt(ids, at, blocks))
        begin = numbers[-1].stop if numbers else 0
        numbers.append(range(begin, begin + len(at)))
    pixels = torch.randint(256, (len(shapes), 3, 56, 56), generator=rng, dtype=torch.uint8)
    batch = prompt_batch(prompts, pixels, numbers, it.data.layout, 0)
    batch = replace(batch, targets=torch.arange(batch.kinds.numel()))
    inputs = {"input_ids": it.model.with_image_ids(batch, image_id), "attention_mask": (batch.kinds != Kind.PAD).long()}
    inputs["mm_token_type_ids"] = (batch.kinds == Kind.IMAGE).int()
    if shapes:
        whole, vision = it.model.normalise(pixels), model.config.vision_config
        crops = [image[None, :, : 14 * h, : 14 * w] for image, (h, w) in zip(whole, shapes, strict=True)]
        inputs["pixel_values"] = torch.cat([cut(crop, vision.patch_size, 2, 2)[0] for crop in crops])
        inputs["image_grid_thw"] = torch.tensor([(1, 2 * h, 2 * w) for h, w in shapes])
    return batch, inputs


CASES = {
    "one image": (["wwwiwwww", "iwwwwwww"], [(4, 4), (4, 4)]),
    "two images": (["wwiwwiww"], [(4, 4), (4, 4)]),
    "text": (["wwwwww"], []),
    "shapes": (["wwiwwiww", "wiwww", "www"], [(2, 4), (3, 1), (1, 1)]),
}


@each
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(kind: str, case: str, ours: dict[str, Assembly], theirs: dict[str, Any]) -> None:
    it, model = ours[kind], theirs[kind]
    batch, inputs = batch_of(it, model, *CASES[case])
    with torch.no_grad():
        got = it.model(batch).logits.view(*batch.kinds.shape, -1)
        want = model(**inputs).logits
    used = batch.kinds != Kind.PAD
    assert want[used].std() > 0.1
    torch.testing.assert_close(got[used], want[used], rtol=0, atol=1e-5)


@each
def test_import_and_comparison(kind: str, saved: dict[str, Path]) -> None:
    external = open_external(saved[kind])
    it = built(external)
    found = compare_models(it, external.image_id, load_class(saved[kind], external.architecture))
    assert found.excess < 1e-5, found


@each
@pytest.mark.parametrize("case", ["one image", "shapes"])
def test_gradients_are_equal(kind: str, case: str, ours: dict[str, Assembly], theirs: dict[str, Any]) -> None:
    it, model, family = ours[kind], theirs[kind], VLM_FAMILIES[kind]
    batch, inputs = batch_of(it, model, *CASES[case])
    used, labels = (batch.kinds != Kind.PAD).flatten(), batch.input_ids.flatten() // 2
    for each_model, logits in ((model, model(**inputs).logits.flatten(0, 1)), (it.model, it.model(batch).logits)):
        each_model.zero_grad()
        nn.functional.cross_entropy(logits[used], labels[used]).backward()
    want = dict(model.named_parameters())
    assert len(want) == sum(1 for _ in it.model.parameters())
    for name, p in it.model.named_parameters():
        grad = want[family.tensor_name(name, it.job, "", LAYOUT)].grad
        assert p.grad is not None and grad is not None and p.grad.any(), name
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm(), name


@each
def test_greedy_tokens_are_equal(kind: str, ours: dict[str, Assembly], theirs: dict[str, Any]) -> None:
    it, model = ours[kind], theirs[kind]
    batch, inputs = batch_of(it, model, *CASES["shapes"])
    extra = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(**inputs, **extra)[:, batch.input_ids.shape[1] :]
    asked: Any = type("Prompts", (), {"batch": batch, "end_id": -1})()
    assert it.model.generate(asked, max_new_tokens=10) == made.tolist()


@each
def test_a_part_is_frozen_by_its_alias(kind: str, ours: dict[str, Assembly]) -> None:
    """The tower without its mergers is the encoder, and all mergers are the adapter."""
    it = ours[kind]
    assert it.job.vlm is not None
    names = [name for name, _ in it.model.named_parameters()]
    own = {"vision_encoder": {"blocks", "patch_embed"}, "adapter": {"norm", "proj"}}
    if kind == "qwen3_vl":
        own = {"vision_encoder": own["vision_encoder"] | {"pos_embed"}, "adapter": own["adapter"] | {"deepstack"}}
    for alias, parts in own.items():
        frozen = {*names} - trainable_names(names, [FreezeSpec(alias, True)], it.job.vlm.module_patterns)
        assert {name.partition(".")[0] for name in frozen} == {alias}
        assert {name.split(".")[1] for name in frozen} == parts


@each
def test_there_and_back(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Bitwise the same tensors under the same names, and the same config."""
    there = import_model(saved[kind], tmp_path / "run")
    back = export_model(tmp_path / "run", tmp_path / "back")
    assert any("there min_pixels and max_pixels bound its area" in line for line in there.lines)
    assert there.difference is not None and back.difference is not None and max(there.difference, back.difference) <= 1e-5
    got, want = (load_file(path / "model.safetensors") for path in (tmp_path / "back", saved[kind]))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    found, wanted = (getattr(hf, VLM_FAMILIES[kind].architecture).config_class.from_pretrained(p) for p in (tmp_path / "back", saved[kind]))
    for section in ("text_config", "vision_config"):
        got_keys, want_keys = (getattr(config, section).to_dict() for config in (found, wanted))
        assert {key for key, value in want_keys.items() if got_keys.get(key) != value} <= {"_name_or_path", "dtype", "max_window_layers"}
    assert found.image_token_id == wanted.image_token_id


@each
def test_prompts_are_those_of_the_instruct_models(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """As many tokens between start and end as the image's shape needs; asked directly and from a run."""
    import_model(saved[kind], tmp_path / "run")
    begin, image, end = SPECIAL
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if kind == "qwen2_5_vl" else ""
    text = f"{system}<|im_start|>user\n{begin}{image * 6}{end}what is it?<|im_end|>\n<|im_start|>assistant\n"
    want = hf.AutoTokenizer.from_pretrained(saved[kind])(text, add_special_tokens=False)["input_ids"]
    picture = Image.fromarray(np.full((30, 43, 3), 90, np.uint8))
    for path in (saved[kind], tmp_path / "run"):
        model, processor = load_pretrained(path, device="cpu")
        inputs = processor(images=picture, text="what is it?")
        assert inputs.input_ids.tolist() == [want]
        assert len(model.generate(inputs, max_new_tokens=2)[0]) <= 2


def test_several_images_are_placed_by_the_prompt(saved: dict[str, Path]) -> None:
    """Each between its two tokens, without the one that the template places."""
    external = open_external(saved["qwen3_vl"])
    data = external.job.data
    plain = replace(data, turns=replace(data.turns, user="<|im_start|>user\n{prompt}<|im_end|>\n"))
    processor = Processor(assemble(replace(external.job, data=plain), tokenizer_of(external), data=False))
    (begin, image, end), pictures = SPECIAL, [Image.fromarray(np.zeros((h, w, 3), np.uint8)) for h, w in ((30, 43), (14, 28))]
    text = f"<|im_start|>user\nis {begin}{image * 6}{end} like {begin}{image * 2}{end}?<|im_end|>\n<|im_start|>assistant\n"
    want = hf.AutoTokenizer.from_pretrained(saved["qwen3_vl"])(text, add_special_tokens=False)["input_ids"]
    found = processor(images=[pictures], text=[f"is {image} like {image}?"])
    assert found.input_ids.tolist() == [want] and [part[:2] for part in found.batch.image_parts] == [(2, 3), (1, 2)]


@each
def test_pixels_are_those_of_their_processor(kind: str, saved: dict[str, Path]) -> None:
    """Of images that are neither smaller than its smallest area nor longer than the square."""
    settings, (model, processor) = read_image_settings(saved[kind]), load_pretrained(saved[kind], device="cpu")
    assert settings is not None and settings.processor is not None
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (90, 131), (200, 60), (15, 49)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        want, batch = settings.processor(images=[picture], return_tensors="pt"), processor(images=picture, text="what?").batch
        part = batch.image_parts[0] if batch.image_parts else Part(16, 16)
        assert batch.images is not None and want["image_grid_thw"].tolist() == [[1, 2 * part.rows, 2 * part.columns]]
        got = model.normalise(batch.images)[:, :, : 14 * part.rows, : 14 * part.columns]
        torch.testing.assert_close(cut(got, 7, 2, 2)[0], want["pixel_values"], rtol=0, atol=1e-5)


# ---- configs ------------------------------------------------------------------------------------------------------------------------

HUB: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "qwen3_vl": {
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}
"""As the files of Qwen2.5-VL 3B and Qwen3-VL 4B say it, without keys that have no meaning here."""


@pytest.mark.parametrize(("kind", "count"), [("qwen2_5_vl", 3_754_622_976), ("qwen3_vl", 4_437_815_808)])
def test_configs_of_the_hub(kind: str, count: int) -> None:
    """As many parameters as the released models, and an image of 256 tokens at most."""
    family, config = VLM_FAMILIES[kind], {"model_type": kind, **HUB[kind]}
    job = image_job(JobConfig(**vars(family.sections(config, 151936, Normalisation([], [])))), family.data)
    assert sum(p.numel() for p in family.parameters(job).values()) == count
    assert job.train.seq_len == 256 + 2 + 512 and family.image_id(config) == 151655
    assert job.vision_encoder.deepstack_layers == ([-19, -13, -7] if kind == "qwen3_vl" else [])


@pytest.mark.parametrize(
    ("kind", "section", "values", "message"),
    [
        ("qwen2_5_vl", "vision_config", {"out_hidden_size": 24}, "out_hidden_size = 24: must be text_config.hidden_size = 32"),
        ("qwen2_5_vl", "vision_config", {"window_size": 21}, "window_size = 21: must be a multiple of a token's 14 pixels"),
        ("qwen2_5_vl", "vision_config", {"in_channels": 1}, "in_channels = 1: only towers for square images with 3 channels"),
        ("qwen2_5_vl", "text_config", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("qwen3_vl", "text_config", {"model_type": "qwen2_5_vl_text"}, "of a qwen3_vl it can be 'qwen3_vl_text'"),
        (
            "qwen3_vl",
            "vision_config",
            {"deepstack_visual_indexes": [1, 0]},
            r"deepstack_visual_indexes = \[1, 0\]: must be layers in order",
        ),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [3]}, "deepstack_visual_indexes"),
        ("qwen3_vl", "text_config", {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4]}}, r"mrope_section = \[4, 4\]"),
        ("qwen3_vl", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 5.0}}, "rope_parameters"),
        ("qwen3_vl", "", {"image_token_id": -1}, "image_token_id = -1: must be the id of a token"),
    ],
)
def test_what_cannot_be_read_is_refused(kind: str, section: str, values: Any, message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    tiny_vlms.rename(saved[kind], tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (config[section] if section else config).update(values)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_external(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlm": VLMConfig(attention_mask="prefix")}, "vlm.attention_mask = 'prefix', not 'causal'"),
        ({"adapter": PatchMergerConfig(norm="layer_norm", hidden_dim=8)}, r"\[adapter\] is PatchMergerConfig\(.*hidden_dim=8"),
        ({"vision_encoder": SiglipConfig(path="tower")}, "vision_encoder.type = 'siglip', not 'qwen_vl'"),
        ({"model": ModelConfig(dim=32, n_heads=4, qk_norm=True)}, r"model.rope_sections = \[\], .* three counts"),
    ],
)
def test_what_is_no_qwen_says_why(changes: dict[str, Any], message: str, ours: dict[str, Assembly]) -> None:
    job = ours["qwen3_vl"].job
    assert fitting(job).family.kind == "qwen3_vl"
    with pytest.raises(ValueError, match=f"no class of transformers .*{message}"):
        fitting(replace(job, **changes))
