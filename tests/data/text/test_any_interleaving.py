"""Random samples against the rules of the placeholder, written out item by item."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config.data import DataConfig
from kempnerforge.data import Encoder, Kind, Layout, Sample, SampleError, Text, Tokenizer, collate, prompt_batch
from kempnerforge.inspection.audit import audit
from tests.data.text.test_interleave import ANSWER, BARE, IMAGE, NO, PICTURES, PROMPT, columns, placements
from tests.inspection.rendered import render_rows


@dataclass
class Case:
    """A sample and its model: whether the placeholder is a token of its tokenizer, and whether that has a BOS."""

    texts: list[tuple[list[str], list[str]]]  # pieces of prompt and answer, placeholders between them
    images: int
    image_tokens: int
    named: bool
    bos: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    images = draw(st.integers(0, 3))
    piece = st.sampled_from(["", "a", "bc", "what?"])
    texts = []
    for _ in range(draw(st.integers(1, 3))):
        inside = draw(st.integers(0, images))
        prompt = draw(st.lists(piece, min_size=images - inside + 1, max_size=images - inside + 1))
        answer = draw(st.lists(piece, min_size=inside + 1, max_size=inside + 1))
        texts.append((prompt, [*answer[:-1], answer[-1] + "z"]))
    return Case(texts, images, draw(st.sampled_from([0, 1, 3])), draw(st.booleans()), draw(st.booleans()))


PLAIN = Tokenizer.train(["abc"], 300)
NAMED = Tokenizer.train(["abc"], 300)
NAMED.add_tokens(["<image>"])
NO_BOS = Tokenizer(PLAIN.backend, eos=PLAIN.eos)
NAMED_NO_BOS = Tokenizer(Tokenizer.train(["abc"], 300).backend, eos=PLAIN.eos)
NAMED_NO_BOS.add_tokens(["<image>"])


def encoder_of(case: Case) -> Encoder:
    tokenizer = (NAMED if case.bos else NAMED_NO_BOS) if case.named else (PLAIN if case.bos else NO_BOS)
    return Encoder(tokenizer, DataConfig(**BARE), Layout(case.image_tokens, 8, 200, 400, 0), seed=0)


def by_the_rules(case: Case, encoder: Encoder) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]] | None:
    """(id, text, kind, position) of a row and (image, start, text) of its placements, item by item; None: an image is not seen in time."""
    tokenizer, width = encoder.tokenizer, case.image_tokens
    mark = tokenizer.token_id("<image>") if case.named and not width else None
    items: list[list[tuple[str, int]]] = []  # per text: ("image", k), ("prompt", id), ("answer", id)
    for prompt, answer in case.texts:
        line: list[tuple[str, int]] = []
        number = 0
        for kind, pieces in (("prompt", prompt), ("answer", answer)):
            for k, piece in enumerate(pieces):
                if k:
                    line.append(("image", number))
                    line += [("prompt", mark)] if mark is not None else []
                    number += 1
                line += [(kind, token) for token in tokenizer.encode(piece)]
        says_something = any(prompt) or (mark is not None and len(prompt) > 1)
        start = tokenizer.bos_id if tokenizer.bos_id is not None else None if says_something else tokenizer.eos_id
        if start is not None:
            before = 0
            while mark is None and line[before][0] == "image":
                before += 1
            line.insert(before, ("prompt", start))
        items.append([*line, ("answer", tokenizer.eos_id)])
    leads = [next(k for k, item in enumerate(line) if item[0] != "image") if mark is None else 0 for line in items]
    shared = min(leads)
    cells: list[tuple[int, int, int, int]] = []
    placed: list[tuple[int, int, int]] = []
    for number, line in [(0, items[0][:shared]), *((k, line[shared:]) for k, line in enumerate(items, 1))]:
        position = shared * width if number else 0
        for k, (what, value) in enumerate(line):
            if what == "image":
                placed.append((value, len(cells), number))
                following = next((item for item in line[k + 1 :] if item[0] != "image"), None)
                if not width and number and following is not None and following[0] == "answer":
                    return None
            for _ in range(width if what == "image" else 1):
                kind = {"image": IMAGE, "prompt": PROMPT, "answer": ANSWER}[what]
                cells.append((0 if what == "image" else value, number, kind, position))
                position += 1
    return cells, placed


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_interleaving(case: Case) -> None:
    encoder = encoder_of(case)
    texts = tuple(Text("<image>".join(prompt), "<image>".join(answer)) for prompt, answer in case.texts)
    sample = Sample("s", PICTURES[: case.images], texts)
    want = by_the_rules(case, encoder)
    if want is None:
        with pytest.raises(SampleError, match="model.new_tokens"):
            encoder.encode(sample, 0)
        return
    batch = collate([encoder.encode(sample, 0)], 0, None)
    cells, placed = want
    found = columns(batch)
    assert list(zip(found["input_ids"], found["text_ids"], found["kinds"], found["positions"], strict=True)) == cells
    labels = [ahead[0] if ahead[2] == ANSWER else NO for ahead in cells[1:]] + [NO]
    assert found["labels"] == labels
    assert [entry[:1] + entry[2:4] for entry in placements(batch)] == placed
    assert batch.image_slots.tolist() == list(range(len(placed)))
    assert batch.row_words == sum(kind != IMAGE for _, _, kind, _ in cells)
    assert audit(batch, encoder.tokenizer.eos_id) == []
    shown = "\n".join(render_rows(batch, encoder.tokenizer, color=False))
    assert shown.count("[image x" if case.image_tokens else "[image]") == len(placed)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(cases(), min_size=1, max_size=4), st.data())
def test_prompt_rows_are_the_training_rows_up_to_the_answer(several: list[Case], data: st.DataObject) -> None:
    first = several[0]
    trained, prompts, counts = [], [], []
    for case in several:
        case.image_tokens, case.named, case.bos = first.image_tokens, first.named, first.bos
        encoder = encoder_of(case)
        prompt, _ = case.texts[0]
        images = len(prompt) - 1
        try:
            encoded = encoder.encode(Sample("s", PICTURES[:images], (Text("<image>".join(prompt), "z"),)), 0)
        except SampleError:
            with pytest.raises(ValueError, match="model.new_tokens"):
                encoder.encode_prompt("<image>".join(prompt), images)
            continue
        trained.append(collate([encoded], 0, None))
        prompts.append(encoder.encode_prompt("<image>".join(prompt), images))
        counts.append(images)
    if not prompts:
        return
    pool = torch.stack([torch.full((3, 8, 8), k, dtype=torch.uint8) for k in range(6)])
    which = [data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)) for count in counts]
    batch = prompt_batch(prompts, pool, which, encoder_of(first).layout, 0)
    width = batch.input_ids.shape[1]
    for k, alone in enumerate(trained):
        length = alone.input_ids.shape[1] - 2  # the answer is one token and EOS
        begin = width - length
        for name in ("input_ids", "positions", "sample_ids", "text_ids", "kinds"):
            assert torch.equal(getattr(batch, name)[k, begin:], getattr(alone, name)[0, :length]), name
        assert (batch.sample_ids[k, :begin] == -1).all() and (batch.kinds[k, :begin] == Kind.PAD).all()
        mine = batch.image_rows == k
        assert batch.image_index[mine].tolist() == which[k]
        assert (batch.image_starts[mine] - begin).tolist() == alone.image_starts.tolist()
        assert batch.image_slots[mine].tolist() == alone.image_slots.tolist()
        if first.bos:
            assert batch.image_text_ids[mine].tolist() == alone.image_text_ids.tolist()
    assert batch.row_images == max(counts) and (batch.labels == NO).all() and batch.num_targets == 0
    assert batch.row_words == int((batch.kinds > Kind.IMAGE).sum(1).max())
    assert batch.has_documents == bool((batch.sample_ids == -1).any())
