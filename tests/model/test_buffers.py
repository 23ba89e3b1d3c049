"""A cast is for parameters: what is not trained is not rounded, in any encoder and any arch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kempnerforge.config import registry
from kempnerforge.model.buffers import ExactBuffers
from tests.vlm.tiny import tiny


class Tower(ExactBuffers):
    """A buffer of its own, one of a part, one that is no number of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("mean", torch.tensor([0.481]))
        self.register_buffer("index", torch.arange(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_of_all_parts_keep_their_precision(dtype: torch.dtype) -> None:
    model, exact = Tower().to(dtype), Tower()
    for name, buffer in exact.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer) and dict(model.named_buffers())[name].dtype == buffer.dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.to("meta").inner[1].running_mean.device.type == "meta"
    assert dict(Tower().double().named_buffers())["mean"].dtype == torch.float64, "more precision is allowed"


@pytest.mark.parametrize("arch", [None, *registry.archs])
def test_no_arch_rounds_a_buffer(arch: str | None) -> None:
    model = tiny(arch).model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", sorted(registry.vision_encoders))
def test_no_encoder_is_outside_of_it(kind: str) -> None:
    assert issubclass(registry.vision_encoders.get(kind), ExactBuffers)
