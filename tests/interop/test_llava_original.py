"""LLaVA 1.5 under the names of its own code: the same model as in transformers, with the tower in its files or beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kempnerforge.convert.commands import import_model
from kempnerforge.convert.verify import agreement, class_logits, load_class, make_probe, our_logits
from kempnerforge.interop.external_tokenizer import read_tokenizer
from kempnerforge.interop.llava_original import KNOWN, TOWER
from kempnerforge.interop.open_external import open_external
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import IMAGE, VOCAB, save

NAMES = {
    "vision_tower.": TOWER,
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "language_model.model.": "model.",
    "language_model.": "",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
OWN: dict[str, Any] = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 24,
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "unfreeze_mm_vision_tower": True,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA of transformers."""
    path = tmp_path_factory.mktemp("llava")
    save("llava", path)
    return path


def original(theirs: Path, path: Path, where: str, form: str = "vision_model.", **keys: Any) -> Path:
    """The model under its own names.

    Args:
        where: "inside": the tower is in the files; "beside": in its directory alone; "nowhere".
        form: what the names in the tower's directory begin with.
    """
    path.mkdir()
    config = json.loads((theirs / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(theirs / "model.safetensors").items():
        start = next(start for start in NAMES if name.startswith(start))
        tensors[NAMES[start] + name.removeprefix(start)] = tensor
    tower = {name: tensors.pop(name) for name in [*tensors] if name.startswith(TOWER)}
    assert tower and "model.mm_projector.0.weight" in tensors and "lm_head.weight" in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors |= tower if where == "inside" else {}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if where != "nowhere":
        beside = path / "clip"
        beside.mkdir()
        whole = {"model_type": "clip", "vision_config": config["vision_config"]} if form == "vision_model." else config["vision_config"]
        (beside / "config.json").write_text(json.dumps(whole))
        renamed = {form + name.removeprefix(TOWER): tensor for name, tensor in tower.items()}
        renamed |= {"logit_scale": torch.zeros(()), "text_model.x": torch.zeros(2)} if form == "vision_model." else {}
        save_file(renamed, beside / "model.safetensors", metadata={"format": "pt"})
        (beside / "preprocessor_config.json").write_text((theirs / "preprocessor_config.json").read_text())
        keys = {"mm_vision_tower": "clip"} | keys
    (path / "config.json").write_text(json.dumps(config["text_config"] | OWN | keys))
    for name in TOKENIZER:
        (path / name).write_bytes((theirs / name).read_bytes())
    return path


@pytest.mark.parametrize(("where", "form"), [("inside", "vision_model."), ("beside", "vision_model."), ("beside", "")])
def test_logits_are_those_of_transformers(where: str, form: str, theirs: Path, tmp_path: Path) -> None:
    external = open_external(original(theirs, tmp_path / "own", where, form))
    assembly = assemble(external.job, read_tokenizer(external.path, None), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    probe = make_probe(assembly.model.eval() and assembly, IMAGE, VOCAB)
    want = class_logits(load_class(theirs, "LlavaForConditionalGeneration"), probe.inputs)
    assert agreement(our_logits(assembly.model, probe.batch), want).difference <= 1e-5
    assert external.job.vision_encoder.feature_layer == -2
    assert external.job.data.images.fit == "letterbox" and assembly.model.normalisation[0] == (0.4, 0.5, 0.6)
    assert external.job.data.prompt_template.startswith("A chat between a curious user") and not external.can_be_compared


def test_it_is_imported(theirs: Path, tmp_path: Path) -> None:
    done = import_model(original(theirs, tmp_path / "own", "beside"), tmp_path / "run")
    assert done.difference is None
    assert any("nothing to compare with" in line for line in done.lines) and any("vicuna_v1" in line for line in done.lines)


def test_the_tower_is_asked_for(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.json: mm_vision_tower = .*336.: it is not in these files, .* write its directory there"):
        open_external(original(theirs, tmp_path / "nowhere", "nowhere"))
    with pytest.raises(InputError, match="mm_vision_tower = .mine.: its sizes are not known, and this is no directory"):
        open_external(original(theirs, tmp_path / "unknown", "inside", mm_vision_tower="mine"))


def test_sizes_of_the_usual_tower_are_those_of_its_class(theirs: Path, tmp_path: Path) -> None:
    """A tiny tower in the files is no ViT-L: its tensors are refused by name."""
    assert KNOWN["openai/clip-vit-large-patch14-336"]["image_size"] == 336
    with pytest.raises(InputError, match=r"lacks \d+: model.vision_tower.vision_tower.vision_model.encoder.layers.10"):
        open_external(
            original(theirs, tmp_path / "own", "inside", mm_vision_tower="openai/clip-vit-large-patch14", max_position_embeddings=512)
        )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'|mm_projector_type = \"linear\""),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = true"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = .anyres.: only 'pad' and 'square' can be read"),
        ({"mm_vision_select_layer": 3}, "mm_vision_select_layer = 3: must be one layer"),
        ({"mm_perceiver": 1}, "mm_perceiver = 1: is not known"),
        ({"model_type": "llava_mistral"}, "model_type = .llava_mistral.: of LLaVA's own checkpoints only"),
        ({"mm_vision_tower": 3}, "mm_vision_tower = 3: must be the name or directory"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
    ],
)
def test_other_models_are_refused(keys: dict[str, Any], words: str, theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        open_external(original(theirs, tmp_path / "own", "beside", **keys))


def test_every_tensor_is_accounted_for(theirs: Path, tmp_path: Path) -> None:
    path = original(theirs, tmp_path / "own", "beside")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.image_newline": torch.zeros(32)}, path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no place for 1: model.image_newline"):
        open_external(path)
    del tensors["model.mm_projector.2.bias"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 1: model.mm_projector.2.bias"):
        open_external(path)
    tower = load_file(path / "clip" / "model.safetensors")
    save_file(tower | {"vision_model.encoder.layers.0.extra": torch.zeros(2)}, path / "clip" / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for 1: vision_model.encoder.layers.0.extra"):
        open_external(path)
