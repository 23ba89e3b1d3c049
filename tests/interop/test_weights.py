"""Weights of our own checkpoints, and how they come into a model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from kempnerforge.checkpoint import save_training
from kempnerforge.config import JobConfig, ModelConfig, to_toml
from kempnerforge.interop import read_weights, take_weights
from kempnerforge.model.transformer import Transformer
from tests.interop.families import config_of, save

CFG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11)


class Model(nn.Module):
    """A backbone where models have it, and something else."""

    def __init__(self, cfg: ModelConfig = CFG, extra: int = 3) -> None:
        super().__init__()
        self.transformer = Transformer(cfg)
        self.adapter = nn.Linear(extra, 2, bias=False)


def checkpoint(root: Path, model: nn.Module, cfg: ModelConfig = CFG, step: int = 5) -> Path:
    files = {"config.toml": to_toml(JobConfig(model=cfg)).encode()}
    return save_training(root / "checkpoints", step, model, [torch.optim.AdamW(model.parameters())], {}, files, keep=3)


def test_run_directories_and_checkpoints_are_read(tmp_path: Path) -> None:
    """The newest checkpoint of a run; the weights alone, not the optimizer's state."""
    old, new = Model(), Model()
    checkpoint(tmp_path, old, step=4)
    path = checkpoint(tmp_path, new)
    for given in (tmp_path, tmp_path / "checkpoints", path, str(path)):
        weights = read_weights(given, CFG)
        assert weights.keys() == new.state_dict().keys()
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in weights.items())


def test_hugging_face_directories_are_read(tmp_path: Path) -> None:
    save("llama", tmp_path)
    assert "transformer.output_head.weight" in read_weights(tmp_path, config_of("llama"))


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="weights are read from checkpoints, run directories and directories with a config.json"):
            read_weights(path, CFG)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Model())
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes instead of"):
        read_weights(path, CFG)


def test_a_backbone_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    """Its tensors fit, so only the config beside them tells."""
    path = checkpoint(tmp_path, Model())
    with pytest.raises(ValueError, match=r"config.toml: .*rope_theta = 10000.0 there, model.rope_theta = 5.0 here"):
        read_weights(path, ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11, rope_theta=5.0))
    with pytest.raises(ValueError, match=r"n_heads = 2 there, model.n_heads = 1 here"):
        read_weights(path, ModelConfig(dim=16, n_layers=2, n_heads=1, vocab_size=11))


def test_heads_follow_the_model(tmp_path: Path) -> None:
    untied = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11, tie_embeddings=False)
    tied_path, untied_path = checkpoint(tmp_path / "tied", Model()), checkpoint(tmp_path / "untied", Model(untied), untied)
    weights = read_weights(tied_path, untied)
    assert torch.equal(weights["transformer.output_head.weight"], weights["transformer.token_embedding.weight"])
    with pytest.raises(ValueError, match="output_head.weight is not the embedding; set model.tie_embeddings = false"):
        read_weights(untied_path, CFG)


def test_weights_are_taken_by_name_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    source, model = Model(), Model()
    kept = model.adapter.weight.clone()
    weights = {name: value.to(torch.bfloat16) for name, value in source.state_dict().items() if name.startswith("transformer.")}
    with caplog.at_level(logging.INFO, "kempnerforge"):
        taken = take_weights(model, weights | {"gone": torch.zeros(1)}, "here")
    assert taken == weights.keys()
    assert all(torch.equal(p, weights[name].float()) for name, p in model.named_parameters() if name in taken)
    assert torch.equal(model.adapter.weight, kept)
    assert f"here: {len(weights)} tensors taken, 1 have no place here; 1 of the model's {len(weights) + 1} stay as they are" in caplog.text
    assert "adapter (1)" in caplog.text


def test_another_shape_is_an_error_before_anything_is_copied() -> None:
    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"here: transformer.token_embedding.weight has shape \(12, 16\) there, \(11, 16\) here; model.vocab_size"
    ):
        take_weights(model, weights | {"transformer.token_embedding.weight": torch.zeros(12, 16)}, "here")
    with pytest.raises(ValueError, match=r"adapter.weight has shape \(2, 4\) there, \(2, 3\) here$"):
        take_weights(model, weights | {"adapter.weight": torch.zeros(2, 4)}, "here")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_optional_parts_are_passed_over_when_they_do_not_fit() -> None:
    model = Model()
    kept = model.adapter.weight.clone()
    weights = Model(extra=4).state_dict()
    assert take_weights(model, weights, "here", optional=("adapter.",)) == weights.keys() - {"adapter.weight"}
    assert torch.equal(model.adapter.weight, kept)


@pytest.mark.parametrize("weights", [{}, {"elsewhere": torch.zeros(1)}, {"adapter.weight": torch.zeros(9, 9)}], ids=len)
def test_nothing_taken_is_an_error(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"here: none of its \d tensors has a place"):
        take_weights(Model(), weights, "here", optional=("adapter.",))
