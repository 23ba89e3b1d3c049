"""Expert-choice routing against loops written down from the rule, and auxiliary routers that take its place when generating."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import VLMConfig
from kempnerforge.contract.ranks import shares
from kempnerforge.data.batching.batch import Kind
from kempnerforge.eval.generate import generate
from kempnerforge.model.transformer import StreamDropout
from kempnerforge.vlm.moma import MoMaBlock, MoMaConfig, MoMaContext, Tokens
from tests.dist import ranks_pass
from tests.vlm.tiny import INTERLEAVED, MODEL, NO_IMAGE, ONE, SAMPLES, TWO_IMAGES, Tiny, all_logits, gradients, tiny, tiny_job

IMAGE, WORD, PAD = Kind.IMAGE, Kind.PROMPT, Kind.PAD


def moma(noise: float = 0.1, **fields: Any) -> Tiny:
    """A tiny model of four layers with fields of its own."""
    return tiny("moma", noise=noise, vlm=MoMaConfig(max_text_len=64, **fields))


def block_of(it: Tiny, layer: int = 0) -> MoMaBlock:
    block = it.model.transformer.layers[layer]
    assert isinstance(block, MoMaBlock)
    return block


def tokens_of(it: Tiny, *samples: Any, pad_to: int | None = None) -> Mapping[str, Tokens]:
    batch = it.batch(*samples, pad_to=pad_to)
    with torch.no_grad():
        words = it.model.transformer.embed(batch.input_ids)
        _, context = it.model.place(words, None, batch, None)
    assert isinstance(context, MoMaContext)
    return context.tokens


def hidden(tokens: Mapping[str, Tokens], seed: int = 0) -> Tensor:
    return torch.randn(*tokens["text"].here.shape, MODEL.dim, generator=torch.Generator().manual_seed(seed))


def test_each_expert_takes_its_best_tokens_by_hand() -> None:
    """Two words and four image tokens, two experts each, capacity 1: an expert takes one word and two image tokens."""
    it = moma()
    block = block_of(it)
    scores = torch.tensor([[9, 9], [1, 2], [4, 0], [3, 5], [-1, 6], [-2, 3], [9, 9.0]])  # (S, E); the first and the last are padding
    kinds = [PAD, IMAGE, IMAGE, IMAGE, IMAGE, WORD, PAD]
    kinds[2] = WORD
    for modality, kind, most, taken in (("text", WORD, 2, 1), ("image", IMAGE, 3, 2)):
        with torch.no_grad():
            block.routers[modality].weight.copy_(torch.eye(2, MODEL.dim))
        h = torch.nn.functional.pad(scores, (0, MODEL.dim - 2))[None]  # (1, S, D)
        here = torch.tensor([[k == kind for k in kinds]])
        tokens = Tokens(here, most, torch.full((1, 1, 1), float(taken), dtype=torch.float64), taken)
        weights, index, _ = block.route(modality, h, tokens)
        want = {"text": [{2: 4.0}, {5: 3.0}], "image": [{3: 3.0, 1: 1.0}, {4: 6.0, 3: 5.0}]}[modality]
        for expert, chosen in enumerate(want):
            assert index[0, expert].tolist() == list(chosen)
            torch.testing.assert_close(weights[0, expert], torch.tensor(list(chosen.values())).sigmoid())


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7, 2.0, 5.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_layer_is_what_loops_compute(factor: float, training: bool, batched: bool) -> None:
    """Token by token: the sum over the experts that take it of score times feed-forward layer; a token that none takes stays as it is."""
    it = moma(capacity_factor=factor, image_experts=3, batched_experts=batched)
    it.model.train(training)
    block, tokens = block_of(it), tokens_of(it, *SAMPLES, pad_to=50)
    h, got = hidden(tokens), torch.zeros(len(SAMPLES), 50, MODEL.dim)
    untouched = torch.ones(len(SAMPLES), 50, dtype=torch.bool)
    want = torch.zeros_like(got)
    with torch.no_grad():
        for modality in ("text", "image"):
            experts = block.group(modality)
            assert len(experts) == {"text": 2, "image": 3}[modality] and (block.mlp in experts) == (modality == "text")
            weights, _, _ = block.route(modality, h, tokens[modality])
            for row, expert in [(r, e) for r in range(len(h)) for e in range(len(experts))]:
                there = tokens[modality].here[row].nonzero().flatten()
                logits = h[row] @ block.routers[modality].weight[expert]
                if training:
                    best = there[logits[there].argsort(descending=True)]
                    taken = best[: min(len(there), math.ceil(factor * len(there) / len(experts)))]
                elif factor >= len(experts):
                    taken = there
                else:
                    auxiliary = block.auxiliary_routers[modality]
                    taken = there[auxiliary(h[None, row, there])[0, :, expert].sigmoid() > 0.5]
                assert int((weights[row, expert] > 0).sum()) == len(taken)
                untouched[row, taken] = False
                want[row, taken] += logits[taken].sigmoid()[:, None] * experts[expert](h[row, taken])
        # the layer itself, with attention that adds nothing and a norm that is undone
        block.attention.o_proj.weight.zero_()
        block.mlp_norm = torch.nn.Identity()
        context = context_for(it, tokens)
        got = block(h, context) - h
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got[untouched].any()
    assert untouched.any() and not untouched.all()


def context_for(it: Tiny, tokens: Mapping[str, Tokens]) -> MoMaContext:
    batch = it.batch(*SAMPLES, pad_to=50)
    base = it.model.context(batch, None, torch.float32)
    return MoMaContext(base.rope, base.mask, base.cache, tokens=tokens)


def test_padding_and_other_rows_do_not_matter_in_training() -> None:
    it = moma(capacity_factor=0.7)
    it.model.train()
    batch = it.batch(*SAMPLES, pad_to=60)
    batch.input_ids[batch.kinds == Kind.PAD] = 5
    together = all_logits(it.model, batch)
    for row, sample in enumerate(SAMPLES):
        alone = all_logits(it.model, it.batch(sample))
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_training_knows_later_words_and_evaluation_does_not() -> None:
    it = moma()
    batch = it.batch(TWO_IMAGES)
    words = (batch.kinds[0] >= Kind.PROMPT).nonzero().flatten()
    leaks = {}
    for training in (True, False):
        it.model.train(training)
        before, after = all_logits(it.model, batch), []
        for word in words:
            ids = batch.input_ids.clone()
            ids[0, word] = (ids[0, word] + 7) % it.job.model.vocab_size
            after.append((all_logits(it.model, replace(batch, input_ids=ids)) - before)[0, :word].abs().max().item())
        leaks[training] = max(after)
    assert leaks[True] > 1e-3 > 1e-5 > leaks[False]


@pytest.mark.parametrize("experts", [1, 3])
def test_where_every_expert_takes_every_token_evaluation_is_training(experts: int) -> None:
    it = moma(capacity_factor=float(experts), image_experts=experts, text_experts=experts)
    batch = it.batch(*SAMPLES)
    it.model.train()
    trained = all_logits(it.model, batch)
    weights, _, _ = block_of(it).route("text", hidden(tokens_of(it, *SAMPLES)), tokens_of(it, *SAMPLES)["text"])
    words = (batch.kinds >= Kind.PROMPT) & ~it.model.is_code(batch)
    assert torch.equal((weights > 0).sum(-1), words.sum(1)[:, None].expand(-1, experts))
    it.model.eval()
    torch.testing.assert_close(all_logits(it.model, batch), trained, rtol=1e-5, atol=1e-6)
    assert not [name for name, _ in it.model.named_parameters() if "auxiliary" in name], "a part that is never used"
    assert it.model(batch).aux_loss is None


def test_the_auxiliary_loss_reaches_auxiliary_routers_alone() -> None:
    it = moma()
    output = it.model(it.batch(*SAMPLES))
    assert output.aux_loss is not None
    output.aux_loss.backward()
    moved = {name for name, p in it.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in it.model.named_parameters() if "auxiliary_routers" in name}
    it.model.eval()
    assert it.model(it.batch(*SAMPLES)).aux_loss is None


def test_the_auxiliary_loss_is_cross_entropy_with_the_choice() -> None:
    it = moma(router_loss_weight=1.0)
    block, tokens = block_of(it), tokens_of(it, *SAMPLES)
    h = hidden(tokens)
    _, index, loss = block.route("image", h, tokens["image"])
    assert loss is not None
    taken = math.nan * torch.ones(2, *tokens["image"].here.shape)
    for row, here in enumerate(tokens["image"].here):
        for expert in range(2):
            taken[expert, row, here] = 0.0
            taken[expert, row, index[row, expert, : math.ceil(int(here.sum()) / 2)]] = 1.0
    p = block.auxiliary_routers["image"](h).permute(2, 0, 1).sigmoid()
    want = -(taken * p.log() + (1 - taken) * (1 - p).log())
    torch.testing.assert_close(loss, want[~taken.isnan()].mean())


def test_without_an_image_the_image_experts_have_gradients_of_zero() -> None:
    it = moma()
    _, grads = gradients(it.model, it.batch(NO_IMAGE))
    mine = {name for name, _ in it.model.named_parameters() if ".image." in name}
    assert mine and mine <= grads.keys()
    assert not any(grads[name].any() for name in mine)


def test_flops_follow_the_capacity() -> None:
    counts = {}
    for factor in (0.5, 1.0, 2.0):
        it = tiny("moma", device="meta", vlm=MoMaConfig(max_text_len=64, capacity_factor=factor, image_experts=4, text_experts=4))
        batch = replace(it.batch(TWO_IMAGES, pad_to=40), row_words=16)  # and 8 image tokens: nothing is rounded up
        with FlopCounterMode(display=False) as counter:
            it.model(batch.to("meta"))
        counts[factor] = counter.get_total_flops()
    assert counts[2.0] - counts[1.0] == 2 * (counts[1.0] - counts[0.5]) > 0
    dense = MODEL.n_layers * (8 + 16) * 2 * 3 * MODEL.dim * MODEL.ffn_width
    assert 2 * (counts[1.0] - counts[0.5]) == dense


def agreement(it: Tiny, *samples: Any) -> float:
    """The share of (token, expert) pairs that evaluation routes as training does, over all layers."""
    same: list[Tensor] = []

    def compare(block: MoMaBlock, h: Tensor, tokens: Mapping[str, Tokens]) -> None:
        for modality, found in tokens.items():
            chosen = []
            for training in (True, False):
                block.train(training)
                weights, index, _ = block.route(modality, h, found)
                chosen.append(torch.zeros(len(h), 2, h.shape[1]).scatter(-1, index, (weights > 0).float()))
            block.train()
            same.append((chosen[0] == chosen[1]).transpose(1, 2)[found.here])

    handles = []
    tokens = tokens_of(it, *samples)
    for layer in range(MODEL.n_layers):
        block = block_of(it, layer)
        handles.append(block.mlp_norm.register_forward_hook(lambda _, __, h, b=block: compare(b, h, tokens)))
    with torch.no_grad():
        it.model(it.batch(*samples))
    for handle in handles:
        handle.remove()
    return float(torch.cat([s.flatten() for s in same]).float().mean())


@pytest.mark.slow
def test_auxiliary_routers_learn_and_answers_are_generated_with_them() -> None:
    it = moma(noise=0.0)
    asked = (ONE, TWO_IMAGES, INTERLEAVED)
    batch = it.batch(*asked)
    before = agreement(it, *asked)
    optimizer = torch.optim.AdamW(it.model.parameters(), lr=3e-3)
    for _ in range(150):
        (it.model(batch).total / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = agreement(it, *asked)
    assert before < 0.6 and after > 0.8, (before, after)
    it.model.eval()
    eos = it.encoder.tokenizer.eos_id
    prompts = it.prompts([(ONE.texts[0].prompt, [0]), (TWO_IMAGES.texts[0].prompt, [1, 2])], [*ONE.images, *TWO_IMAGES.images])
    made = [it.encoder.tokenizer.decode(ids).strip() for ids in generate(it.model, prompts, max_new_tokens=8, eos_id=eos)]
    assert made == [ONE.texts[0].answer, TWO_IMAGES.texts[0].answer]


@pytest.mark.parametrize("frozen", [(), ("mlp",), ("experts.image",)])
def test_batched_experts_are_the_experts(frozen: tuple[str, ...]) -> None:
    """Names, loss and gradients; where some are frozen, too."""
    found = []
    for batched in (False, True):
        it = moma(batched_experts=batched, image_experts=3)
        for name, parameter in it.model.named_parameters():
            parameter.requires_grad_(not any(f".{part}." in name for part in frozen))
        found.append((gradients(it.model, it.batch(*SAMPLES)), [name for name, _ in it.model.named_parameters()]))
    ((want, want_gradients), names), ((got, got_gradients), names_batched) = found
    assert names == names_batched and want_gradients.keys() == got_gradients.keys()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_with_batched_experts_equal_one_process(tmp_path: Path) -> None:
    """With weights that are freed between the passes, and with layers that the ranks share."""
    ranks_pass("tests.distributed.workers:batched_experts", 2, tmp_path, timeout=120)
    it = tiny("moma", vlm=MoMaConfig(max_text_len=64, freeze=[]))
    _, want = gradients(it.model, *shares(it))
    for how in ("data", "layers"):
        got = torch.load(tmp_path / f"{how}.pt", weights_only=True)
        assert got.keys() == {name for name in want if "auxiliary" not in name}
        torch.testing.assert_close(got, {name: want[name] for name in got}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batched", [True, False])
def test_experts_are_told_which_of_their_tokens_are_answers(batched: bool) -> None:
    """All that an expert adds at an answer is dropped, and nothing elsewhere."""
    it = tiny("moma", model=replace(MODEL, answer_dropout=0.5), vlm=MoMaConfig(max_text_len=64, batched_experts=batched))
    block, tokens = block_of(it), tokens_of(it, *SAMPLES, pad_to=50)
    for module in block.modules():
        if isinstance(module, StreamDropout):
            module.register_forward_hook(lambda _, given, x: torch.where(given[1][..., None], 0, given[0]))
    block.attention.o_proj.weight.data.zero_()
    answers = torch.rand(len(SAMPLES), 50, generator=torch.Generator().manual_seed(0)) < 0.5
    h, context = hidden(tokens), context_for(it, tokens)
    moved = (block(h, replace(context, answers=answers)) != h).any(-1)
    taken = (block(h, replace(context, answers=torch.zeros_like(answers))) != h).any(-1)
    assert torch.equal(moved, taken & ~answers) and (taken & answers).any()


@pytest.mark.parametrize("field", ["image_experts", "text_experts", "capacity_factor", "router_loss_weight"])
def test_fields_out_of_range_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        VLMConfig.for_arch("moma", **{field: 0})


def test_it_is_found_by_its_name() -> None:
    assert type(tiny_job("moma").vlm) is MoMaConfig
