"""Images among the words: rows written by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kempnerforge.config.data import DataConfig
from kempnerforge.data import IGNORE, Batch, Encoder, Kind, Prompt, Sample, SampleError, Text, Tokenizer, collate, prompt_batch
from tests.data.samples import png

MakeEncoder = Callable[..., Encoder]
IMAGE, PROMPT, ANSWER = int(Kind.IMAGE), int(Kind.PROMPT), int(Kind.ANSWER)
NO = IGNORE
BARE = {"prompt_template": "{prompt}"}
PICTURES = tuple(png((40 * k, 0, 255 - 40 * k)) for k in range(6))


@pytest.fixture(scope="module")
def marked() -> Tokenizer:
    """With the placeholder as a token."""
    made = Tokenizer.train(["."], 300)
    made.add_tokens(["<image>", "<end>"])
    return made


def row(encoder: Encoder, images: int, *texts: tuple[str, str]) -> Batch:
    """A batch of one row."""
    sample = Sample("s", PICTURES[:images], tuple(Text(*text) for text in texts))
    return collate([encoder.encode(sample, 0)], 0, None)


def ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer.encode(text)


def columns(batch: Batch) -> dict[str, list[int]]:
    return {name: getattr(batch, name)[0].tolist() for name in ("input_ids", "labels", "positions", "text_ids", "kinds")}


def placements(batch: Batch) -> list[tuple[int, ...]]:
    """(image, row, start, text, slot) of each."""
    names = ("image_index", "image_rows", "image_starts", "image_text_ids", "image_slots")
    assert batch.image_sample_ids.tolist() == [0] * len(batch.image_index)
    return list(zip(*(getattr(batch, name).tolist() for name in names), strict=True))


# ---- rows by hand ----------------------------------------------------------------------------------------------------


def test_image_a_image_b(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=2, **BARE)
    batch = row(encoder, 2, ("<image>a<image>b", "c"))
    a, b, c = ids(encoder, "abc")
    assert columns(batch) == {
        "input_ids": [0, 0, 1, a, 0, 0, b, c, 2],
        "labels": [NO, NO, NO, NO, NO, NO, c, 2, NO],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "text_ids": [0, 0, 1, 1, 1, 1, 1, 1, 1],
        "kinds": [1, 1, 2, 2, 1, 1, 2, 3, 3],
    }
    assert placements(batch) == [(0, 0, 0, 0, 0), (1, 0, 4, 1, 1)]
    assert batch.targets.tolist() == [6, 7] and not batch.has_documents
    assert (batch.row_images, batch.row_words, batch.leading_images) == (2, 5, 0)


def test_several_texts_share_the_images_that_lead_them_all(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=2, **BARE)
    batch = row(encoder, 2, ("<image><image>a", "b"), ("<image>b<image>", "c"))
    a, b, c = ids(encoder, "abc")
    assert columns(batch) == {
        "input_ids": [0, 0, 0, 0, 1, a, b, 2, 1, b, 0, 0, c, 2],
        "labels": [NO, NO, NO, NO, NO, b, 2, NO, NO, NO, NO, c, 2, NO],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7],
        "text_ids": [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        "kinds": [1, 1, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1, 3, 3],
    }
    assert placements(batch) == [(0, 0, 0, 0, 0), (1, 0, 2, 1, 1), (1, 0, 10, 2, 2)]
    assert batch.images is not None and len(batch.images) == 2, "encoded once, placed twice"
    assert (batch.row_images, batch.row_words, batch.leading_images) == (3, 8, 0)


def test_images_inside_an_answer(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=3)
    batch = row(encoder, 2, ("a", "<image>b<image>"))
    a, line, b = ids(encoder, "a\nb")
    assert columns(batch) == {
        "input_ids": [1, a, line, 0, 0, 0, b, 0, 0, 0, 2],
        "labels": [NO, NO, NO, NO, NO, b, NO, NO, NO, 2, NO],
        "positions": list(range(11)),
        "text_ids": [1] * 11,
        "kinds": [2, 2, 2, 1, 1, 1, 3, 1, 1, 1, 3],
    }
    assert placements(batch) == [(0, 0, 3, 1, 0), (1, 0, 7, 1, 1)]


def test_images_that_lead_stand_as_if_nothing_had_been_written(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    plain = row(encoder, 2, ("a", "b"), ("what?", "c"))
    written = row(encoder, 2, ("<image><image>a", "b"), ("<image><image>what?", "c"))
    by_template = row(make_encoder(prompt_template="<image><image>{prompt}\n"), 2, ("a", "b"), ("what?", "c"))
    for batch in (written, by_template):
        assert columns(batch) == columns(plain) and placements(batch) == placements(plain)
        assert batch.leading_images == plain.leading_images == 2
    caption = row(make_encoder(**BARE), 1, ("", "<image>c"))
    assert columns(caption) == columns(row(make_encoder(**BARE), 1, ("", "c")))


def test_images_without_positions(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=0, **BARE)
    batch = row(encoder, 3, ("<image>a<image><image>b", "c"))
    a, b, c = ids(encoder, "abc")
    assert columns(batch)["input_ids"] == [1, a, b, c, 2]
    assert columns(batch)["labels"] == [NO, NO, c, 2, NO]
    assert columns(batch)["kinds"] == [2, 2, 2, 3, 3]
    assert placements(batch) == [(0, 0, 0, 0, 0), (1, 0, 2, 1, 1), (2, 0, 2, 1, 2)]
    assert (batch.row_images, batch.row_words, batch.leading_images) == (3, 5, 0)


def test_images_without_positions_but_with_a_token(make_encoder: MakeEncoder, marked: Tokenizer) -> None:
    encoder = make_encoder(image_tokens=0, tokenizer=marked, **BARE)
    mark, end = marked.new_token_ids
    batch = row(encoder, 3, ("<image>a", "b<image>c<end><image>"), ("<image>", "c<image><image>b"))
    a, b, c = ids(encoder, "abc")
    assert columns(batch) == {
        "input_ids": [1, mark, a, b, mark, c, end, mark, 2, 1, mark, c, mark, mark, b, 2],
        "labels": [NO, NO, b, NO, c, end, NO, 2, NO, NO, c, NO, NO, b, 2, NO],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6],
        "text_ids": [1] * 9 + [2] * 7,
        "kinds": [2, 2, 2, 3, 2, 3, 3, 2, 3, 2, 2, 3, 2, 2, 3, 3],
    }
    assert placements(batch) == [(0, 0, 1, 1, 0), (1, 0, 4, 1, 1), (2, 0, 7, 1, 2), (0, 0, 10, 2, 3), (1, 0, 12, 2, 4), (2, 0, 13, 2, 5)]
    unwritten = row(encoder, 1, ("a", "b"))
    assert columns(unwritten)["input_ids"] == [1, a, b, 2] and placements(unwritten) == [(0, 0, 0, 0, 0)]


def test_placeholders_vanish_with_the_images(make_encoder: MakeEncoder, marked: Tokenizer) -> None:
    for tokenizer in (marked, Tokenizer.train(["."], 300)):
        encoder = make_encoder(image_tokens=0, image_size=0, tokenizer=tokenizer, **BARE)
        batch = row(encoder, 2, ("a<image>b", "<image>c"))
        assert columns(batch)["input_ids"] == [1, *tokenizer.encode("abc"), 2] and placements(batch) == []
        assert encoder.encode_prompt("<image>a<image>b", 5) == Prompt([1, *tokenizer.encode("ab")])


def test_new_tokens_are_found_anywhere_and_other_names_are_text(make_encoder: MakeEncoder, marked: Tokenizer) -> None:
    encoder = make_encoder(image_tokens=2, tokenizer=marked, answer_template="{answer}<end>", **BARE)
    batch = row(encoder, 1, ("a<end><eos>", "b<image>"))
    found = columns(batch)["input_ids"]
    assert found.count(marked.token_id("<end>")) == 2 and found.count(2) == 1 and marked.token_id("<image>") not in found
    assert "<eos>" in marked.decode(found)


def test_another_placeholder(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_placeholder="[*]", **BARE)
    batch = row(encoder, 1, ("a[*]<image>", "b"))
    assert placements(batch) == [(0, 0, 2, 1, 0)]
    assert "<image>" in encoder.tokenizer.decode(columns(batch)["input_ids"])
    for bad in ("", "  ", "{image}", "}"):
        with pytest.raises(ValueError, match="image_placeholder = "):
            DataConfig(image_placeholder=bad)


# ---- what does not fit together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (1, [("<image>a<image>", "b")], "2 of '<image>' in a text and 1 images"),
        (2, [("<image>a", "b")], "1 of '<image>' in a text and 2 images"),
        (0, [("<image>a", "b")], "1 of '<image>' in a text and 0 images"),
        (1, [("<image>a", "b"), ("a", "b")], "0 of '<image>' in a text and 1 images"),
        (1, [("a", "b"), ("a", "<image><image>b")], "0 of '<image>' in a text and 1 images"),
        (1, [("a", " <image> ")], "empty answer"),
    ],
)
@pytest.mark.parametrize("image_tokens", [0, 2])
def test_placeholders_must_match(
    images: int, texts: list[tuple[str, str]], message: str, image_tokens: int, make_encoder: MakeEncoder, marked: Tokenizer
) -> None:
    encoder = make_encoder(image_tokens=image_tokens, tokenizer=marked)
    with pytest.raises(SampleError, match=f"sample s: {message}"):
        row(encoder, images, *texts)


@pytest.mark.parametrize("text", [("a", "b<image>c"), ("a", "b<image>"), ("a<image>", "b")])
def test_an_image_that_nothing_could_see_in_time(text: tuple[str, str], make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=0, **BARE)
    with pytest.raises(SampleError, match="add '<image>' to model.new_tokens"):
        row(encoder, 1, text)
    row(make_encoder(image_tokens=1, **BARE), 1, text)


def test_prompts_that_cannot_be_asked(make_encoder: MakeEncoder) -> None:
    for image_tokens in (0, 2):
        encoder = make_encoder(image_tokens=image_tokens)
        with pytest.raises(ValueError, match="2 of '<image>' in the prompt and 1 images"):
            encoder.encode_prompt("<image>a<image>b", 1)
        with pytest.raises(ValueError, match="1 of '<image>' in the prompt and 0 images"):
            encoder.encode_prompt("a<image>b", 0)
        with pytest.raises(ValueError, match="'<image>' after text cannot be generated"):
            make_encoder(image_tokens=image_tokens, answer_template="see <image>{answer}").encode_prompt("a", 1)
    with pytest.raises(ValueError, match="add '<image>' to model.new_tokens"):
        make_encoder(image_tokens=0, **BARE).encode_prompt("a<image>", 1)
    assert make_encoder(image_tokens=0, **BARE).encode_prompt("<image>", 1) == Prompt([1], (0,))


def test_room_counts_the_images_of_each_text(make_encoder: MakeEncoder) -> None:
    """Each text is BOS, one letter, one image of 4, one letter, EOS: 4 tokens, 8 positions."""
    texts = [(f"{name}<image>", name) for name in "abcdef"]
    assert row(make_encoder(image_tokens=4, max_text_len=24, seq_len=48, **BARE), 1, *texts).texts_left_out == 0
    assert row(make_encoder(image_tokens=4, max_text_len=23, seq_len=48, **BARE), 1, *texts).texts_left_out == 1
    assert row(make_encoder(image_tokens=4, max_text_len=24, seq_len=47, **BARE), 1, *texts).texts_left_out == 1
    assert row(make_encoder(image_tokens=4, max_text_len=4, seq_len=48, **BARE), 1, *texts).input_ids.shape == (1, 8)
    with pytest.raises(SampleError, match="a text of 4 tokens, max_text_len = 3"):
        row(make_encoder(image_tokens=4, max_text_len=3, seq_len=48, **BARE), 1, *texts)
    with pytest.raises(SampleError, match="4 image and 4 text tokens, train.seq_len = 7"):
        row(make_encoder(image_tokens=4, max_text_len=7, seq_len=7, **BARE), 1, *texts)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_rows_with_none_one_and_several_images(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=2, **BARE)
    samples = [
        Sample("none", (), (Text("a", "b"),)),
        Sample("one", PICTURES[:1], (Text("a<image>", "b"), Text("<image>", "c"))),
        Sample("two", PICTURES[1:3], (Text("<image>a<image>", "b"),)),
    ]
    batch = collate([encoder.encode(sample, 0) for sample in samples], pad_id=7, pad_to=None)
    assert placements(batch) == [(0, 1, 2, 1, 0), (0, 1, 6, 2, 1), (1, 2, 0, 0, 0), (2, 2, 4, 1, 1)]
    assert (batch.row_images, batch.row_words, batch.leading_images) == (2, 7, 0)
    assert batch.images is not None and batch.images[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert (batch.input_ids[batch.kinds == Kind.IMAGE] == 7).all()
    assert batch.has_documents


@pytest.mark.parametrize(
    ("prompts", "leading"),
    [
        ([("a", 1), ("bc", 1)], 1),
        ([("a", 2), ("<image><image>b", 2)], 2),
        ([("a", 1), ("b", 2)], 0),
        ([("a", 1), ("b", 0)], 0),
        ([("<image>a", 1), ("b<image>c", 1)], 0),
        ([("<image>a<image>c", 2)], 0),
    ],
)
def test_leading_images(prompts: list[tuple[str, int]], leading: int, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(**BARE)
    samples = [Sample("s", PICTURES[:count], (Text(prompt, "x"),)) for prompt, count in prompts]
    assert collate([encoder.encode(sample, 0) for sample in samples], 0, None).leading_images == leading
    outside = make_encoder(image_tokens=0, **BARE)
    assert collate([outside.encode(sample, 0) for sample in samples], 0, None).leading_images == 0


def test_leading_images_of_prompts_begin_in_the_first_column(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(**BARE)
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for words, leading in ((("a", "b"), 1), (("a", "bcd"), 0)):
        batch = prompt_batch([encoder.encode_prompt(word, 1) for word in words], pixels, None, encoder.layout, 0)
        assert batch.leading_images == leading


def test_an_answer_template_that_begins_with_the_image(make_encoder: MakeEncoder, marked: Tokenizer) -> None:
    for image_tokens, tokenizer in ((2, Tokenizer.train(["."], 300)), (0, marked)):
        encoder = make_encoder(image_tokens=image_tokens, tokenizer=tokenizer, answer_template="<image>{answer}")
        asked = prompt_batch([encoder.encode_prompt("a", 1)], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, encoder.layout, 0)
        trained = row(encoder, 1, ("a", "b"))
        length = asked.input_ids.shape[1]
        assert trained.input_ids[0, length:].tolist() == [*tokenizer.encode("b"), 2]
        assert trained.input_ids[0, :length].tolist() == asked.input_ids[0].tolist()
        assert placements(asked) == placements(trained)
        assert encoder.count_placeholders("a") == 1 and encoder.count_placeholders("<image>a") == 2


def test_pixels_follow_their_images(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(image_tokens=1, **BARE)
    samples = [Sample("s", PICTURES[k : k + 2], (Text("a<image>b<image>", "c"), Text("<image><image>", "c"))) for k in range(3)]
    batch = collate([encoder.encode(sample, 0) for sample in samples], 0, None)
    assert batch.images is not None
    reds = batch.images[batch.image_index, 0, 0, 0].reshape(3, 4)  # (B, placements)
    assert np.array_equal(reds.numpy(), [[40 * k, 40 * k + 40] * 2 for k in range(3)])
