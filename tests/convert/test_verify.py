"""How far the comparison of a model here and a class of transformers goes: what differs in long rows alone is found, and what is not reached
is said.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kempnerforge
from kempnerforge.config import RopeScaling
from kempnerforge.convert import verify
from kempnerforge.convert.commands import import_model
from kempnerforge.convert.verify import ModelLimits, agreement, class_logits, compare_models, forms, load_class, make_probe, our_logits
from kempnerforge.data.batching.batch import Batch
from kempnerforge.interop.external_tokenizer import tokenizer_of
from kempnerforge.interop.open_external import open_external
from kempnerforge.training.setup import Assembly, assemble
from tests.interop import families, tiny_vlms

WINDOW = 16
"""Longer than a short row."""
# of six frequencies the two slowest are scaled, by which a short row does not turn
LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=0.2, high_freq_factor=0.4, original_max_seq_len=8192)
ROPE = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 4.0, "low_freq_factor": 0.2, "high_freq_factor": 0.4}
LONG: dict[str, Any] = {
    "max_position_embeddings": 131_072,
    "rope_parameters": ROPE | {"original_max_position_embeddings": 8192},
}
WINDOWED = ("mistral", "qwen2 with windows", "gemma2", "gemma3", "smollm3 with windows")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a language model of a family, with other settings, and a tokenizer."""

    def write(family: str, **settings: Any) -> Path:
        name, ours, theirs = families.FAMILIES[family]
        monkeypatch.setitem(families.FAMILIES, family, (name, ours, theirs | settings | {"vocab_size": tiny_vlms.VOCAB}))
        families.save(family, tmp_path / "theirs")
        tiny_vlms.write_tokenizer(tmp_path / "theirs", prefix=False)
        return tmp_path / "theirs"

    return write


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tiny_vlms.save("llava", path)
    return path


def built(path: Path, **model: Any) -> tuple[Assembly, int | None, Any]:
    """Ours with other settings than the files have, the token of an image, and the class."""
    external = open_external(path)
    assembly = assemble(replace(external.job, model=replace(external.job.model, **model)), tokenizer_of(external), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    assembly.model.eval()
    return assembly, external.image_id, load_class(path, external.architecture)


def short_rows_agree(assembly: Assembly, image_id: int | None, theirs: Any) -> bool:
    probe = make_probe(assembly, image_id, assembly.tokenizer.base_vocab_size)
    return agreement(our_logits(assembly.model, probe.batch), class_logits(theirs, probe.inputs)).excess <= verify.TOLERANCE


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("wrong", [{"sliding_window": WINDOW + 4}, {"sliding_window": 0, "window_pattern": "S"}], ids=["size", "none"])
def test_a_wrong_window_is_found(family: str, wrong: dict[str, Any], text: Any) -> None:
    models = built(text(family, sliding_window=WINDOW), **wrong)
    assert short_rows_agree(*models)
    with pytest.raises(ValueError, match="two different models"):
        compare_models(models[0], models[1], models[2]).require("both")


@pytest.mark.parametrize("family", ["gemma2", "smollm3 with windows"])
def test_windows_in_other_layers_are_found(family: str, text: Any) -> None:
    path = text(family, sliding_window=WINDOW)
    right = built(path)
    said = compare_models(*right).require("both")
    assert f"the longest of {4 * WINDOW} positions" in said and "NOT" not in said
    models = built(path, window_pattern="FS" if family == "gemma2" else "SF")
    assert short_rows_agree(*models)
    with pytest.raises(ValueError, match="two different models"):
        compare_models(*models).require("both")


@pytest.mark.parametrize(
    "wrong", [None, replace(LLAMA3, factor=32.0), replace(LLAMA3, original_max_seq_len=16_384)], ids=["none", "factor", "length"]
)
def test_a_rope_scaling_that_acts_far_away_is_found(wrong: RopeScaling | None, text: Any) -> None:
    """Positions up to 4 x 8,192 in a row of 48."""
    path = text("llama", **LONG)
    said = compare_models(*built(path)).require("both")
    assert "up to position 32,767" in said and "the longest of 48 positions" in said
    models = built(path, rope_scaling=wrong)
    assert short_rows_agree(*models)
    with pytest.raises(ValueError, match="two different models"):
        compare_models(*models).require("both")


def test_a_wrong_second_image_is_found(llava: Path) -> None:
    models = built(llava)
    assert "0 to 2 images in a row" in compare_models(*models).require("both")
    model = models[0].model
    insert = model.insert

    def first_again(words: Tensor, features: Tensor | None, batch: Batch) -> Tensor:
        slots = torch.zeros_like(batch.image_index) if batch.row_images > 1 else batch.image_index
        return insert(words, features, replace(batch, image_index=slots))

    model.insert = first_again
    assert short_rows_agree(*models)
    with pytest.raises(ValueError, match="two different models"):
        compare_models(*models).require("both")


def test_what_cannot_be_reached_is_said(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = text("mistral", sliding_window=WINDOW)
    monkeypatch.setattr(verify, "COST", 2.0 * WINDOW * sum(p.numel() for p in built(path)[0].model.parameters()))
    assert f"NOT compared: what lies beyond a window of {WINDOW}" in compare_models(*built(path)).require("both")
    monkeypatch.undo()
    path = text("mistral", sliding_window=64)
    assert "NOT compared: what lies beyond a window of 64" in compare_models(*built(path)).require("both"), "as the model has 64 positions"


@pytest.mark.parametrize(("room", "images"), [(160, 2), (45, 2), (44, 1), (30, 1), (27, 0)])
def test_there_are_as_many_images_as_there_is_room_for(room: int, images: int, llava: Path) -> None:
    """An image takes 16 positions."""
    longest = forms(built(llava)[0], ModelLimits((), (), room))[2:]
    assert [len(form.image_at) for form in longest] == [images] * bool(images)
    assert all(form.words + 16 * images <= room for form in longest)


def test_nan_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="two different models"):
        agreement(torch.tensor([[[1.0, torch.nan]]]), torch.ones(1, 1, 2)).require("both")


def test_load_pretrained_compares_too(text: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = text("mistral", sliding_window=WINDOW)
    with caplog.at_level(logging.INFO, "kempnerforge"):
        kempnerforge.load_pretrained(path)
    assert "logits of MistralForCausalLM and ours: max|difference|" in caplog.text
    caplog.clear()
    monkeypatch.setattr("kempnerforge.interop.open_external.model_config", _with_window(WINDOW + 4))
    for load in (kempnerforge.load_pretrained, lambda source: import_model(source, path.parent / "out")):
        with pytest.raises(ValueError, match="two different models"):
            load(path)
    kempnerforge.load_pretrained(path, verify=False)
    assert [r.levelname for r in caplog.records if "was not compared with the one there: verify = False" in r.message] == ["WARNING"]


def _with_window(size: int) -> Any:
    from kempnerforge.interop.settings import model_config

    return lambda config, rows: replace(model_config(config, rows), sliding_window=size)
