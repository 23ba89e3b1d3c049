"""``model.answer_dropout``: at positions whose next token is trained, in every arch, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kempnerforge.config import ModelConfig
from kempnerforge.contract.cases import install
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.distributed.world import World
from kempnerforge.model.transformer import StreamDropout
from kempnerforge.util.errors import InputError
from tests.vlm.tiny import MODEL, SAMPLES, differing, everywhere, gradients, tiny

ALL = replace(MODEL, answer_dropout=1 - 1e-9)
"""Nothing is added to the stream at an answer: 1 in 10^9 values is kept."""
each_arch = pytest.mark.parametrize("arch", [None, "joint_decoder", "mot", "moma", "cross_attention", "dual_encoder"])


@each_arch
def test_the_stream_stays_as_it_entered_at_answers_alone(arch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved images among the samples: "mot" has another order in its stream."""
    it = tiny(arch, model=ALL)
    it.model.train()
    batch = it.batch(*SAMPLES)
    entered, left = list[Tensor](), list[Tensor]()
    place, read = it.model.place, it.model.read

    def placed(*args: object) -> object:
        x, ctx = place(*args)  # type: ignore[arg-type]
        entered.append(read(x, ctx, everywhere(batch)))
        return x, ctx

    def reading(x: Tensor, ctx: object, batch: object) -> Tensor:
        left.append(found := read(x, ctx, batch))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(it.model, "place", placed)
    monkeypatch.setattr(it.model, "read", reading)
    torch.manual_seed(0)  # of some seeds one value is kept
    it.model(everywhere(batch))
    moved = (entered[0] != left[0]).any(-1).view(batch.labels.shape)
    used = batch.sample_ids >= 0
    answers = batch.labels != IGNORE
    assert answers.any() and (~answers & used).any()
    assert torch.equal(moved[used], ~answers[used])
    it.model.eval()
    left.clear()
    it.model(everywhere(batch))
    assert (entered[0] != left[0]).any(-1)[used.flatten()].all()


def test_kept_values_are_divided_by_their_share() -> None:
    """A quarter is lost at answers and half elsewhere; without ``dropout`` nothing is lost elsewhere."""
    x, answers = torch.rand(4, 50, 64).add(1), torch.arange(50).expand(4, -1) % 3 == 0
    for elsewhere in (0.5, 0.0):
        torch.manual_seed(0)
        got = StreamDropout(ModelConfig(answer_dropout=0.25, dropout=elsewhere))(x, answers)
        for at, p in ((answers, 0.25), (~answers, elsewhere)):
            kept = got[at] != 0
            torch.testing.assert_close(got[at][kept], (x[at] / (1 - p))[kept], rtol=1e-6, atol=0)
            assert abs(kept.float().mean() - (1 - p)) < 0.02 * bool(p) + 1e-9
    plain = StreamDropout(ModelConfig(dropout=0.5))
    torch.manual_seed(0)
    want = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(plain(x, answers), want) and torch.equal(StreamDropout(ModelConfig())(x), x)


@each_arch
def test_activation_checkpointing_changes_nothing(arch: str | None, world: World) -> None:
    results = []
    for recompute in (False, True):
        it = tiny(arch, model=replace(MODEL, answer_dropout=0.3, dropout=0.1))
        install(it, world, recompute=recompute)
        torch.manual_seed(0)
        results.append(gradients(it.model, it.batch(*SAMPLES)))
    assert torch.equal(results[0][0], results[1][0]) and differing(results[0][1], results[1][1]) == []


def test_a_layer_that_is_not_told_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"must be told Context.answers"):
        StreamDropout(ModelConfig(answer_dropout=0.1))(torch.ones(1, 2, 4))
    with pytest.raises(InputError, match=r"answer_dropout = 1.0: must be at least 0 and less than 1"):
        ModelConfig(answer_dropout=1.0)
