from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from kempnerforge.config.data import DataConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.data import Encoder, Layout, Sample, Text, Tokenizer, collate
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.batching.pack import join
from kempnerforge.inspection.audit import audit
from kempnerforge.inspection.contact_sheet import contact_sheet
from tests.data.samples import noise, png
from tests.inspection.rendered import render_rows

PAD, BOS, EOS = 0, 1, 2


class Letters:
    """One token per character."""

    bos_id: int | None = BOS
    eos_id = EOS

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > EOS)


def make_batch(rows: list[list[tuple[str, str]]], image_tokens: int = 3, pad: int = 2) -> Batch:
    """Rows of (prompt, answer) texts after one image each, labels worked out token by token."""
    columns: dict[str, list[list[int]]] = {name: [] for name in ("ids", "labels", "samples", "texts", "kinds", "positions")}
    width = image_tokens + pad + max(sum(len(p) + len(a) + 2 for p, a in row) for row in rows)
    for row in rows:
        tokens = [(PAD, 0, Kind.IMAGE)] * image_tokens
        for number, (prompt, answer) in enumerate(row, start=1):
            tokens += [(BOS, number, Kind.PROMPT)] + [(ord(c), number, Kind.PROMPT) for c in prompt]
            tokens += [(ord(c), number, Kind.ANSWER) for c in answer] + [(EOS, number, Kind.ANSWER)]
        used = len(tokens)
        tokens += [(PAD, 0, Kind.PAD)] * (width - used)
        columns["ids"].append([token for token, _, _ in tokens])
        columns["texts"].append([text for _, text, _ in tokens])
        columns["kinds"].append([int(kind) for _, _, kind in tokens])
        positions = list(range(image_tokens))
        for prompt, answer in row:
            positions += range(image_tokens, image_tokens + len(prompt) + len(answer) + 2)
        columns["positions"].append(positions + [0] * (width - used))
        columns["samples"].append([0] * used + [-1] * (width - used))
        following = [*tokens[1:], (PAD, 0, Kind.PAD)]
        columns["labels"].append([token if kind == Kind.ANSWER else IGNORE for token, _, kind in following])
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return Batch(
        input_ids=tensors["ids"],
        labels=tensors["labels"],
        positions=tensors["positions"],
        sample_ids=tensors["samples"],
        text_ids=tensors["texts"],
        kinds=tensors["kinds"].to(torch.uint8),
        targets=flat_targets(tensors["labels"]),
        images=torch.zeros(len(rows), 3, 4, 4, dtype=torch.uint8),
        image_index=torch.arange(len(rows)),
        image_rows=torch.arange(len(rows)),
        image_starts=torch.zeros(len(rows), dtype=torch.int64),
        image_text_ids=torch.zeros(len(rows), dtype=torch.int64),
        image_sample_ids=torch.zeros(len(rows), dtype=torch.int64),
        image_slots=torch.zeros(len(rows), dtype=torch.int64),
        has_documents=True,
        row_images=1,
        row_words=width - image_tokens - pad,
        leading_images=int(image_tokens > 0),
        sample_names=[f"s/{row}" for row in range(len(rows))],
    )


def flat_targets(labels: Tensor) -> Tensor:
    return (labels.flatten() != IGNORE).nonzero().flatten()


def window_batch(ids: list[int], pad: int = 0) -> Batch:
    """Plain text: inputs ``ids[:-1]``, labels ``ids[1:]``."""
    batch = make_batch([[("", "x" * (len(ids) - 3))]], image_tokens=0, pad=pad)
    end = len(ids) - 1
    batch.input_ids[0, :end], batch.labels[0, :end] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    batch.kinds[0, :end] = Kind.ANSWER
    batch.targets = flat_targets(batch.labels)
    return batch


def test_trained_tokens_stand_in_brackets() -> None:
    batch = make_batch([[("hue?\n", "red"), ("a [b]", "no")], [("q", "a")]])
    first, second = render_rows(batch, Letters(), color=False)
    assert first.splitlines() == [
        "row 0 (s/0): 22 useful tokens, 7 trained, 1 image, 2 texts",
        "       [image x3]",
        "    1  <bos>hue?\\n[red<eos>]",
        "    2  <bos>a \\[b\\][no<eos>]",
        "       [pad x2]",
    ]
    assert second.splitlines()[0] == "row 1 (s/1): 7 useful tokens, 2 trained, 1 image, 1 text"
    assert "<bos>q[a<eos>]" in second


def test_colour_marks_exactly_the_trained_tokens() -> None:
    (row,) = render_rows(make_batch([[("hue?", "r[d")]]), Letters(), color=True)
    assert "\x1b[35m<bos>\x1b[0m\x1b[2mhue?\x1b[0m\x1b[30;42mr[d\x1b[0m\x1b[4;30;42m<eos>\x1b[0m" in row
    assert row.count("30;42m") == 2


def test_names_of_special_tokens_in_a_text_are_told_from_the_tokens() -> None:
    batch = make_batch([[("a<eos>", "b<bos>")]])
    assert "<bos>a\\<eos>[b\\<bos><eos>]" in render_rows(batch, Letters(), color=False)[0]
    (row,) = render_rows(batch, Letters(), color=True)
    assert "\x1b[2ma<eos>\x1b[0m" in row and "\x1b[30;42mb<bos>\x1b[0m\x1b[4;30;42m<eos>\x1b[0m" in row


def test_rendering_follows_labels_not_kinds() -> None:
    batch = make_batch([[("hue?", "red")]])
    batch.kinds[batch.kinds == Kind.ANSWER] = Kind.PROMPT
    assert "<bos>hue?[red<eos>]" in render_rows(batch, Letters(), color=False)[0]
    batch = make_batch([[("hue?", "red")]])
    batch.labels[0, 4] = ord("u")  # position 4 is "h"
    assert "<bos>h[u]e?[red<eos>]" in render_rows(batch, Letters(), color=False)[0]


def test_data_cannot_steer_the_terminal() -> None:
    (row,) = render_rows(make_batch([[("a\x1b[2J\r", "b\x07")]]), Letters(), color=False)
    assert "\x1b" not in row and "\\x1b" in row and "\\x07" in row


def test_windows_of_plain_text_end_on_a_label_beyond_the_row() -> None:
    ids = [ord(c) for c in "abcdef"]
    for pad in (0, 3):
        batch = window_batch(ids, pad)
        (row,) = render_rows(batch, Letters(), color=False)
        assert "a[bcdef]" in row and audit(batch, EOS) == []


def test_a_good_batch_has_no_findings() -> None:
    batch = make_batch([[("hue?", "red"), ("form?", "a b")], [("", "a")]])
    assert audit(batch, EOS) == [] and audit(batch) == []
    assert audit(make_batch([[("hue?", "red")]], image_tokens=0, pad=0), EOS) == []


def interleaved(image_tokens: int, tokenizer: Tokenizer) -> Batch:
    """Two texts about two images, one of which leads both."""
    layout = Layout(image_tokens, 8, 100, 200, 0)
    encoder = Encoder(tokenizer, DataConfig(), layout, seed=0)
    texts = (Text("<image>is it <image> so?", "no"), Text("<image><image>?", "a "))
    return collate([encoder.encode(Sample("s", (png((9, 9, 9)), png((0, 0, 0))), texts), 0)], 0, pad_to=None)


def test_images_are_shown_where_they_stand(tokenizer: Tokenizer) -> None:
    batch = interleaved(3, tokenizer)
    (row,) = render_rows(batch, tokenizer, color=False)
    lines = row.splitlines()
    assert ", 3 images, 2 texts" in lines[0]
    assert lines[1:] == [
        "       [image x3]",
        "    1  <bos>is it [image x3] so?\\n[no<eos>]",
        "    2  [image x3]<bos>?\\n[a <eos>]",
    ]
    assert audit(batch, tokenizer.eos_id) == []
    (coloured,) = render_rows(batch, tokenizer, color=True)
    assert "\x1b[2mis it \x1b[0m\x1b[36m[image x3]\x1b[0m\x1b[2m so?\\n\x1b[0m\x1b[30;42mno\x1b[0m" in coloured


def test_images_without_positions_are_shown_where_they_are_seen(tokenizer: Tokenizer) -> None:
    lines = render_rows(interleaved(0, tokenizer), tokenizer, color=False)[0].splitlines()
    assert lines[1:] == ["       [image]", "    1  <bos>is it [image] so?\\n[no<eos>]", "    2  [image]<bos>?\\n[a <eos>]"]
    named = Tokenizer.train(["what?"], 300)
    named.add_tokens(["<image>"])
    batch = interleaved(0, named)
    lines = render_rows(batch, named, color=False)[0].splitlines()
    assert lines[1:] == [
        "    1  <bos>[image]<image>is it [image]<image> so?\\n[no<eos>]",
        "    2  <bos>[image]<image>[image]<image>?\\n[a <eos>]",
    ]
    assert audit(batch, named.eos_id) == []


def test_an_answer_goes_on_behind_its_images(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, DataConfig(), Layout(2, 8, 100, 200, 0), seed=0)
    sample = Sample("s", (png((9, 9, 9)), png((0, 0, 0))), (Text("", "a<image><image>no"),))
    batch = collate([encoder.encode(sample, 0)], 0, pad_to=None)
    assert "[a][image x2][image x2][no<eos>]" in render_rows(batch, tokenizer, color=False)[0]
    assert audit(batch, tokenizer.eos_id) == []
    behind = int((batch.kinds[0] == Kind.IMAGE).nonzero()[-1])
    for at, finding in ((behind, "answer token is not trained"), (behind - 1, "trained image position")):
        spoilt = collate([encoder.encode(sample, 0)], 0, pad_to=None)
        spoilt.labels[0, at] = IGNORE if at == behind else PAD
        spoilt.targets = flat_targets(spoilt.labels)
        assert any(finding in line for line in audit(spoilt, tokenizer.eos_id))


def test_images_that_stand_elsewhere_are_found(tokenizer: Tokenizer) -> None:
    for shift in (-1, 1, 7):
        batch = interleaved(3, tokenizer)
        batch.image_starts[1] += shift
        assert any("image positions without an image" in line for line in audit(batch, tokenizer.eos_id)), shift


def answer_shifted(batch: Batch) -> None:
    batch.labels = batch.labels.roll(1, dims=1)  # labels that are on their own token


def untrained(batch: Batch) -> None:
    batch.labels[1] = IGNORE


def image_trained(batch: Batch) -> None:
    batch.labels[0, 0] = PAD


def padding_trained(batch: Batch) -> None:
    batch.labels[0, -1] = PAD


def end_of_row_trained_on_padding(batch: Batch) -> None:
    end = int((batch.sample_ids[1] >= 0).sum())
    batch.labels[1, end - 1] = batch.input_ids[1, end]


def no_eos(batch: Batch) -> None:
    batch.labels[batch.labels == EOS] = IGNORE


def prompt_trained(batch: Batch) -> None:
    batch.labels[0, 3] = batch.input_ids[0, 4]


def into_the_next_text(batch: Batch) -> None:
    behind = int((batch.text_ids[0] == 2).nonzero()[0])
    batch.labels[0, behind - 1] = batch.input_ids[0, behind]


FAULTS: list[tuple[Callable[[Batch], None], str]] = [
    (answer_shifted, "label is not the next token"),
    (untrained, "row 1 (s/1): no trained token"),
    (image_trained, "row 0 (s/0): trained image position: 1 position, the first is 1"),
    (padding_trained, "padding has a label"),
    (end_of_row_trained_on_padding, "trained padding position"),
    (no_eos, "last trained token of an answer is not EOS"),
    (prompt_trained, "trained prompt token"),
    (into_the_next_text, "label reaches beyond its text"),
]


@pytest.mark.parametrize(("spoil", "finding"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_each_fault_is_found(spoil: Callable[[Batch], None], finding: str) -> None:
    batch = make_batch([[("hue?", "red"), ("form?", "ring")], [("q", "a")]])
    spoil(batch)
    batch.targets = flat_targets(batch.labels)
    assert any(finding in line for line in audit(batch, EOS)), audit(batch, EOS)


def test_every_changed_label_is_found() -> None:
    good = make_batch([[("hue?", "red"), ("form?", "ring")], [("q", "a")]])
    for row, at in np.ndindex(*good.labels.shape):
        for value in (IGNORE, ord("Z"), int(good.input_ids[row, at])):
            batch = make_batch([[("hue?", "red"), ("form?", "ring")], [("q", "a")]])
            if int(batch.labels[row, at]) == value:
                continue
            batch.labels[row, at] = value
            batch.targets = flat_targets(batch.labels)
            assert audit(batch, EOS), (row, at, value)


def test_targets_must_be_the_positions_with_a_label() -> None:
    batch = make_batch([[("hue?", "red")]])
    batch.targets = batch.targets[1:]
    assert any(line.startswith("targets: ") for line in audit(batch, EOS))


# ---- several samples in a row ----------------------------------------------------------------------------------------


PLAIN = Tokenizer.train(["is it so? yes no maybe"] * 4, 300)
RED, BLUE = png((200, 0, 0)), png((0, 0, 200))
SAMPLES = [
    Sample("a", (RED,), (Text("is it?", "yes"), Text("so?", "no"))),
    Sample("b", (), (Text("", "maybe"),)),
    Sample("c", (RED, BLUE), (Text("is <image> like <image>?", "no"),)),
]


def packed(samples: Sequence[Sample] = SAMPLES, image_tokens: int = 2, pad: int = 3) -> Batch:
    """Two rows: ``samples``, and the first one alone."""
    encoder = Encoder(PLAIN, DataConfig(), Layout(image_tokens, 8, 200, 400, 0), seed=0)
    rows = [join([encoder.encode(sample, 0) for sample in samples]), join([encoder.encode(samples[0], 0)])]
    return collate(rows, PLAIN.pad_id, max(row.table.shape[1] for row in rows) + pad)


def test_a_pack_is_shown_sample_by_sample() -> None:
    for image_tokens, shared, inside in ((2, "[image x2]", "[image x2]"), (0, "[image]", "[image]")):
        first, second = render_rows(packed(image_tokens=image_tokens), PLAIN, color=False)
        assert first.splitlines()[0].startswith("row 0 (a and 2 more): ") and first.splitlines()[0].endswith("3 images, 4 texts, 3 samples")
        assert first.splitlines()[1:] == [
            "  sample 0 (a)",
            f"       {shared}",
            "  0.1  <bos>is it?\\n[yes<eos>]",
            "  0.2  <bos>so?\\n[no<eos>]",
            "  sample 1 (b)",
            "  1.1  <bos>\\n[maybe<eos>]",
            "  sample 2 (c)",
            f"  2.1  <bos>is {inside} like {inside}?\\n[no<eos>]",
            "       [pad x3]",
        ]
        assert "sample" not in second


def test_a_good_pack_has_no_findings() -> None:
    for image_tokens in (0, 1, 3):
        assert audit(packed(image_tokens=image_tokens), PLAIN.eos_id) == []
    assert audit(packed(SAMPLES[1:2]), PLAIN.eos_id) == []


def columns_of(batch: Batch, sample: int, text: int) -> Tensor:
    """Columns of a text in row 0."""
    return ((batch.sample_ids[0] == sample) & (batch.text_ids[0] == text)).nonzero().flatten()


def positions_go_on(batch: Batch) -> None:
    batch.positions[0] = torch.arange(batch.positions.shape[1])


def positions_of_a_text_go_on(batch: Batch) -> None:
    batch.positions[0, columns_of(batch, 0, 2)] += 5


def samples_run_together(batch: Batch) -> None:
    batch.sample_ids[0][batch.sample_ids[0] == 1] = 0


def texts_run_together(batch: Batch) -> None:
    batch.text_ids[0][columns_of(batch, 0, 2)] = 1


def in_pieces(batch: Batch) -> None:
    batch.sample_ids[0][batch.sample_ids[0] == 2] = 0


def no_documents(batch: Batch) -> None:
    batch.has_documents = False


def image_of_another_sample(batch: Batch) -> None:
    batch.image_sample_ids[0] = 2


def image_of_another_text(batch: Batch) -> None:
    batch.image_text_ids[1] = 0


def image_cut_short(batch: Batch) -> None:
    batch.kinds[0, int(batch.image_starts[1]) + 1] = Kind.PROMPT


def no_such_image(batch: Batch) -> None:
    batch.image_index[0] = 99


def unused_image(batch: Batch) -> None:
    batch.image_index[0] = batch.image_index[1]


def text_untrained(batch: Batch) -> None:
    batch.labels[0, columns_of(batch, 1, 1)] = IGNORE


def into_the_next_sample(batch: Batch) -> None:
    last = int(columns_of(batch, 0, 2)[-1])
    batch.labels[0, last] = batch.input_ids[0, last + 1]


def end_of_inner_sample_lost(batch: Batch) -> None:
    batch.labels[0, columns_of(batch, 1, 1)[-2]] = IGNORE


PACK_FAULTS: list[tuple[Callable[[Batch], None], str]] = [
    (positions_go_on, "positions of a text do not count up from 0"),
    (positions_of_a_text_go_on, "positions of a text do not count up from what its sample shares"),
    (samples_run_together, "in pieces, or not in order"),
    (texts_run_together, "positions of a text do not count up"),
    (in_pieces, "in pieces, or not in order"),
    (no_documents, "they would see each other"),
    (image_of_another_sample, "image of another sample or text than the position"),
    (image_of_another_text, "image of another sample or text than the position"),
    (image_cut_short, "image of fewer than 2 positions"),
    (no_such_image, "image_index: 99 is none of the batch's 4 images"),
    (unused_image, "images: 1 of 4 are in no row"),
    (text_untrained, "text without a trained token"),
    (into_the_next_sample, "label reaches beyond its text"),
    (end_of_inner_sample_lost, "last trained token of an answer is not EOS"),
]


@pytest.mark.parametrize(("spoil", "finding"), PACK_FAULTS, ids=[spoil.__name__ for spoil, _ in PACK_FAULTS])
def test_each_fault_of_a_pack_is_found(spoil: Callable[[Batch], None], finding: str) -> None:
    batch = packed()
    spoil(batch)
    batch.targets = flat_targets(batch.labels)
    assert any(finding in line for line in audit(batch, PLAIN.eos_id)), audit(batch, PLAIN.eos_id)


def test_every_changed_label_of_a_pack_is_found() -> None:
    good = packed(pad=1)
    for at in range(good.labels.shape[1]):
        for value in (IGNORE, 299, int(good.input_ids[0, at])):
            batch = packed(pad=1)
            if int(batch.labels[0, at]) == value:
                continue
            batch.labels[0, at] = value
            batch.targets = flat_targets(batch.labels)
            assert audit(batch, PLAIN.eos_id), (at, value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_random_pack_has_findings(data: st.DataObject) -> None:
    words = st.sampled_from(["", "is it?", "so <image>?", "<image> no"])
    samples = []
    for number in range(data.draw(st.integers(1, 4))):
        prompts = data.draw(st.lists(words, min_size=1, max_size=3))
        with_images = any("<image>" in prompt for prompt in prompts)
        prompts = [prompt for prompt in prompts if "<image>" in prompt] if with_images else prompts
        images = 1 if with_images else data.draw(st.integers(0, 2))
        samples.append(Sample(f"s{number}", (RED,) * images, tuple(Text(prompt, "yes") for prompt in prompts)))
    batch = packed(samples, image_tokens=data.draw(st.sampled_from([0, 1, 3])), pad=data.draw(st.integers(0, 2)))
    assert audit(batch, PLAIN.eos_id) == []
    shown = render_rows(batch, PLAIN, color=False)
    assert sum(row.count("[yes<eos>]") for row in shown) == sum(len(sample.texts) for sample in (*samples, samples[0]))


# ---- turns and tiles -------------------------------------------------------------------------------------------------


def conversation() -> Batch:
    """Prompt, answer, end of turn "#", prompt, answer, "#"."""
    tokens = [
        (c, kind) for part, kind in (("hi", 2), ("yo#", 3), ("so?", 2), ("no#", 3)) for c in [ord(c) for c in part] for kind in [kind]
    ]
    batch = make_batch([[("", "x" * (len(tokens) - 2))]], image_tokens=0, pad=2)
    end = len(tokens)
    batch.input_ids[0, :end] = torch.tensor([token for token, _ in tokens])
    batch.kinds[0, :end] = torch.tensor([kind for _, kind in tokens])
    batch.labels[:] = IGNORE
    for at, (token, kind) in enumerate(tokens):
        if kind == Kind.ANSWER:
            batch.labels[0, at - 1] = token
    batch.targets = flat_targets(batch.labels)
    return batch


def test_each_turn_ends() -> None:
    end = ord("#")
    assert audit(conversation(), EOS, ends={end}) == []
    (row,) = render_rows(conversation(), Letters(), color=False)
    assert "hi[yo#]so?[no#]" in row
    assert len(audit(conversation(), EOS)) == 1 and "2 positions, the first is 4" in audit(conversation(), EOS)[0]
    for at, text in ((4, "yo"), (10, "no")):  # an end of turn is not trained
        batch = conversation()
        batch.labels[0, at - 1] = IGNORE
        batch.targets = flat_targets(batch.labels)
        found = "\n".join(audit(batch, EOS, ends={end}))
        assert "not EOS or an end of turn" in found and f"[{text}]" in render_rows(batch, Letters(), color=False)[0]
    batch = conversation()
    batch.input_ids[0, 4], batch.labels[0, 3] = ord("."), ord(".")
    assert audit(batch, EOS, ends={end}) and audit(batch, EOS, ends={end}, every_turn=False) == []


def test_an_answer_goes_on_behind_its_tiles() -> None:
    tokenizer = Tokenizer.train(["is it so?"], 300)
    images = ImagesConfig(fit="tiles", max_side=16, marker_grid=2)
    tokenizer.add_tokens(images.new_tokens())
    for image_tokens in (0, 2):
        encoder = Encoder(tokenizer, DataConfig(images=images), Layout(image_tokens, 8, 100, 200, 0), seed=0)
        texts = (Text("", "a<image>no"), Text("<image>?", "no"))
        batch = collate([encoder.encode(Sample("s", (RED,), texts), 0)], tokenizer.pad_id, None)
        assert audit(batch, tokenizer.eos_id, markers=encoder.marker_ids) == []
        unknown = [line for line in audit(batch, tokenizer.eos_id) if "not EOS" in line]
        assert len(unknown) == (image_tokens > 0)  # no one says that markers belong to the image
        row = render_rows(batch, tokenizer, False, tokenizer.special_names)[0]
        assert row.count("<|global_image|>") == 2 and row.count("<row_2_col_2>") == 2


SHAPES = [(16, 16), (40, 10), (9, 33)]
"""Widths and heights of images."""


@pytest.mark.parametrize(
    ("images", "rows"),
    [
        (ImagesConfig(fit="native"), ["[image x4]", "[image x2]", "[image x2]"]),
        (
            ImagesConfig(fit="tiles", tiling="anyres", markers=False, rows=True),
            [
                "[image x4]" + 2 * "[image x1][image x1]<image_newline>",
                "[image x4]" + 2 * "[image x2][image x2][image x2]<image_newline>",
                "[image x4]" + 6 * "[image x2]<image_newline>",
            ],
        ),
        (
            ImagesConfig(fit="tiles", tiling="overlap", overlap=0, markers=False, rows=True, global_view=False),
            3 * ["<image_newline>[no<eos>]"],
        ),
    ],
)
def test_images_of_which_a_part_is_in_the_row(images: ImagesConfig, rows: list[str]) -> None:
    """Images of other shapes take other numbers of positions, and a row of tiles has a token at its end; a part that
    is not where the row says is found.
    """
    tokenizer = Tokenizer.train(["is it so?"], 300)
    tokenizer.add_tokens(images.new_tokens())
    encoder = Encoder(tokenizer, DataConfig(images=images), Layout(4, 16, 100, 900, 0, token_side=2, cell=8), seed=0)
    samples = [Sample("s", (noise(*size),), (Text("", "a<image>no"),)) for size in SHAPES]
    batch = collate([encoder.encode(sample, 0) for sample in samples], tokenizer.pad_id, None)
    assert audit(batch, tokenizer.eos_id, markers=encoder.marker_ids) == []
    for row, expected in zip(render_rows(batch, tokenizer, False, tokenizer.special_names), rows, strict=True):
        assert expected in row
    moved = replace(batch, image_starts=batch.image_starts + torch.arange(len(batch.image_starts)).eq(0))
    assert any("image positions without an image" in line for line in audit(moved, tokenizer.eos_id, markers=encoder.marker_ids))


# ---- contact sheet ---------------------------------------------------------------------------------------------------


def test_contact_sheet_places_every_image() -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [250, 200, 10]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(5, 3, 16, 16)
    sheet = contact_sheet(images.numpy(), ["a"] * 5, columns=2, tile=32)
    assert sheet.mode == "RGB" and sheet.width == 12 + 2 * 44
    pixels = np.asarray(sheet)
    centres = [tuple(pixels[y, x]) for y, x in zip(*np.nonzero((pixels != 255).any(-1)), strict=True)]
    assert all(tuple(colour) in set(centres) for colour in colours.tolist())
    assert tuple(pixels[12 + 16, 12 + 16]) == (255, 0, 0) and tuple(pixels[12 + 16, 12 + 44 + 16]) == (0, 255, 0)


@pytest.mark.parametrize("caption", ["", "word " * 50, "x" * 500, "日本語 العربية \U0001f600", "\ud800 \x00\x1b\t", "a\n\nb", "é" * 300])
def test_any_caption_can_be_drawn_and_stays_inside(caption: str) -> None:
    sheet = contact_sheet(np.zeros((1, 3, 8, 8), np.uint8), [caption], tile=64)
    pixels = np.asarray(sheet)
    assert sheet.width == 64 + 24 and (pixels[:, -10:] == 255).all() and (pixels[-8:] == 255).all()


def test_long_captions_make_a_sheet_taller_up_to_a_limit() -> None:
    images = np.zeros((1, 3, 8, 8), np.uint8)
    heights = [contact_sheet(images, ["word " * count], tile=64).height for count in (1, 4, 500, 5000)]
    assert heights[0] < heights[1] < heights[2] == heights[3]


def test_small_images_keep_sharp_pixels_and_tall_ones_their_shape() -> None:
    board = np.indices((4, 4)).sum(0) % 2 * 255
    sheet = np.asarray(contact_sheet(np.broadcast_to(board, (1, 3, 4, 4)).astype(np.uint8), [""], tile=64))
    assert set(np.unique(sheet[12:76, 12:76])) == {0, 255}
    tall = np.asarray(contact_sheet(np.zeros((1, 3, 200, 50), np.uint8), [""], tile=64))[12:76, 12:76]
    assert (tall == 0).all(-1).any(0).sum() == 16


def test_empty_and_wrong_input() -> None:
    assert isinstance(contact_sheet(np.zeros((0, 3, 4, 4), np.uint8), []), Image.Image)
    for images, captions in ((np.zeros((1, 3, 4, 4), np.float32), [""]), (np.zeros((1, 4, 4, 3), np.uint8), [""])):
        with pytest.raises(ValueError, match="uint8"):
            contact_sheet(images, captions)
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(np.zeros((1, 3, 4, 4), np.uint8), [])
