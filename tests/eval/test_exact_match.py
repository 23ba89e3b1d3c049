"""Exact match over a model that answers by a rule, so that every count is known."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kempnerforge.config import DataConfig, EvalConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.exam import BLANK, Ranks
from kempnerforge.eval.questions import Question, Truth, examine, questions
from kempnerforge.eval.tasks.exact_match import question_only_prior
from tests.dist import run_ranks
from tests.eval.scripted import (
    BROKEN,
    ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    ListSource,
    Scripted,
    asked_of,
    both,
    evaluate,
    facts,
    grey,
    held_out,
    shade,
    written,
)
from tests.vlm.tiny import ONE, THREE, tiny, tokenizer

CFG = EvalConfig(batch_size=3, max_new_tokens=4)


def question(prompt: str, truth: str) -> Question:
    return Question("s", (), prompt, truth)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_counts(batch_size: int) -> None:
    model = Scripted(lambda prompt, level: "red")
    asked = asked_of(held_out([10, 200, 20, 240, 30, 250, 40]))
    score = evaluate(model, asked, ENCODER, replace(CFG, batch_size=batch_size))
    assert (score.right, score.total) == (4, 7)
    assert score.mean == 4 / 7
    assert score.by_truth == {"blue": (0, 3), "red": (4, 4)}
    assert [answer.question for answer in score.answers] == asked
    assert {answer.text for answer in score.answers} == {"red"}
    assert score.skipped == []
    assert sorted(model.asked) == sorted(zip([q.prompt for q in asked], [10, 200, 20, 240, 30, 250, 40], strict=True))


def test_each_question_is_asked_about_its_own_image() -> None:
    """Texts of one sample share its image, of which one copy is in the batch."""
    samples = [Sample("a", (grey(10),), (Text("one", "red"), Text("two", "red"))), Sample("b", (grey(200),), (Text("one", "blue"),))]
    model = Scripted(shade)
    score = evaluate(model, asked_of(samples), ENCODER, CFG)
    assert score.mean == 1
    assert model.asked == [("one", 10), ("two", 10), ("one", 200)]


def test_blind_asks_every_prompt_once() -> None:
    model = Scripted(shade)
    asked = asked_of(held_out([10, 200, 20, 240, 30, 250, 40]))
    score = evaluate(model, asked, ENCODER, CFG, blind=True)
    assert sorted(model.asked) == [(f"what colour {k}?", BLANK) for k in range(3)]
    assert (score.right, score.total) == (3, 7), "a blind model says blue to all"


def test_unreadable_images_are_counted_and_not_fatal() -> None:
    """Also when a whole batch cannot be read; blind, nothing has to be."""
    asked = asked_of(held_out([None, None, None, 10, 200]))
    score = evaluate(Scripted(shade), asked, ENCODER, CFG)
    assert (score.right, score.total) == (2, 2)
    assert [name for name, _ in score.skipped] == ["s0", "s1", "s2"]
    assert all("not an image" in reason for _, reason in score.skipped)
    assert evaluate(Scripted(shade), asked, ENCODER, CFG, blind=True).total == 5


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of 2 held-out questions can be read; the first: .*not an image"):
        evaluate(Scripted(shade), asked_of(held_out([None, None])), ENCODER, CFG)
    assert evaluate(Scripted(shade), [], ENCODER, CFG).total == 0


MIXED = [
    Sample("one", (grey(10),), (Text("what <image> colour?", "a"), Text("<image>what colour?", "b"))),
    Sample("two", (grey(20), grey(200)), (Text("<image> or <image>?", "c"),)),
    Sample("front", (grey(20), grey(200)), (Text("what colour?", "d"),)),
    Sample("none", (), (Text("what colour?", "e"),)),
    Sample("wrong", (grey(10),), (Text("<image> or <image>?", "f"),)),
]


def test_interleaved_questions() -> None:
    model = Scripted(lambda prompt, level: "c" if level == (20, 200) else "e" if level is None else "x")
    asked = asked_of(MIXED)
    score = evaluate(model, asked, ENCODER, CFG)
    assert model.asked == [
        ("what  colour?", 10),
        ("what colour?", 10),
        (" or ?".strip(), (20, 200)),
        ("what colour?", (20, 200)),
        ("what colour?", None),
    ]
    assert (score.right, score.total) == (2, 5)
    assert score.skipped == [("wrong", "2 of '<image>' in the prompt and 1 images: must be as many, or no '<image>'")]


def test_blind_tells_numbers_of_images_apart() -> None:
    model = Scripted(lambda prompt, level: "d" if level == (BLANK, BLANK) else "e" if level is None else "x")
    asked = asked_of([*MIXED, Sample("front again", (grey(1), grey(2)), (Text("what colour?", "e"),))])
    score = evaluate(model, asked, ENCODER, CFG, blind=True)
    assert len(model.asked) == 5 and ("what colour?", None) in model.asked and ("what colour?", (BLANK, BLANK)) in model.asked
    assert [answer.text for answer in score.answers] == ["x", "x", "d", "d", "e", "d"]
    assert (score.right, score.total) == (2, 6)


def test_the_prior_tells_numbers_of_images_apart() -> None:
    known = [Question("s", (BROKEN,) * count, "q", str(count)) for count in (0, 1, 1, 2)]
    assert question_only_prior(known, known, TEXT_ENCODER) == 1


def test_answers_with_images_are_not_asked_for() -> None:
    found, skipped = questions(ListSource([Sample("s", (BROKEN,), (Text("p", "1 <image>"), Text("<image>p", "1")))]))
    assert [q.prompt for q in found] == ["<image>p"]
    assert skipped == [("s", "the answer holds images, which cannot be generated")]


def test_a_job_without_images_asks_about_words_alone() -> None:
    model = Scripted(lambda prompt, level: "red" if prompt.endswith("0?") else "no")
    score = evaluate(model, asked_of(held_out([10, 200, 20, 240])), TEXT_ENCODER, CFG)
    assert {level for _, level in model.asked} == {None}
    assert (score.right, score.total) == (1, 4)


def test_white_space_does_not_count() -> None:
    def right(truth: str, said: str) -> bool:
        return Answer(question("", truth), 0, said, Truth(truth, 1, False), False).right

    assert right("dark red", " dark\n  red ")
    assert not right("dark red", "darkred")
    assert not right("Red", "red")
    asked = [question("one", " dark\nred "), question("two", "dark red")]
    score = evaluate(Scripted(lambda prompt, level: "dark  red"), asked, TEXT_ENCODER, replace(CFG, max_new_tokens=30))
    assert score.by_truth == {"dark red": (2, 2)}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_comes_back(training: bool) -> None:
    model = Scripted(shade).train(training)
    evaluate(model, asked_of(held_out([10])), ENCODER, CFG)
    assert model.training == training and model.modes == {False}


def test_answers_are_cut_at_max_new_tokens() -> None:
    model = Scripted(lambda prompt, level: "red blue red blue red blue")
    score = evaluate(model, asked_of(held_out([10])), ENCODER, replace(CFG, max_new_tokens=2))
    assert score.answers[0].text == TOKENIZER.decode(TOKENIZER.encode("red blue red blue red blue")[:2])


def test_questions() -> None:
    samples = [
        Sample("a", (BROKEN,), (Text("p", "1"), Text("q", "2"))),
        None,
        Sample("b", (), (Text("r", "3"), Text("", (1, 2, 3)))),  # a window of plain text is no question
    ]
    found, skipped = questions(ListSource(samples))
    assert [(q.sample_id, q.prompt, q.truth) for q in found] == [("a", "p", "1"), ("a", "q", "2"), ("b", "r", "3")]
    assert skipped == [("1", "row 1 is broken")]


@given(st.integers(1, 300), st.integers(0, 400), st.integers(0, 5))
def test_a_subset_asks_each_question_once_and_always_the_same(n: int, limit: int, seed: int) -> None:
    source = ListSource([Sample(str(k), (), (Text("p", "x"),)) for k in range(n)])
    found = examine(source, ENCODER, EvalConfig())
    drawn, again = ([int(q.sample_id) for q in found.draw(limit, seed).values()] for _ in range(2))
    assert drawn == again == sorted(set(drawn)) and len(drawn) == (min(n, limit) or n)
    assert set(drawn) <= {int(q.sample_id) for q in found.draw(limit + 1 if limit else 0, seed).values()}


@pytest.mark.parametrize("texts", [2, 3, 4, 8])
def test_a_subset_does_not_meet_the_same_text_of_each_picture(texts: int) -> None:
    """As many texts as the subset leaves out: every n-th question would be the first of its picture."""
    samples = [Sample(str(k), (), tuple(Text(str(number), "x") for number in range(texts))) for k in range(100)]
    counts = [
        sum(int(q.prompt) == number for q in examine(ListSource(samples), ENCODER, EvalConfig()).draw(100, 0).values())
        for number in range(texts)
    ]
    assert sum(counts) == 100 and all(abs(count - 100 / texts) < 20 for count in counts), counts


def test_the_prior_of_questions_alone() -> None:
    train = [question("a", "1"), question("a", "1"), question("a", "2"), question("b", "2"), question("b", "2"), question("b", " 2")]
    asked = [question("a", "1"), question("a", "2"), question("b", "2"), question("never seen", "2"), question("never seen", "1")]
    assert question_only_prior(train, asked, TEXT_ENCODER) == 3 / 5
    assert question_only_prior(train, [], TEXT_ENCODER) == question_only_prior([], asked, TEXT_ENCODER) == 0


def test_a_real_model() -> None:
    """Truths taken from what the model itself writes are all right, in batches of any size."""
    it = tiny(None, noise=0.3)
    asked = [Question(s.id, s.images, t.prompt, t.answer) for s in (ONE, THREE) for t in s.texts if isinstance(t.answer, str)]
    first = evaluate(it.model, asked, it.encoder, CFG)
    assert first.total == 4 and len({a.text for a in first.answers}) > 1
    own = [replace(a.question, truth=a.text) for a in first.answers]
    assert evaluate(it.model, own, it.encoder, replace(CFG, batch_size=1)).mean == 1
    assert tokenizer().vocab_size == it.job.model.vocab_size


# ---- tiles, conversations, kinds -----------------------------------------------------------------------------------------


def block(width: int, height: int, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def tiled_encoder(**cfg: Any) -> Encoder:
    images = ImagesConfig(fit="tiles", max_side=16, marker_grid=2)
    made = Tokenizer.train(["what colour?\n", "red", "blue", "yes", "no"] * 4, 300)
    made.add_tokens(["<end>", *images.new_tokens()])
    return Encoder(made, DataConfig(images=images, **cfg), Layout(4, 8, 64, 200, 36), seed=0)


def test_tiles_are_asked_about_as_in_training_and_blanked_one_by_one() -> None:
    encoder, model = tiled_encoder(), Scripted(lambda prompt, level: "red")
    samples = [
        Sample("wide", (block(20, 6, 10),), (Text("what colour?", "red"),)),
        Sample("square", (block(9, 9, 20),), (Text("what colour?", "red"),)),
        Sample("wide, too", (block(30, 9, 200),), (Text("what colour?", "blue"),)),
        Sample("broken", (BROKEN,), (Text("what colour?", "red"),)),
    ]
    score = evaluate(model, asked_of(samples), encoder, replace(CFG, batch_size=4))
    assert [level for _, level in model.asked] == [(10,) * 3, (20,) * 5, (200,) * 3]
    assert (score.right, score.total) == (2, 3) and [name for name, _ in score.skipped] == ["broken"]
    blind = Scripted(lambda prompt, level: "red")
    score = evaluate(blind, asked_of(samples), encoder, CFG, blind=True)
    assert [level for _, level in blind.asked] == [(BLANK,) * 3, (BLANK,) * 5], "asked once for each number of views"
    assert (score.right, score.total) == (2, 3) and [name for name, _ in score.skipped] == ["broken"]


def test_conversations_are_asked_turn_by_turn() -> None:
    text = Text("what?", "red", more=(("and?", "blue"), ("so?", "no")))
    found, _ = questions(ListSource([Sample("s", (), (text,)), Sample("t", (), (Text("what?", "blue"),))]))
    assert [(q.prompt, q.truth) for q in found] == [("what?", "red"), ("and?", "blue"), ("so?", "no"), ("what?", "blue")]
    model = Scripted(lambda prompt, level: "red")
    score = evaluate(model, found, TEXT_ENCODER, CFG)
    lines = [TOKENIZER.encode(part) for part in ("what?\n", "and?\n", "so?\n")]
    row = TEXT_ENCODER.encode_question(found[2].asked, ()).ids
    assert row == [1, *lines[0], *TOKENIZER.encode("red"), 2, *lines[1], *TOKENIZER.encode("blue"), 2, *lines[2]]
    assert (score.right, score.total) == (1, 4)
    assert "no" not in str(found[2].unseen), "what is asked does not hold the truth"
    assert found[0].unseen == found[3].unseen != found[1].unseen


def test_an_answer_ends_where_its_template_says() -> None:
    ended = tiled_encoder(template="turns", turns=TurnsConfig(end="<end>"))
    end_id = ended.texts[0].end_id
    assert end_id != ended.tokenizer.eos_id
    asked = [Question("s", (), "what colour?", "red")]

    class Ending(Scripted):
        def _reply(self, batch: Batch, row: int) -> list[int]:
            return [*ended.tokenizer.encode("red"), end_id, *ended.tokenizer.encode("blue")]

    assert evaluate(Ending(shade), asked, ended, CFG).answers[0].text == "red"


def test_each_kind_is_counted_alone() -> None:
    samples = [Sample(str(k), (), (Text("what colour?", truth, kind=kind),)) for k, (truth, kind) in enumerate(KINDS)]
    score = evaluate(Scripted(lambda prompt, level: "red"), asked_of(samples), TEXT_ENCODER, CFG)
    assert {kind: (part.right, part.total) for kind, part in score.kinds().items()} == {"counting": (1, 2), "reading": (1, 1)} and (
        score.right,
        score.total,
    ) == (2, 4)


KINDS = [("red", "reading"), ("blue", "counting"), ("red", "counting"), ("blue", "")]


@pytest.mark.dist
def test_two_ranks_share_the_questions(tmp_path: Path) -> None:
    """All are asked once, ranks call the model equally often, and both know all that one process would: each answer, by answer and by kind, and
    what could not be read, whoever had it.
    """
    results = run_ranks("tests.eval.scripted:two_ranks", 2, tmp_path, timeout=60)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:] + results[1].stderr[-2000:]
    one, two = written(tmp_path / "0.pt"), written(tmp_path / "1.pt")
    assert one[0] == two[0] == [4, 4]
    alone = facts(*both(Scripted(shade, lambda labels: labels.double()), Ranks()))
    assert alone["counts"] == [4, 5, 0] and alone["by_kind"] == {"odd": (0, 1)}
    assert alone["by_truth"] == {"blue": (2, 3), "red": (2, 2)} and [name for name, _ in alone["unreadable"]] == ["s2", "s5"]
    assert one[1] == two[1] == alone


def test_a_turn_is_asked_with_the_images_it_has_seen() -> None:
    """Images are where the conversation has them: none before the turn that brings the first."""
    text = Text("hello", "hi", more=(("see <image> what?", "red"), ("and <image>?", "blue")))
    pictures = (block(8, 8, 10), block(8, 8, 200))
    found, skipped = questions(ListSource([Sample("s", pictures, (text,))]))
    assert not skipped
    assert [len(q.images) for q in found] == [0, 1, 2]
    assert list(found[1].images) == [pictures[0]]
    seen = [ENCODER.encode_question(q.asked, q.images) for q in found]
    assert [len(prompt.image_at) for prompt in seen] == [0, 1, 2] and all(0 not in prompt.image_at for prompt in seen)
