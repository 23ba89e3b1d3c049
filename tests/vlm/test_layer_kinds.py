"""Layers that differ from one another (without positions, with other positions, with a window) and norms after both halves, in every arch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from kempnerforge.config import registry
from kempnerforge.data.batching.batch import Kind
from kempnerforge.eval.generate import generate
from kempnerforge.model import attention
from kempnerforge.vlm.mot import MoT
from tests.vlm.tiny import (
    FOREIGN,
    INTERLEAVED,
    LATE,
    MODEL,
    ONE,
    THREE,
    TWICE,
    all_logits,
    gradients,
    may_see,
    picture,
    tiny,
    with_answer,
)

KINDS: dict[str, dict[str, Any]] = {
    "smollm3": {"nope_interval": 2},
    "without positions in layers with two bases": {"nope_interval": 2, "rope_local_theta": 100.0, "rope_global_interval": 2},
    "gemma3": {"rope_local_theta": 100.0, "rope_global_interval": 3, "post_norms": True, "norm_plus_one": True, "qk_norm": True},
    "vla_foundry": {"norm": "layer_norm", "embed_norm": True, "post_norms": True},
    "gpt2": {"positions": "learned", "bias": True, "norm": "layer_norm", "activation": "gelu", "ffn_dim": 96},
    "windows": {"sliding_window": 5, "window_pattern": "SSF"},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_arch = pytest.mark.parametrize("arch", [*(arch for arch in registry.archs if arch not in FOREIGN), None], ids=str)


@by_arch
@by_kind
def test_the_cache_is_the_full_forward_pass_and_norms_learn(arch: str | None, kind: str) -> None:
    it = tiny(arch, model=replace(MODEL, **KINDS[kind]), noise=0.3)
    it.model.eval()
    images = [0] if it.model.has_images else []
    rows = [("what is it?", images), ("<image> red?" if images else "red?", images)]
    prompts = it.prompts(rows, [picture(0)])
    made = torch.tensor(generate(it.model, prompts, max_new_tokens=4, eos_id=-1))
    with torch.no_grad():
        for step in range(4):
            assert torch.equal(it.model(with_answer(prompts, made[:, :step])).logits.argmax(-1), made[:, step])
    norms = {name: grad for name, grad in gradients(it.model, it.batch(ONE))[1].items() if "post_norm" in name}
    assert bool(norms) == bool(KINDS[kind].get("post_norms"))
    assert all(
        grad.abs().max() > 0 for name, grad in norms.items() if name.endswith(".attention.post_norm.weight") and ".image." not in name
    )


@by_kind
def test_towers_that_are_the_same_are_one_tower(kind: str) -> None:
    """Layer i of every tower is a layer of the same kind."""
    model = replace(MODEL, **KINDS[kind])
    one, two = tiny("joint_decoder", model=model), tiny("mot", model=model)
    missing = two.model.load_state_dict(one.model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    cast(MoT, two.model)._copy_text(set())
    for sample in (ONE, THREE, INTERLEAVED):
        want = all_logits(one.model.eval(), one.batch(sample))
        torch.testing.assert_close(all_logits(two.model.eval(), two.batch(sample)), want, rtol=1e-5, atol=1e-5)


@by_kind
def test_the_kind_is_seen(kind: str) -> None:
    plain, other = tiny(None, model=MODEL), tiny(None, model=replace(MODEL, **KINDS[kind]))
    other.model.load_state_dict(plain.model.state_dict(), strict=False)
    batch = plain.batch(ONE)
    assert (all_logits(plain.model, batch) - all_logits(other.model, batch)).abs().max() > 1e-3


@by_arch
@pytest.mark.parametrize(("apart", "kind"), [(True, "windows"), (False, "windows"), (True, "gpt2")])
def test_positions_do_not_count_what_else_is_in_a_row(arch: str | None, apart: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither windows nor learned positions count other samples or other texts of the same image."""
    monkeypatch.setattr(attention, "DOCUMENTS_FROM", 1)
    it = tiny(arch, model=replace(MODEL, **KINDS[kind]))
    it.model.eval()
    together = it.pack((LATE, THREE, ONE), (TWICE, INTERLEAVED))
    together = together if apart else replace(together, documents=())
    with torch.no_grad():
        got = it.model(together).logits
        for sample in (LATE, THREE, ONE, TWICE, INTERLEAVED):
            for text in sample.texts:
                want = it.model(it.batch(replace(sample, texts=(text,)))).logits
                torch.testing.assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-5)
                got = got[len(want) :]
    assert len(got) == 0


@pytest.mark.parametrize(("arch", "mask"), [("joint_decoder", "causal"), ("joint_decoder", "prefix"), ("mot", "causal"), (None, "causal")])
def test_a_word_is_seen_within_the_window_alone(arch: str | None, mask: str) -> None:
    """One layer, so that nothing is passed on. A prefix sees all of itself."""
    it = tiny(arch, mask, model=replace(MODEL, n_layers=1, sliding_window=4), noise=0.3)
    it.model.eval()
    for sample in (ONE, THREE, INTERLEAVED, TWICE):
        one = it.batch(sample)
        words, batch = it.each_word_changed(sample)
        logits = all_logits(it.model, batch)
        moved = (logits[:-1] - logits[-1:]).abs().amax(-1) > 1e-6  # (words, S)
        far = one.positions[0][:, None] - one.positions[0]
        asked = (one.kinds[0] <= Kind.PROMPT) & (mask == "prefix")
        near = (far < 4) | (asked[:, None] & asked)
        assert torch.equal(moved, (may_see(one, mask) & near)[:, words].T), sample.id
