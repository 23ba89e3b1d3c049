"""Beam search: the rules of transformers, on its own model, and the ways to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kempnerforge.eval.beams import beam_search
from kempnerforge.eval.generate import Sampling, generate
from tests.vlm.tiny import tiny

VOCAB, LENGTHS, NEW = 24, (7, 4, 5, 1), 10


def llama(seed: int) -> LlamaForCausalLM:
    """Random and sure of what it says, so that texts end early and late."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.6, tie_word_embeddings=False, **sizes)).eval()


def searched(model: LlamaForCausalLM, beams: int, ends: list[int], penalty: float, all_done: Callable[[bool], bool] = bool) -> Tensor:
    """(B, NEW) by ``beam_search``, which reads all text anew for each token."""
    rows, mask = prompts()

    def scores() -> Tensor:
        with torch.no_grad():
            return model(rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits[:, -1]

    def advance(which: Tensor, ids: Tensor) -> Tensor:
        nonlocal rows, mask
        rows, mask = (torch.cat([old[which], new[:, None]], 1) for old, new in ((rows, ids), (mask, torch.ones_like(ids))))
        return scores()

    kwargs = {"beams": beams, "ends": torch.tensor(ends), "length_penalty": penalty, "all_done": all_done}
    return beam_search(scores(), advance, max_new_tokens=NEW, **kwargs)


def prompts() -> tuple[Tensor, Tensor]:
    """(B, S) ids and attention mask, padded on the left."""
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - length for length in LENGTHS]).long()
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(1))
    return ids * mask, mask


def cut(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((k for k, id_ in enumerate(row) if id_ in ends), None)]


@pytest.mark.parametrize("penalty", [1.0, 0.0, -2.0])
@pytest.mark.parametrize(("beams", "ends"), [(2, [2]), (3, [2, 5, 9]), (8, [2])])
def test_it_finds_what_transformers_finds(beams: int, ends: list[int], penalty: float) -> None:
    lengths = set()
    for seed in range(2):
        model = llama(seed)
        ids, mask = prompts()
        options = {"num_beams": beams, "length_penalty": penalty, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        want = model.generate(ids, attention_mask=mask, eos_token_id=ends, **options)[:, ids.shape[1] :].tolist()
        got = searched(model, beams, ends, penalty).tolist()
        assert [cut(row, ends) for row in got] == [cut(row, ends) for row in want]
        lengths |= {len(cut(row, ends)) for row in got}
    assert len(lengths) > 1


def test_one_beam_is_greedy_and_further_steps_change_nothing() -> None:
    model, ends = llama(0), [2]
    ids, mask = prompts()
    want = model.generate(ids, attention_mask=mask, eos_token_id=ends, max_new_tokens=NEW, do_sample=False, pad_token_id=2)
    assert [cut(row, ends) for row in searched(model, 1, ends, 1.0).tolist()] == [
        cut(row, ends) for row in want[:, ids.shape[1] :].tolist()
    ]
    model, asked = llama(1), list[bool]()
    ends = [2, 5, 9, 11, 13]
    longer = searched(model, 2, ends, -2.0, lambda done: bool(asked.append(done)))
    assert any(asked[:-1]), "other ranks went on"
    assert torch.equal(longer, searched(model, 2, ends, -2.0))


def test_more_beams_find_likelier_texts_and_stream_them() -> None:
    it = tiny("cross_attention", noise=0.3)
    it.model.eval()
    batch = it.prompts([("what?", []), ("is it red?", [])], [])
    steps: list[Tensor] = []
    wide = generate(it.model, batch, max_new_tokens=6, eos_id=-1, sampling=Sampling(beams=5), on_token=steps.append)
    assert torch.stack(steps, 1).tolist() == wide != generate(it.model, batch, max_new_tokens=6, eos_id=-1)
    first = wide[0][0]  # a text that ends at once is the best short one
    assert generate(it.model, batch, max_new_tokens=6, eos_id=first, sampling=Sampling(beams=2, length_penalty=-9.0))[0] == []
    assert generate(it.model, batch, max_new_tokens=0, eos_id=-1, sampling=Sampling(beams=2)) == [[], []]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beams": 0}, "beams = 0"),
        ({"beams": 2, "temperature": 0.5}, "beams = 2: a beam search draws nothing; not with temperature = 0.5"),
        ({"length_penalty": 0.5}, "length_penalty = 0.5: is only read with beams above 1"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty = nan"),
        ({"beams": 2, "length_penalty": 1e10}, "length_penalty = 10000000000.0: need at least 1, and a number from -10 to 10"),
    ],
)
def test_settings_that_contradict_each_other(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**bad)
