from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kempnerforge.data import IGNORE, Encoder, Kind, Layout, Prompt, Sample, SampleError, Text, Tokenizer, collate, prompt_batch
from kempnerforge.data.text.interleave import INPUT_IDS, KINDS, LABELS, POSITIONS, TEXT_IDS

MakeEncoder = Callable[..., Encoder]
Png = Callable[..., bytes]


def text(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt ids with BOS; answer ids with EOS."""
    return [1, *tokenizer.encode(prompt + "\n")], [*tokenizer.encode(answer), 2]


def test_two_texts_of_one_image_by_hand(make_encoder: MakeEncoder, tokenizer: Tokenizer, png: Png) -> None:
    sample = Sample("s", (png((255, 0, 0)),), (Text("what is the colour?", "red"), Text("is it a circle?", "no")))
    (p1, a1), (p2, a2) = text(tokenizer, "what is the colour?", "red"), text(tokenizer, "is it a circle?", "no")
    table = make_encoder(image_tokens=3).encode(sample, 0).table
    assert table[INPUT_IDS].tolist() == [0, 0, 0, *p1, *a1, *p2, *a2]
    skip1, skip2 = [IGNORE] * (len(p1) - 1), [IGNORE] * (len(p2) - 1)
    assert table[LABELS].tolist() == [IGNORE] * 3 + skip1 + a1 + [IGNORE] + skip2 + a2 + [IGNORE]
    assert table[POSITIONS].tolist() == [0, 1, 2, *range(3, 3 + len(p1 + a1)), *range(3, 3 + len(p2 + a2))]
    assert table[TEXT_IDS].tolist() == [0] * 3 + [1] * len(p1 + a1) + [2] * len(p2 + a2)
    assert table[KINDS].tolist() == [1] * 3 + [2] * len(p1) + [3] * len(a1) + [2] * len(p2) + [3] * len(a2)


def test_collate_pads_on_the_right_and_lists_targets(make_encoder: MakeEncoder, tokenizer: Tokenizer, png: Png) -> None:
    encoder = make_encoder(image_tokens=2)
    red = Sample("red", (png((255, 0, 0)),), (Text("", "red"),))
    bare = Sample("bare", (), (Text("what is the colour?", "blue"),))
    both = Sample("both", (png((0, 255, 0)), png((0, 0, 255))), (Text("", "no"), Text("", "yes")))
    batch = collate([encoder.encode(s, 0) for s in (red, bare, both)], pad_id=7, pad_to=None)

    longest = max(2 + 4, len(encoder.encode(bare, 0).table[0]), 4 + 8)
    assert batch.input_ids.shape == (3, longest)
    assert batch.input_ids[0].tolist() == [7, 7, 1, *tokenizer.encode("\n"), *tokenizer.encode("red"), 2, *[7] * (longest - 6)]
    assert batch.kinds.dtype == torch.uint8
    pad = batch.kinds == Kind.PAD
    assert torch.equal(pad, batch.sample_ids == -1)
    assert (batch.labels[pad] == IGNORE).all()
    assert (batch.text_ids[pad] == 0).all()
    assert (batch.positions[pad] == 0).all()
    assert torch.equal(batch.targets, torch.nonzero(batch.labels.flatten() != IGNORE).flatten())
    assert batch.num_targets == (1 + 1) * 4
    assert batch.useful_tokens == int((~pad).sum())

    assert batch.images is not None
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert batch.image_index.tolist() == [0, 1, 2]
    assert batch.image_rows.tolist() == [0, 2, 2]
    assert batch.image_starts.tolist() == [0, 0, 2]
    assert batch.has_documents
    assert batch.sample_names == ["red", "bare", "both"]


def test_targets_predict_the_next_token_of_their_own_text(make_encoder: MakeEncoder, pictures: list[Sample]) -> None:
    encoder = make_encoder(max_text_len=200, seq_len=220)
    batch = collate([encoder.encode(s, 0) for s in pictures], pad_id=0, pad_to=None)
    length = batch.input_ids.shape[1]
    for flat in batch.targets.tolist():
        row, t = divmod(flat, length)
        assert batch.labels[row, t] == batch.input_ids[row, t + 1]
        assert batch.text_ids[row, t] == batch.text_ids[row, t + 1] > 0
        assert batch.kinds[row, t + 1] == Kind.ANSWER
    answers = batch.kinds == Kind.ANSWER
    assert batch.num_targets == int(answers.sum())
    ends = (batch.input_ids == encoder.tokenizer.eos_id) & answers
    assert int(ends.sum()) == sum(len(s.texts) for s in pictures)


def test_fixed_length_and_one_text_a_row(make_encoder: MakeEncoder, png: Png) -> None:
    encoder = make_encoder()
    batch = collate([encoder.encode(Sample("s", (png((1, 2, 3)),), (Text("", "red"),)), 0)], pad_id=0, pad_to=40)
    assert batch.input_ids.shape == (1, 40)
    assert not batch.has_documents


def test_images_outside_the_row(make_encoder: MakeEncoder, png: Png) -> None:
    encoded = make_encoder(image_tokens=0).encode(Sample("s", (png((1, 2, 3)),), (Text("", "red"),)), 0)
    batch = collate([encoded], pad_id=0, pad_to=None)
    assert batch.num_images == 1
    assert not (batch.kinds == Kind.IMAGE).any()
    assert batch.positions[0, 0] == 0


def test_jobs_and_batches_without_images(make_encoder: MakeEncoder, png: Png) -> None:
    with_image = Sample("s", (png((1, 2, 3)),), (Text("", "red"),))
    textual = collate([make_encoder(image_size=0).encode(with_image, 0)], pad_id=0, pad_to=None)
    assert textual.images is None
    assert not (textual.kinds == Kind.IMAGE).any()
    bare = collate([make_encoder().encode(Sample("s", (), (Text("", "red"),)), 0)], pad_id=0, pad_to=None)
    assert bare.images is not None
    assert bare.images.shape == (0, 3, 8, 8)


def test_templates(make_encoder: MakeEncoder, tokenizer: Tokenizer) -> None:
    encoder = make_encoder(prompt_template="Q: {prompt} A:", answer_template=" {answer}.")
    table = encoder.encode(Sample("s", (), (Text("{x}?", "red"),)), 0).table
    assert tokenizer.decode(table[INPUT_IDS]) == "Q: {x}? A: red."
    prompt = encoder.encode_prompt("{x}?", 0).ids
    assert prompt == table[INPUT_IDS, : len(prompt)].tolist()
    assert table[KINDS, len(prompt) - 1 : len(prompt) + 1].tolist() == [Kind.PROMPT, Kind.ANSWER]


def test_empty_prompt_without_bos_starts_with_eos(tokenizer: Tokenizer, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(tokenizer=Tokenizer(tokenizer.backend, eos=tokenizer.eos), prompt_template="{prompt}")
    table = encoder.encode(Sample("s", (), (Text("", "red"),)), 0).table
    assert table[INPUT_IDS, 0] == tokenizer.eos_id
    assert table[LABELS].tolist() == [*tokenizer.encode("red"), tokenizer.eos_id, IGNORE]
    assert encoder.encode_prompt("red", 0) == Prompt(tokenizer.encode("red"))


def test_window_of_token_ids(make_encoder: MakeEncoder) -> None:
    table = make_encoder(max_text_len=2).encode(Sample("s", (), (Text("", (5, 6, 7, 8)),)), 0).table
    assert table[INPUT_IDS].tolist() == [5, 6, 7]
    assert table[LABELS].tolist() == [6, 7, 8]
    assert table[KINDS].tolist() == [Kind.ANSWER] * 3
    assert table[POSITIONS].tolist() == [0, 1, 2]


def test_a_random_subset_in_order_when_not_all_texts_fit(make_encoder: MakeEncoder, tokenizer: Tokenizer) -> None:
    names = "abcdefghij"
    sample = Sample("s", (), tuple(Text("", name) for name in names))  # 4 tokens each
    encoder = make_encoder(max_text_len=14)
    seen = set()
    for seed in range(40):
        encoded = encoder.encode(sample, seed)
        assert encoded.left_out == 7
        assert encoded.table.shape[1] == 12
        kept = tokenizer.decode(encoded.table[INPUT_IDS][encoded.table[KINDS] == Kind.ANSWER])
        assert list(kept) == sorted(set(kept))
        seen.add(kept)
        assert np.array_equal(encoded.table, encoder.encode(sample, seed).table)
    assert set("".join(seen)) == set(names)
    assert len(seen) > 20


def test_text_budget_respects_seq_len(make_encoder: MakeEncoder, png: Png) -> None:
    sample = Sample("s", (png((0, 0, 0)),), tuple(Text("", name) for name in "abcdef"))
    encoded = make_encoder(image_tokens=10, max_text_len=24, seq_len=20).encode(sample, 0)
    assert encoded.table.shape[1] == 10 + 8


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), "sample s7: has no texts"),
        ((Text("q", ""),), "sample s7: empty answer"),
        ((Text("q", " \n"),), "sample s7: empty answer"),
        ((Text("q", "z" * 50),), "sample s7: a text of 54 tokens, max_text_len = 32"),
        ((Text("", "ok"), Text("z" * 50, "a")), "sample s7: a text of 54 tokens, max_text_len = 32"),
        ((Text("q", "a\ud800"),), "sample s7: lone surrogate"),
        ((Text("\udfff", "a"),), "sample s7: lone surrogate"),
        ((Text("q", 3),), "sample s7: prompt and answer must be strings, not str and int"),
        ((Text("", tuple(range(70))),), "sample s7: 0 image and 69 text tokens, train.seq_len = 64"),
        ((Text("", (1,)),), "sample s7: a window of 1 tokens"),
    ],
)
def test_unusable_texts_are_named(make_encoder: MakeEncoder, texts: tuple[Text, ...], message: str) -> None:
    with pytest.raises(SampleError) as error:
        make_encoder().encode(Sample("s7", (), texts), 0)
    assert str(error.value).startswith(message)


def test_unusable_image_names_the_sample(make_encoder: MakeEncoder) -> None:
    with pytest.raises(SampleError, match="sample s7: image 3 bytes: not an image"):
        make_encoder().encode(Sample("s7", (b"abc",), (Text("", "red"),)), 0)


def test_images_alone_may_not_fill_the_row(make_encoder: MakeEncoder, png: Png) -> None:
    with pytest.raises(SampleError, match="64 image and 4 text tokens, train.seq_len = 64"):
        make_encoder(image_tokens=64).encode(Sample("s", (png((0, 0, 0)),), (Text("", "red"),)), 0)


def test_names_of_special_tokens_stay_text(make_encoder: MakeEncoder, tokenizer: Tokenizer) -> None:
    encoded = make_encoder().encode(Sample("s", (), (Text("<eos>", "<bos><pad>"),)), 0)
    assert encoded.table[INPUT_IDS].tolist().count(tokenizer.eos_id) == 1
    assert tokenizer.decode(encoded.table[INPUT_IDS]) == "<eos>\n<bos><pad>"


def test_prompt_batch_pads_on_the_left() -> None:
    layout = Layout(image_tokens=2, image_size=4, max_text_len=8, seq_len=16, pad_to=10)
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    batch = prompt_batch([Prompt([1, 5, 6], (0,)), Prompt([1], (0,)), Prompt([1, 9], (0,))], images, [0, 1, 0], layout, pad_id=7)
    assert batch.input_ids.tolist() == [[7, 7, 1, 5, 6], [7, 7, 7, 7, 1], [7, 7, 7, 1, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert batch.sample_ids.tolist() == [[0] * 5, [-1, -1, 0, 0, 0], [-1, 0, 0, 0, 0]]
    assert batch.text_ids.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert batch.kinds.tolist() == [[1, 1, 2, 2, 2], [0, 0, 1, 1, 2], [0, 1, 1, 2, 2]]
    assert (batch.labels == IGNORE).all()
    assert batch.num_targets == 0
    assert batch.image_index.tolist() == [0, 1, 0]
    assert batch.image_rows.tolist() == [0, 1, 2]
    assert batch.image_starts.tolist() == [0, 2, 1]
    assert batch.has_documents
    assert batch.num_images == 2


def test_prompt_batch_without_images_or_with_several() -> None:
    layout = Layout(image_tokens=2, image_size=4, max_text_len=8, seq_len=16, pad_to=10)
    plain = prompt_batch([Prompt([1, 5]), Prompt([1, 6])], None, None, layout, pad_id=0)
    assert plain.input_ids.tolist() == [[1, 5], [1, 6]]
    assert plain.images is None
    assert not plain.has_documents
    two = prompt_batch([Prompt([1], (0, 0))], torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [(1, 0)], layout, pad_id=0)
    assert two.input_ids.shape == (1, 5)
    assert two.image_index.tolist() == [1, 0]
    assert two.image_starts.tolist() == [0, 2]


def test_prompt_row_equals_the_training_row_up_to_the_answer(make_encoder: MakeEncoder, png: Png) -> None:
    encoder = make_encoder()
    trained = collate([encoder.encode(Sample("s", (png((9, 9, 9)),), (Text("what?", "red"),)), 0)], pad_id=0, pad_to=None)
    asked = prompt_batch([encoder.encode_prompt("what?", 1)], trained.images, None, encoder.layout, pad_id=0)
    length = asked.input_ids.shape[1]
    assert trained.kinds[0, length] == Kind.ANSWER
    for name in ("input_ids", "positions", "sample_ids", "text_ids", "kinds"):
        assert torch.equal(getattr(trained, name)[:, :length], getattr(asked, name))


def test_batch_to_moves_tensors(make_encoder: MakeEncoder) -> None:
    batch = collate([make_encoder().encode(Sample("s", (), (Text("", "red"),)), 0)], pad_id=0, pad_to=None)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.image_starts.device.type == "meta"
    assert moved.sample_names == ["s"]
