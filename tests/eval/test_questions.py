"""What is known of held-out data before a question is asked: what cannot be read, and which true answers no model can write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from kempnerforge.config import DataConfig, EvalConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.questions import DECODED, PICTURES, HeldOut, Question, Truths, examine, plain
from kempnerforge.eval.tasks.exact_match import question_only_prior
from tests.eval.scripted import BROKEN, ENCODER, TEXT_ENCODER, TOKENIZER, ListSource, Scripted, asked_of, evaluate, grey

CFG = EvalConfig(max_new_tokens=6)
LAYOUT = Layout(image_tokens=0, image_size=0, max_text_len=64, seq_len=64, pad_to=64)
WORDS = ["<unk>", "<pad>", "<eos>", "what", "?", "red", "blue", "dark", "sea", ".", "a", "b"]


def lower_case() -> Tokenizer:
    """Whole words, in lower case; what it does not know is one token."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(backend, eos="<eos>", pad="<pad>")


def encoder_of(tokenizer: Tokenizer, **cfg: object) -> Encoder:
    return Encoder(tokenizer, DataConfig(**cfg), LAYOUT, seed=0)  # type: ignore[arg-type]


def text(truth: str, prompt: str = "what?") -> Sample:
    return Sample(truth, (), (Text(prompt, truth),))


def held_out(*truths: str, encoder: Encoder = TEXT_ENCODER, cfg: EvalConfig = CFG) -> HeldOut:
    return examine(ListSource([text(truth) for truth in truths]), encoder, cfg)


# ---- truths ----------------------------------------------------------------------------------------------------------


class Saying(Scripted):
    """Says the ids that the tokenizer of ``encoder`` has for an answer."""

    def __init__(self, encoder: Encoder, answer: str) -> None:
        super().__init__(lambda prompt, level: answer)
        self.encoder = encoder

    def _reply(self, batch: object, row: int) -> list[int]:
        return [*self.encoder.tokenizer.encode(self.answer("", None)), self.encoder.tokenizer.eos_id]


def test_right_answers_of_a_tokenizer_that_writes_otherwise() -> None:
    """The model can only say what the tokenizer writes; truths in capitals and with unknown words are reached all the same."""
    encoder = encoder_of(lower_case())
    asked = asked_of([text("Red"), text("red"), text("BLUE"), text("dark  Café sea")])
    score = evaluate(Saying(encoder, "red"), asked, encoder, CFG)
    assert [answer.right for answer in score.answers] == [True, True, False, False]
    assert score.by_truth == {"red": (2, 2), "blue": (0, 1), encoder.tokenizer.decode([7, 0, 8]): (0, 1)}
    assert evaluate(Saying(encoder, "dark café sea"), asked[3:], encoder, CFG).mean == 1


def test_any_of_several_answers_is_right() -> None:
    encoder = encoder_of(lower_case())
    several = Sample("s", (), (Text("what?", "red", references=("Dark Sea", "blue")),))
    for answer, right in (("red", 1), ("dark sea", 1), ("blue", 1), ("a", 0)):
        score = evaluate(Saying(encoder, answer), asked_of([several]), encoder, CFG)
        assert (score.right, score.total) == (right, 1), answer


def test_the_prior_compares_as_the_tokenizer_writes() -> None:
    encoder = encoder_of(lower_case())
    train = [Question("s", (), "what?", truth) for truth in ("Red", "RED", "red", "blue", "blue")]
    asked = [Question("s", (), "what?", truth) for truth in ("rED", "red", "Blue", "blue")]
    assert question_only_prior(train, asked, encoder) == 2 / 4


def test_what_does_not_survive_is_counted() -> None:
    found = held_out("Red", "red", "blue", "Blue", "sea", "Café", "zz", encoder=encoder_of(lower_case()))
    assert (found.unknown, found.merged[:2], len(found.merged)) == (2, ["Red", "red"], 6)  # "Café" and "zz" are both unknown
    assert found.empty == 2  # what stands for unknown words is a special token
    counts = found.counts()
    assert (counts["unknown_answers"], counts["empty_answers"], counts["merged_answers"]) == (2, 2, 6)
    (line,) = found.remarks()
    assert "2 have characters" in line and "'Red', 'red'" in line
    assert held_out("Red", "red", "Café").remarks() == [], "bytes write everything"


TEMPLATES = {
    "prompt": DataConfig(),
    "written": DataConfig(prompt_template="Q: {prompt} A:", answer_template=" {answer}."),
    "plain": DataConfig(template="plain"),
    "paligemma": DataConfig(template="paligemma"),
    "turns": DataConfig(template="turns", turns=TurnsConfig(answer=" {answer} ok")),
}


@pytest.mark.parametrize("cfg", TEMPLATES.values(), ids=TEMPLATES)
@settings(deadline=None, max_examples=30)
@given(answer=st.text("ab .\u00e9\t\n", min_size=1, max_size=8).filter(str.strip))
def test_a_truth_is_what_is_trained(cfg: DataConfig, answer: str) -> None:
    """For each template: a model that writes the trained tokens is right, and takes as many of them as is said."""
    encoder = Encoder(TOKENIZER, cfg, LAYOUT, seed=0)
    question = replace(asked_of([text(answer)])[0], written="")
    truth = Truths(encoder).of(question)
    labels = encoder.texts[0].encode(Text("what?", answer)).table[1]
    trained = labels[labels >= 0].tolist()
    assert trained[-1] == encoder.end_id() and truth.tokens == len(trained)
    assert truth.text == plain(TOKENIZER.decode(trained[:-1]))


def test_a_truth_of_a_later_turn() -> None:
    asked = asked_of([Sample("s", (), (Text("what?", "red", more=(("and?", "blue"), ("so?", "no"))),))])
    assert [Truths(TEXT_ENCODER).of(question).text for question in asked] == ["red", "blue", "no"]


# ---- too long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 16])
def test_answers_that_cannot_be_written_are_counted(limit: int) -> None:
    truths = ["red", "red blue", "yes no yes", "red blue red blue red"]
    tokens = [len(TOKENIZER.encode(truth)) + 1 for truth in truths]
    want = sum(count > limit for count in tokens)
    cfg = EvalConfig(max_new_tokens=limit)
    found = held_out(*truths, cfg=cfg)
    assert found.too_long == found.counts()["too_long"] == want and found.longest == max(tokens)
    score = evaluate(Scripted(lambda prompt, level: "red"), found.questions, TEXT_ENCODER, cfg)
    assert score.too_long == want
    assert (f"{want} of 4 true answers take more than eval.max_new_tokens = {limit} tokens" in " ".join(found.remarks())) is (want > 0)


# ---- unreadable ------------------------------------------------------------------------------------------------------


CUT_OFF = grey(1)[:-30]
"""Its header is whole."""


def pictured(image: bytes, truth: str = "red") -> Sample:
    return Sample("s", (image,), (Text("what?", truth),))


def test_samples_that_cannot_be_read_are_counted_before_anything_is_asked() -> None:
    samples = [
        pictured(grey(1)),
        None,
        pictured(BROKEN),
        pictured(grey(2), ""),
        Sample("t", (grey(3),), (Text("<image> <image>?", "red"),)),
    ]
    found = examine(ListSource(samples), ENCODER, CFG)
    assert (found.bad, found.looked, len(found.questions)) == (4, 5, 2)  # the picture that cannot be opened is found again when it is asked
    assert [reason for _, reason in found.skipped] == [
        "row 1 is broken",
        "empty answer",
        "2 of '<image>' in the prompt and 1 images: must be as many, or no '<image>'",
    ]
    with pytest.raises(ValueError, match="4 of 5 samples cannot be read; the first: row 1 is broken"):
        found.require(0.79)
    found.require(0.8)
    assert "4 of 5 samples cannot be read" in found.remarks()[0]


def test_nothing_readable_is_refused_whatever_is_allowed() -> None:
    for samples in ([None, None], [pictured(BROKEN)], [pictured(CUT_OFF)], []):
        with pytest.raises(ValueError, match="held-out data: (2 of 2|1 of 1|no samples)"):
            examine(ListSource(samples), ENCODER, CFG).require(1.0)


def test_a_loss_needs_samples_that_fit() -> None:
    long = text("red " * 80)
    assert examine(ListSource([text("red"), long]), TEXT_ENCODER, CFG).bad == 0  # it can be asked
    for cfg in (EvalConfig(loss=True), EvalConfig(exact_match=False)):
        assert examine(ListSource([text("red"), long]), TEXT_ENCODER, cfg).bad == 1


def test_pictures_of_large_sets_are_sampled() -> None:
    """A tenth cannot be opened: the share of those that were looked at says so."""
    samples = [pictured(BROKEN if at % 10 == 0 else grey(1)) for at in range(PICTURES + 500)]
    found = examine(ListSource(samples), ENCODER, CFG)
    assert found.looked == PICTURES and 0.08 < found.bad / found.looked < 0.12
    cut_off = examine(ListSource([pictured(CUT_OFF if at % 2 else grey(1)) for at in range(3 * DECODED)]), ENCODER, CFG)
    assert cut_off.looked == 3 * DECODED and DECODED / 3 < cut_off.bad < DECODED * 2 / 3, "seen where pixels are decoded"
    every = examine(ListSource([None if at % 2 else pictured(grey(1)) for at in range(PICTURES + 500)]), ENCODER, CFG)
    assert every.bad / every.looked >= 0.5


def test_counts_are_plain_values() -> None:
    assert json.loads(json.dumps(held_out("red").counts())) == {
        "samples": 1, "questions": 1, "unreadable": 0, "looked_at": 1, "too_long": 0, "longest_answer": len(TOKENIZER.encode("red")) + 1,
        "unknown_answers": 0, "empty_answers": 0, "merged_answers": 0,
    }  # fmt: skip
