"""How the next token is chosen, and when a row ends."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.generate import Sampling, TextStream, choose, generate, generate_stream, tokens_of
from kempnerforge.inference.answer import Answer
from kempnerforge.model.transformer import Cache
from kempnerforge.vlm.base import Output
from tests.eval.scripted import ENCODER, TEXT_ENCODER, TOKENIZER, Scripted
from tests.vlm.tiny import tiny

DRAWS = 20_000
NOTHING = torch.empty(1, 0, dtype=torch.int64)  # the prompt, which these rules do not read


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(logits: Tensor, sampling: Sampling) -> Tensor:
    """(V,) of many draws."""
    ids = choose(logits.expand(DRAWS, -1), sampling, rng())
    return torch.bincount(ids, minlength=logits.shape[-1]) / DRAWS


# ---- choose -------------------------------------------------------------------------------------------------------------


def test_temperature_0_is_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    assert choose(logits, Sampling(), rng()).tolist() == [1, 0]
    assert choose(logits, Sampling(top_k=2, top_p=0.1), rng()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_draws_follow_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(1, 12, generator=rng(3))
    warped = TemperatureLogitsWarper(temperature)(NOTHING, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(NOTHING, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(NOTHING, warped)
    want = warped.softmax(-1)[0]
    got = frequencies(logits, Sampling(temperature, top_k, top_p))
    assert not got[want == 0].any()
    assert (got - want).abs().max() < 0.015


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3)):
        assert int((frequencies(logits, Sampling(1.0, top_p=top_p)) > 0).sum()) == kept


def test_seeds() -> None:
    logits = torch.zeros(50, 100)
    draws = [choose(logits, Sampling(1.0), rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("temperature", [1e-3, 1e-45, 1e-320])
def test_a_very_low_temperature_is_the_most_likely(temperature: float) -> None:
    logits = torch.tensor([[1e4, 1e4 + 2, -1e4]])
    assert choose(logits, Sampling(temperature), rng()).tolist() == [1]
    assert int((frequencies(logits, Sampling(inf)) > 0.3).sum()) == 3


def test_bf16_logits() -> None:
    assert choose(torch.zeros(3, 5, dtype=torch.bfloat16), Sampling(1.0, top_k=2, top_p=0.9), rng()).shape == (3,)


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": 2**63}]
)
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


# ---- generate -----------------------------------------------------------------------------------------------------------

ANSWERS = {"a": "red", "b": "", "c": "blue red blue"}


def three_rows(max_new_tokens: int, **kwargs: object) -> tuple[list[list[int]], list[list[int]], Scripted]:
    """New ids of three prompts, the steps as they were streamed, and the model."""
    streamed: list[list[int]] = []
    model = Scripted(lambda prompt, level: ANSWERS[prompt])
    prompts = [TEXT_ENCODER.encode_prompt(prompt, 0) for prompt in ANSWERS]
    batch = prompt_batch(prompts, None, None, TEXT_ENCODER.layout, TOKENIZER.pad_id)
    made = generate(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        eos_id=TOKENIZER.eos_id,
        on_token=lambda ids: streamed.append(ids.tolist()),
        **kwargs,  # type: ignore[arg-type]
    )
    return made, streamed, model


def test_every_row_ends_at_its_own_eos() -> None:
    made, streamed, _ = three_rows(50)
    assert [TOKENIZER.decode(ids) for ids in made] == list(ANSWERS.values())
    longest = len(TOKENIZER.encode(ANSWERS["c"])) + 1
    assert len(streamed) == longest, "no step after the last row has ended"
    eos = TOKENIZER.eos_id
    assert [step[1] for step in streamed] == [eos] * longest, "a row that has ended repeats EOS"
    assert [[step[row] for step in streamed][: len(made[row])] for row in range(3)] == made


def test_max_new_tokens() -> None:
    made, streamed, model = three_rows(2)
    assert made[2] == TOKENIZER.encode(ANSWERS["c"])[:2] and len(streamed) == 2
    assert model.position == 2, "the token after the last one is not computed"


def test_other_ranks_may_need_more_steps() -> None:
    asked = []
    made, streamed, _ = three_rows(20, all_done=lambda done: asked.append(done) or len(asked) == 12)
    assert len(streamed) == 12
    assert asked == sorted(asked) and asked[-1]
    assert [TOKENIZER.decode(ids) for ids in made] == list(ANSWERS.values())


def test_later_steps_hold_one_word_a_row_and_no_image() -> None:
    seen = []

    class Spy(Scripted):
        def forward(self, batch: Batch, cache: Cache | None = None) -> Output:
            seen.append(batch)
            return super().forward(batch, cache)

    prompts = [ENCODER.encode_prompt("what <image> is <image>?", 2), ENCODER.encode_prompt("<image>a", 1), ENCODER.encode_prompt("b", 0)]
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    batch = prompt_batch(prompts, pixels, [[0, 1], [2], []], ENCODER.layout, TOKENIZER.pad_id)
    generate(Spy(lambda prompt, level: "red"), batch, max_new_tokens=3, eos_id=TOKENIZER.eos_id)
    assert (seen[0].row_images, seen[0].leading_images) == (2, 0)
    last = batch.positions[:, -1]
    for step, later in enumerate(seen[1:], 1):
        assert (later.row_images, later.row_words, later.leading_images, later.images) == (0, 1, 0, None)
        tensors = (later.image_index, later.image_rows, later.image_starts, later.image_text_ids, later.image_sample_ids, later.image_slots)
        assert all(tensor.shape == (0,) and tensor.dtype == torch.int64 for tensor in tensors)
        assert torch.equal(later.positions[:, 0], last + step) and (later.text_ids == 1).all()


def test_a_seed_gives_the_same_text_again() -> None:
    it = tiny(None)
    batch = it.prompts([("what?", []), ("is it red?", [])], [])
    made = [generate(it.model, batch, max_new_tokens=8, eos_id=-1, sampling=Sampling(1.0, seed=seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


# ---- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20, seed=3)])
def test_a_stream_is_what_generate_collects(sampling: Sampling) -> None:
    it = tiny(None)
    batch = it.prompts([("what?", []), ("is it red?", [])], [])
    whole = generate(it.model, batch, max_new_tokens=12, eos_id=-1, sampling=sampling)
    stream = generate_stream(it.model, batch, max_new_tokens=12, eos_id=-1, sampling=sampling)
    assert [list(row) for row in zip(*(ids.tolist() for ids in stream), strict=True)] == whole
    alone = it.prompts([("what?", [])], [])
    assert (
        list(tokens_of(it.model, alone, max_new_tokens=12, eos_id=-1, sampling=sampling))
        == generate(it.model, alone, max_new_tokens=12, eos_id=-1, sampling=sampling)[0]
    )


def test_a_stream_works_only_when_asked_and_leaves_gradients_on() -> None:
    model = Scripted(lambda prompt, level: ANSWERS[prompt])
    batch = prompt_batch([TEXT_ENCODER.encode_prompt("c", 0)], None, None, TEXT_ENCODER.layout, TOKENIZER.pad_id)
    stream = generate_stream(model, batch, max_new_tokens=50, eos_id=TOKENIZER.eos_id)
    assert model.replies == []
    first = next(stream)
    assert model.position == 1 and torch.is_grad_enabled() and not first.requires_grad
    del stream
    assert model.position == 1, "no one asked for more"


def streamed_text(ids: Sequence[int], decode: Any = TOKENIZER.decode) -> list[str]:
    stream = TextStream(decode)
    return [*(stream.push(token) for token in ids), stream.finish()]


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=40))
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    pieces = streamed_text(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_any_tokens_stream_to_their_text(ids: list[int]) -> None:
    """Bytes that are no characters, and special tokens in the middle."""
    assert "".join(streamed_text(ids)) == TOKENIZER.decode(ids)


def byte_fallback() -> Tokenizer:
    """As SentencePiece models of LLaMA's kind are: words with a blank in front, and a byte each for all else."""
    pieces = ["<pad>", "<bos>", "<eos>", *(f"<0x{k:02X}>" for k in range(256)), *"\u2581theca\u00e9", "\u2581the", "\u2581cat", "\ufffd"]
    backend = tokenizers.Tokenizer(models.BPE({piece: k for k, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.add_special_tokens(pieces[:3])
    trimmed = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(trimmed)
    return Tokenizer(backend, eos="<eos>", bos="<bos>", pad="<pad>")


FALLBACK = byte_fallback()
FALLBACK_IDS = st.integers(0, FALLBACK.vocab_size - 1) | st.sampled_from(
    [2, 3 + 0x0A, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, FALLBACK.vocab_size - 3]
)


@settings(deadline=None)
@given(st.lists(FALLBACK_IDS, max_size=40))
def test_any_tokens_of_byte_fallback_stream_to_their_text(ids: list[int]) -> None:
    """One stray byte makes replacement characters of its whole run, of bytes that were a text so far as well."""
    answer = Answer(ids, {FALLBACK.vocab_size}, FALLBACK.decode, FALLBACK.byte_ids)
    assert "".join(answer) == FALLBACK.decode(ids) == answer.text


def test_what_stands_behind_a_stray_byte_is_streamed() -> None:
    names = ["<0x0A>", "<0xE2>", "\u2581the", "\u2581cat"]
    ids = [FALLBACK.token_id(name) or 0 for name in names]
    assert len(FALLBACK.byte_ids) == 256 and not TOKENIZER.byte_ids
    assert [*Answer(ids, (), FALLBACK.decode, FALLBACK.byte_ids)] == ["", "", "\ufffd\ufffd the", " cat", ""]
    assert "".join(streamed_text(ids, FALLBACK.decode)).endswith(" the cat")  # nor where no one says which tokens are bytes


def test_decoders_that_trim_the_first_token() -> None:
    """Metaspace drops the blank that a text starts with; a piece in the middle keeps its own."""
    words = ["\u2581the", "\u2581cat", "s", "\u2581sat"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    assert streamed_text([0, 1, 2, 3], decode) == ["the", " cat", "s", " sat", ""]


def test_the_work_of_a_stream_grows_with_its_text() -> None:
    seen: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return TOKENIZER.decode(ids)

    streamed_text(TOKENIZER.encode("red blue " * 50), decode)
    assert max(seen) <= 3
