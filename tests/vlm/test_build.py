"""Models that are built to be given the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from kempnerforge.config import registry
from kempnerforge.distributed.spread import take_away
from kempnerforge.vlm.build import Undrawn, build_model
from tests.vlm.tiny import tiny_job, tokenizer


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("arch", [None, *registry.archs.names()])
def test_a_blank_model_lacks_its_random_weights_and_nothing_else(arch: str | None) -> None:
    job = tiny_job(arch)
    job = replace(job, model=replace(job.model, vocab_size=tokenizer().vocab_size))
    drawn, blank = build_model(job), build_model(job, blank=True)
    parameters = {name for name, _ in drawn.named_parameters()}
    drawn, blank = take_away(drawn), take_away(blank)
    assert drawn.keys() == blank.keys()
    still_drawn = 0
    for name, tensor in drawn.items():
        assert not tensor.isnan().any(), name
        if name not in parameters:
            assert torch.equal(blank[name], tensor), name
        elif tensor.ndim > 1 and tensor.std() > 0:
            still_drawn += int((~blank[name].isnan()).sum())
    assert still_drawn < 0.02 * sum(tensor.numel() for tensor in drawn.values()), "a few have no function of nn.init: routers"


def test_only_parameters_stay_as_they_are() -> None:
    layer = nn.Linear(3, 3)
    layer.register_buffer("noise", torch.zeros(3))
    with torch.no_grad(), Undrawn():
        nn.init.constant_(layer.weight, 2)
        nn.init.kaiming_uniform_(layer.weight)
        layer.noise.normal_()
        drawn = nn.Parameter(torch.randn(3))
    assert (layer.weight == 2).all() and (layer.noise != 0).all() and (drawn != 0).all()
