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
from kempnerforge.config.freeze import FreezeSpec
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.convert.verify import compare_models, load_class
from kempnerforge.data.batching.batch import Batch, Kind, Part
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.interleave import ImageBlock, Prompt
from kempnerforge.interop.external import ExternalModel
from kempnerforge.interop.external_tokenizer import tokenizer_of
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlms import VLM_FAMILIES
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
    text = f"<|im_start|>user\n{begin}{image * 6}{end}what is it?<|im_end|>\n<|im_start|>assistant\n"
    want = hf.AutoTokenizer.from_pretrained(saved[kind])(text, add_special_tokens=False)["input_ids"]
    picture = Image.fromarray(np.full((30, 43, 3), 90, np.uint8))
    for path in (saved[kind], tmp_path / "run"):
        model, processor = load_pretrained(path, device="cpu")
        inputs = processor(images=picture, text="what is it?")
        assert inputs.input_ids.tolist() == [want]
        assert len(model.generate(inputs, max_new_tokens=2)[0]) <= 2
