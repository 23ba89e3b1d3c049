"""Whole vision-language models of transformers as ours: every layout of their files, strictly, with the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kempnerforge.config import JobConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.stages import StageConfig
from kempnerforge.convert.verify import agreement, class_logits, load_class, make_probe, our_logits
from kempnerforge.interop.external import ExternalModel
from kempnerforge.interop.external_tokenizer import read_tokenizer
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlms import fitting
from kempnerforge.training.setup import Assembly, assemble
from tests.interop.tiny_vlms import IMAGE, MODELS, VOCAB, rename, save

by_model = pytest.mark.parametrize("name", MODELS)
HUB = {"vision_tower.": "vision_tower.vision_model."}
MEMORY = {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, path in paths.items():
        save(name, path)
    return paths


def built(external: ExternalModel) -> Assembly:
    assembly = assemble(external.job, read_tokenizer(external.path, None), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    assembly.model.eval()
    return assembly


@by_model
def test_logits_are_those_of_transformers(name: str, saved: dict[str, Path]) -> None:
    external = open_external(saved[name])
    assembly = built(external)
    probe = make_probe(assembly, external.image_id, VOCAB)
    want = class_logits(load_class(saved[name], external.architecture), probe.inputs)
    got = our_logits(assembly.model, probe.batch)
    assert external.image_id == IMAGE and want.std() > 0.1
    assert agreement(got, want).difference <= 1e-5
    images = probe.batch.images
    assert images is not None
    images.zero_()
    assert (our_logits(assembly.model, probe.batch) - got).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["paligemma", "llava"])
@pytest.mark.parametrize("names", [HUB, MEMORY], ids=["hub", "memory"])
def test_all_layouts_are_one_model(name: str, names: dict[str, str], saved: dict[str, Path], tmp_path: Path) -> None:
    rename(saved[name], tmp_path, names)
    got, want = open_external(tmp_path).read(), open_external(saved[name]).read()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@by_model
@pytest.mark.parametrize("part", ["layer", "projector", "vision", "embedding"])
def test_a_renamed_key_is_named(name: str, part: str, saved: dict[str, Path], tmp_path: Path) -> None:
    keys = load_file(saved[name] / "model.safetensors")
    wanted = {
        "layer": "layers.1.mlp.up_proj.weight",
        "projector": ("projector.linear", "connector.modality_projection", "projector.linear_2"),
        "vision": "encoder.layers.1.self_attn.k_proj.bias",
        "embedding": "embed_tokens.weight",
    }[part]
    marks = (wanted,) if isinstance(wanted, str) else wanted
    old = next(key for key in keys if any(mark in key for mark in marks))
    rename(saved[name], tmp_path, {old: old + "_"})
    with pytest.raises(ValueError, match=old.replace(".", r"\.")):
        open_external(tmp_path)


def test_an_unknown_tensor_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    rename(saved["llava"], tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vision_tower.encoder.layers.0.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for 1: vision_tower.encoder.layers.0.extra.weight"):
        open_external(tmp_path)


def test_a_head_that_should_be_tied_is_compared(saved: dict[str, Path], tmp_path: Path) -> None:
    rename(saved["paligemma"], tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    open_external(tmp_path).read()
    save_file(tensors | {"language_model.lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not .*embed_tokens.weight"):
        open_external(tmp_path).read()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llava", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full', not 'default'"),
        ("llava", {"vision_feature_layer": [-2, -3]}, r"vision_feature_layer = \[-2, -3\]: must be one layer"),
        ("llava", {"model_type": "llavva"}, "model_type = 'llavva': is not read; .*; the nearest is 'llava'"),
        ("llava", {"model_type": "qwen2_moe"}, "language models are read of llama, mistral, .*; the nearest is 'qwen2'"),
        (
            "llava",
            {"model_type": "mixtral"},
            "language models are read of llama, .* vision-language models of paligemma, .*, clip, siglip and nanoVLM",
        ),
        ("llava", {"model_type": None}, "model_type = None: is not read; language models are read of llama, .*nanoVLM$"),
        ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, "of a llava it can be 'clip_vision_model'"),
        ("paligemma", {"text_config": {"model_type": "llama"}}, "of a paligemma it can be 'gemma' or 'gemma2'"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, values: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    rename(saved[name], tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(ValueError, match=message):
        open_external(tmp_path)


@by_model
def test_the_job_is_written_as_the_same_class(name: str, saved: dict[str, Path]) -> None:
    kind = fitting(open_external(saved[name]).job).family.kind
    assert kind == {"paligemma2": "paligemma", "smolvlm": "idefics3"}.get(name, name)


def test_a_model_that_is_no_class_says_why() -> None:
    with pytest.raises(
        ValueError,
        match=r"no class of transformers .*paligemma, llava, llava_next, idefics3, smolvlm, qwen2_5_vl, qwen3_vl: vlm.arch is not 'joint_decoder'",
    ):
        fitting(JobConfig())


@pytest.mark.parametrize("name", ["paligemma", "llava", "idefics3"])
def test_tiles_in_rows_are_no_class(name: str, saved: dict[str, Path]) -> None:
    """A class puts the tokens of a tile one after the other, but for LLaVA-NeXT. Nor are they any if only a stage has them."""
    rows = {"fit": "tiles", "tiling": "anyres", "markers": False, "rows": True}
    job = open_external(saved[name]).job
    whole = replace(job, data=replace(job.data, images=ImagesConfig(**rows)))
    staged = replace(job, stages=[StageConfig("a", 2), StageConfig("b", 2, data={"images": rows})])
    if name == "llava":
        assert fitting(whole).family.kind == "llava_next"
    for refused in (whole, staged) if name != "llava" else (staged,):
        with pytest.raises(ValueError, match=r"data.images.rows: in its class the tokens of a tile follow one another"):
            fitting(refused)


@pytest.mark.parametrize("name", ["paligemma", "llava", "idefics3"])
def test_interpolated_positions_are_not_written(name: str, saved: dict[str, Path]) -> None:
    """The class at the other end does not interpolate by itself; the run goes on with them, in our own form."""
    job = open_external(saved[name]).job
    tower: Any = job.vision_encoder
    job = replace(job, vision_encoder=replace(tower, image_size=2 * int(tower.settings["image_size"])))
    with pytest.raises(ValueError, match=r"vision_encoder.image_size = \d+: its class does not interpolate"):
        fitting(job)
