"""Layers that several ranks compute together: losses, gradients and their norm are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kempnerforge.config import ModelConfig
from kempnerforge.contract.cases import MODEL
from kempnerforge.distributed.tensor import shared_parts
from kempnerforge.model.transformer import MLP, Transformer
from kempnerforge.util.errors import InputError
from tests.dist import ranks_pass
from tests.distributed.tensor_workers import CASES, batches_of, made, steps


def same_as_one_process(folder: Path, ranks: int, layout: str, *names: str) -> None:
    ranks_pass("tests.distributed.tensor_workers:share", ranks, folder, layout, *names, timeout=400)
    for name in names:
        it = made(CASES[name])
        for got, want in zip(torch.load(folder / f"{name}.pt"), steps(it, CASES[name], batches_of(it, CASES[name])), strict=True):
            torch.testing.assert_close(
                got.pop("loss"), want.pop("loss"), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.dist
def test_two_ranks_share_layers(tmp_path: Path) -> None:
    same_as_one_process(tmp_path, 2, "2,0", *CASES)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["4,0", "2,0", "2,2"], ids=["four", "two-of-two", "copies"])
def test_four_ranks(layout: str, tmp_path: Path) -> None:
    ranks = int(layout[0])
    same_as_one_process(tmp_path, 4, layout, *(name for name, case in CASES.items() if not case.model.ffn_width % ranks))


class Scaled(MLP):
    """A plugin's feed-forward with a parameter among the channels, of which nothing says what a rank has."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.scale = nn.Parameter(torch.ones(()))


class Wanting(MLP):
    """One that has a loss of its own."""

    aux_loss: torch.Tensor | None = None


class Other(nn.Linear):
    """No plain linear layer."""


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = Transformer(replace(MODEL, vocab_size=300))
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "count", "says"),
    [
        (changed(lambda model: setattr(model.layers[1], "mlp", Scaled(model.cfg))), 2, "layers.1.mlp has a parameter 'scale'"),
        (changed(lambda model: setattr(model.layers[1], "mlp", Wanting(model.cfg))), 2, "layers.1.mlp has an auxiliary loss"),
        (changed(lambda model: setattr(model.layers[0].attention, "q_proj", Other(32, 32))), 2, "layers.0.attention.q_proj is a Other"),
        (changed(lambda model: None), 3, r"distributed.tensor_parallel = 3: does not divide layers.0.attention.\w+.weight"),
        (nn.Sequential(nn.Linear(4, 4)), 2, "Sequential has no layers that several processes can share"),
    ],
)  # fmt: skip
def test_what_no_plan_fits_is_refused(model: nn.Module, count: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        shared_parts(model, count)


@pytest.mark.parametrize("name", CASES)
def test_plans_say_what_is_whole(name: str) -> None:
    """All matrices of the layers are divided but those of routers; nothing else is."""
    model = made(CASES[name], "meta").model
    divided = {f"{one.name}.{key}" for one in shared_parts(model, 2) for key, _ in one.part.named_parameters() if one.axis(key) is not None}
    matrices = {key for key, p in model.named_parameters() if key.startswith("transformer.layers.") and p.ndim > 1}
    assert {key for key in matrices - divided if "router" not in key and not key.endswith(("lora_a", "lora_b"))} == set()
    assert {key for key in divided - matrices if not key.endswith((".bias", ".magnitude"))} == set()
