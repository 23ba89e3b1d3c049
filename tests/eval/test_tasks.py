"""The tasks of the package: cases computed by hand, and public implementations of the same metrics where they are installed."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.metrics import COMPARISONS, Comparison, answer, scored, task
from kempnerforge.config import EvalConfig
from kempnerforge.eval.answers import Cut
from kempnerforge.eval.codecs import Box, Point, encode_boxes, encode_points
from kempnerforge.eval.evaluate import evaluate
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import Question, examine
from kempnerforge.eval.task import with_other_images
from kempnerforge.eval.tasks.boxes import iou
from kempnerforge.eval.tasks.cider import cider_d
from kempnerforge.eval.tasks.multiple_choice import letter_of, options_of
from kempnerforge.eval.tasks.vqa_accuracy import normalised
from kempnerforge.util.errors import InputError
from tests.eval.scripted import DEVICE, ENCODER, ListSource, Scripted, held_out
from tests.training.tiny import call, make_job, metrics, rows_of, two_ranks, write_rows
from tests.vlm.tiny import ONE, THREE, all_logits, tiny

COLOURS = "What colour is it?\nA. red\nB. dark blue\n(C) none of them"


@pytest.mark.parametrize("compared", COMPARISONS, ids=lambda one: one.pairs.__name__)
def test_metrics_are_those_of_public_implementations(compared: Comparison) -> None:
    try:
        pairs = list(compared.pairs(random.Random(1)))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert [ours for ours, _ in pairs] == pytest.approx([theirs for _, theirs in pairs], abs=1e-9)
    assert len(pairs) >= 20 and (len({round(theirs, 6) for _, theirs in pairs}) > 1 or "normalisation" in compared.task)


# ---- VQA accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("same", "want"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(same: int, want: float) -> None:
    """The closed form for ten annotators: min(1, 0.3 n)."""
    given = ["Red!"] * same + ["blue"] * (10 - same)
    assert task("vqa_accuracy").points(answer("red", *given)) == pytest.approx(want)


def test_vqa_accuracy_of_fewer_annotators() -> None:
    of = task("vqa_accuracy")
    assert of.points(answer("two", "2")) == 1 and of.points(answer("two", "3")) == 0
    assert of.points(answer("x", "x", "x", "y")) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The dog.", "dog"),
        ("an  apple\n", "apple"),
        ("Two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("wouldnt've", "wouldn't've"),
        ("red/green", "red green"),
        ("red / green", "red green"),
        ("1,000 dogs!", "1000 dogs"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
    ],
)
def test_answers_are_normalised_as_by_the_official_code(text: str, want: str) -> None:
    assert normalised(text) == want


# ---- texts and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "given", "want"),
    [
        ("kitten", ("sitting",), 1 - 3 / 7),
        (" KITTEN ", ("kitten",), 1),
        ("abcd", ("ab",), 0),  # a distance of one half is too far
        ("abc", ("ab", "abcd"), 0.75),
        ("", ("a",), 0),
    ],
)
def test_anls_by_hand(said: str, given: tuple[str, ...], want: float) -> None:
    assert task("anls").points(answer(said, *given)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("said", "truth", "want"),
    [
        ("104", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("12%", "0.12", True),
        ("Red", "red", True),
        ("reds", "red", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("nan", "1", False),
        ("inf", "1", False),
    ],
)
def test_relaxed_accuracy_by_hand(said: str, truth: str, want: bool) -> None:
    assert task("relaxed_accuracy").points(answer(said, truth)) is want


def test_pope_by_hand() -> None:
    """Of four true "yes" three are found, and one of three "no" is called "yes"."""
    said = ["Yes", "yes, there is one", "There is a dog. It is not red", "No", "Yes.", "No, there is not", "there is no dog"]
    truths = ["yes", "Yes", "yes", "yes", "no", "no", "no"]
    of = task("pope")
    found = scored(of, [answer(*pair, kind=kind) for pair, kind in zip(zip(said, truths, strict=True), "aabbabb", strict=True)])
    assert found[""] == pytest.approx(5 / 7)
    assert (found["_precision"], found["_recall"], found["_f1"], found["_yes_ratio"]) == (3 / 4, 3 / 4, 3 / 4, 4 / 7)
    assert found["/a"] == pytest.approx(2 / 3) and found["_f1/b"] == pytest.approx(2 / 3) and found["_yes_ratio/b"] == 0.25
    assert of.question(Question("s", (), "?", "maybe")) is None and of.question(Question("s", (), "?", " No")) is not None


# ---- captions ----------------------------------------------------------------------------------------------------------


def test_cider_by_hand() -> None:
    """Two questions, one word each: the weight of a word that one of two has is log 2, and of one that both have 0."""
    assert cider_d([["red"], ["blue"]], [[["red"]], [["green"]]]) == pytest.approx([10 / 4, 0])
    assert cider_d([["red"], ["red"]], [[["red"]], [["red"]]]) == [0, 0]
    longer = cider_d([["red", "ball"], ["x"]], [[["red"]], [["y"]]])[0]  # half the weight is on a word that is not there; one word too long
    assert longer == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))


def test_bleu_by_hand() -> None:
    """Five of six words, four of five pairs, three of four, two of three: all but the last; no brevity penalty."""
    pytest.importorskip("sacrebleu")
    one = answer("a dog runs on the lawn", "a dog runs on the grass")
    assert scored(task("bleu"), [one])[""] == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    with pytest.raises(InputError, match="tokenize = 'words': must be one of 13a, "):
        task("bleu", tokenize="words")


# ---- multiple choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b", ""),
        ("B. dark blue", "B"),
        ("dark blue.", "B"),
        ("The answer is B", "B"),
        ("Answer: (C)", "C"),
        ("A red one", ""),
        ("D", ""),
        ("", ""),
        ("none of them", "C"),
    ],
)
def test_letters_are_read_strictly(text: str, want: str) -> None:
    assert letter_of(text, options_of(COLOURS)) == want


def test_options_of_a_prompt() -> None:
    assert options_of(COLOURS) == {"A": "red", "B": "dark blue", "C": "none of them"}
    assert options_of("A. only one") == options_of("B. two\nC. three") == options_of("what?") == {}


def test_multiple_choice_by_letter() -> None:
    of = task("multiple_choice")
    said = [answer(text, truth, prompt=COLOURS) for text, truth in (("A", "A"), ("(B)", "dark blue"), ("who knows", "B"), ("A.", "C"))]
    assert scored(of, said) == {"": 0.5, "_no_letter": 0.25}
    assert of.question(Question("s", (), COLOURS, "green")) is None and of.question(Question("s", (), "what?", "A")) is None


@pytest.mark.parametrize("per", ["answer", "tokens", "bytes"])
def test_choice_by_likelihood(per: str) -> None:
    """By hand, from the logits of each question alone with each choice; one image cannot be read."""
    it = tiny("joint_decoder", noise=0.3)
    choices = ["red", "blue square", "no"]
    text = lambda sample: replace(sample.texts[0], answer="no")
    asked = [replace(sample, texts=(text(sample),)) for sample in (ONE, THREE)]
    asked.append(replace(ONE, id="broken", images=(b"no image",), texts=(replace(text(ONE), prompt="what?"),)))
    cfg = EvalConfig(exact_match=False, tasks=["choice_likelihood"], options={"choice_likelihood": {"choices": choices, "per": per}})
    found = evaluate(Exam(it.model, it.encoder, cfg, DEVICE, held_out=examine(ListSource(asked), it.encoder, cfg, pictures=0)))
    seeing = found.tasks["choice_likelihood"].seeing
    assert seeing is not None and len(seeing.answers) == 2 and len(seeing.unreadable) == 1
    for said, sample in zip(seeing.answers, asked, strict=False):
        nats = []
        for choice in choices:
            batch = it.batch(replace(sample, texts=(replace(sample.texts[0], answer=choice),)))
            kept = batch.labels >= 0
            one = float(all_logits(it.model, batch)[kept].log_softmax(-1).gather(-1, batch.labels[kept][:, None]).sum())
            nats.append(one / {"answer": 1, "tokens": int(kept.sum()), "bytes": len(choice)}[per])
        assert said.text == choices[nats.index(max(nats))]
    assert found.values["eval/choice_likelihood"] == sum(said.text == "no" for said in seeing.answers) / 2


def test_choices_in_the_prompt_are_scored_by_letter_or_text() -> None:
    question = Question("s", (), COLOURS, "B")
    for score, want in (("letter", ["A", "B", "C"]), ("text", ["red", "dark blue", "none of them"])):
        of: Any = task("choice_likelihood", score=score)
        assert of._choices(question) == want and of._right(question) == want[1]
    with pytest.raises(InputError, match="choices = .*two or more different ones"):
        task("choice_likelihood", choices=["a", " a"])


# ---- boxes and points --------------------------------------------------------------------------------------------------


def test_boxes_by_hand() -> None:
    """Overlaps of one half and one third; two boxes in another order; one too many."""
    box = lambda x0, x1, label="cat": Box(x0, 0.0, x1, 0.5, label)
    assert iou(box(0, 0.5), box(0, 0.25)) == 0.5 and iou(box(0, 0.5), box(0.25, 0.75)) == pytest.approx(1 / 3)
    assert iou(box(0.1, 0.1), box(0.1, 0.1)) == 0
    cases = [
        ([box(0, 0.5)], [box(0, 0.25)], True),
        ([box(0, 0.5)], [box(0.25, 0.75)], False),
        ([box(0.5, 0.75, "dog"), box(0, 0.25)], [box(0, 0.25), box(0.5, 0.75)], True),
        ([box(0, 0.25), box(0, 0.25)], [box(0, 0.25)], False),
        ([box(0, 0.25), box(0, 0.25)], [box(0, 0.25), box(0.5, 0.75)], False),
    ]
    answers = [answer(encode_boxes(said), encode_boxes(true)) for said, true, _ in cases]
    assert [task("boxes").points(one) for one in answers] == [right for _, _, right in cases]
    assert task("boxes").question(Question("s", (), "where?", "on the left")) is None
    found = scored(
        task("boxes"), [answer("no box", encode_boxes([box(0, 0.5)])), answer(encode_boxes([box(0, 0.5)]), encode_boxes([box(0, 0.25)]))]
    )
    assert found[""] == 0.5
    assert found["_map50"] == pytest.approx(51 / 101)  # all precise up to a recall of 0.5
    assert found["_map"] == pytest.approx(51 / 101 / 10)  # an overlap of 0.5 is enough for the first of ten


def test_points_by_hand() -> None:
    """A greedy matching would take the nearest true point for the first one, and leave the second without."""
    point = lambda x: Point(x, 0.5, "mug")
    greedy = answer(encode_points([point(0.50), point(0.54)]), encode_points([point(0.52), point(0.46)]))
    of = task("points")
    assert of.points(greedy) == 1
    half = answer(encode_points([point(0.1), point(0.5), point(0.9)]), encode_points([point(0.1)]))
    none = answer("There are none.", "There are none.")
    wrong = answer(encode_points([point(0.1)]), "There are none.")
    assert [of.points(each) for each in (half, none, wrong)] == [0.5, 1, 0]
    found = scored(of, [greedy, half, none, wrong])
    assert found == {"": pytest.approx(2.5 / 4), "_precision": pytest.approx(3 / 6), "_recall": 1}
    assert of.question(Question("s", (), "where?", "left")) is None


# ---- beside every score ------------------------------------------------------------------------------------------------


def test_answers_that_were_cut_are_counted() -> None:
    """Four tokens at most: an end token after three is an end; after four there was none."""
    model = Scripted(lambda prompt, level: "redredredred" if level == 10 else "red")
    cfg = EvalConfig(batch_size=3, max_new_tokens=4, tasks=["anls"], blind=False)
    found = evaluate(Exam(model, ENCODER, cfg, DEVICE, held_out=examine(ListSource(held_out([10, 20, 30])), ENCODER, cfg)))
    assert (found.values["eval/cut"], found.values["eval/anls_cut"], found.values["eval/anls_questions"]) == (1, 1, 3)
    seeing = found.tasks["anls"].seeing
    assert seeing is not None and [isinstance(each.text, Cut) for each in seeing.answers] == [True, False, False]


def test_images_of_other_questions() -> None:
    """A model that looks answers what it sees; one image is dark, so that half of the shuffled answers are wrong."""
    samples = held_out([10, 20, 200, 210])
    cfg = EvalConfig(batch_size=3, max_new_tokens=4, shuffled=True)
    model = Scripted(lambda prompt, level: "red" if level < 100 else "blue")
    found = evaluate(Exam(model, ENCODER, cfg, DEVICE, held_out=examine(ListSource(samples), ENCODER, cfg))).values
    assert (found["eval/exact_match"], found["eval/exact_match_shuffled"], found["eval/exact_match_blind"]) == (1, 0, 0.5)
    questions = {k: Question(str(k), images, "?", "x") for k, images in enumerate([(b"a",), (b"a",), (b"b",), (b"c",), (), (b"a", b"b")])}
    assert {k: question.images for k, question in with_other_images(questions).items()} == {0: (b"b",), 1: (b"b",), 2: (b"c",), 3: (b"a",)}


TASKS = ["vqa_accuracy", "anls", "relaxed_accuracy", "pope", "cider", "multiple_choice", "choice_likelihood", "boxes", "points"]


def test_all_tasks_on_two_ranks_are_those_on_one(tmp_path: Path) -> None:
    """Several at once, in training and in ``kempnerforge eval``: each question counts once; one rank has fewer of them."""
    for name, train in (("one", call), ("two", two_ranks)):
        job = make_job(tmp_path / name, extra=f"[eval]\ntasks = {TASKS}\nshuffled = true\nmax_new_tokens = 8\n")
        rows = rows_of(tmp_path / name)[:7]
        truths = ["yes", "no", encode_boxes([Box(0, 0, 0.5, 0.5, "cat")]), encode_points([Point(0.5, 0.5, "a")]), "B", "12", "red"]
        rows = [row | {"answer": [truth, truth, "red"]} for row, truth in zip(rows, truths, strict=True)]
        rows[4]["prompt"] = COLOURS.replace("What colour is it?", "?")
        write_rows(tmp_path / name / "test.jsonl", rows)
        ended = train(
            "train",
            job,
            "--optimizer.lr=0",
            "--train.max_steps=2",
            "--eval.interval=1",
            "--eval.batch_size=2",
            "--vlm.max_text_len=150",
            "--model.max_seq_len=200",
            "--train.seq_len=200",
        )
        assert ended.code == 0, ended
    found = [metrics(tmp_path / name / "run")[-1] for name in ("one", "two")]
    keys = [key for key in found[0] if key.startswith("eval/")]
    assert {f"eval/{name}{end}" for name in TASKS for end in ("", "_questions", "_unreadable", "_cut")} <= set(keys)
    assert {f"eval/{name}{end}" for name in TASKS[:3] for end in ("_blind", "_shuffled")} <= set(keys)
    assert all(found[0][key] == found[1][key] for key in keys)
    assert [found[0][f"eval/{name}_questions"] for name in TASKS] == [7, 7, 7, 2, 7, 1, 1, 1, 1]
    ended = call("eval", tmp_path / "two" / "run", "--json")
    assert ended.code == 0 and '"anls_shuffled"' in ended.out, ended
    assert all(f'"{name}": ' in ended.out for name in TASKS)
