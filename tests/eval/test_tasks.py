"""The tasks of the package: cases computed by hand, and public implementations of the same metrics where they are installed."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kempnerforge.config import EvalConfig, registry
from kempnerforge.eval.answers import Answer, Cut
from kempnerforge.eval.codecs import Box, Point, encode_boxes, encode_points
from kempnerforge.eval.evaluate import evaluate
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import Question, Truth, examine
from kempnerforge.eval.task import QuestionTask, Score, with_other_images
from kempnerforge.eval.tasks.boxes import OVERLAPS, iou, mean_average_precision
from kempnerforge.eval.tasks.cider import cider_d
from kempnerforge.eval.tasks.multiple_choice import letter_of, options_of
from kempnerforge.eval.tasks.vqa_accuracy import normalised
from kempnerforge.util.errors import InputError
from tests.eval.scripted import DEVICE, ENCODER, ListSource, Scripted, held_out
from tests.training.tiny import call, make_job, metrics, rows_of, two_ranks, write_rows
from tests.vlm.tiny import ONE, THREE, all_logits, tiny

COLOURS = "What colour is it?\nA. red\nB. dark blue\n(C) none of them"


def task(name: str, **options: Any) -> QuestionTask:
    return registry.tasks.get(name)(**options)


def answer(said: str, truth: str, *others: str, prompt: str = "what?", kind: str = "") -> Answer:
    return Answer(Question("s", (), prompt, truth, references=others, kind=kind), 0, said, Truth(truth, 1, False), False)


def scored(of: QuestionTask, answers: Sequence[Answer]) -> dict[str, float]:
    """The values of a task, by what follows its name."""
    score = Score({}, list(answers), {}, of.all_points(answers))
    return {"": of.value(score), **of.further(score)}


def lmms_eval(path: str) -> ModuleType:
    """A file of lmms-eval by itself: the package does not import without torchvision."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        pytest.skip("lmms-eval is not installed")
    spec = importlib.util.spec_from_file_location("theirs", Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


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


def test_normalisation_is_that_of_the_official_code() -> None:
    """On random strings of the words and marks that it treats in its own way."""
    theirs = lmms_eval("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    pieces = [
        *theirs.CONTRACTIONS,
        *theirs.NUMBER_MAP,
        *theirs.ARTICLES,
        *theirs.PUNCTUATIONS,
        "1,000",
        "2.5",
        ".5",
        "5.",
        "red",
        "Dog's",
        "it's",
        "\n",
        "\t",
    ]
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(0, 6)))
        if ",," not in text:  # there the copy differs from the original
            plain = text.replace("\n", " ").replace("\t", " ").strip()
            assert normalised(text) == theirs.process_digit_article(theirs.process_punctuation(plain)), repr(text)


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


def test_anls_is_that_of_the_package_anls() -> None:
    theirs = pytest.importorskip("anls").anls_score
    rng = random.Random(1)
    word = lambda: "".join(rng.choice("ab C") for _ in range(rng.randint(1, 7))).strip() or "a"
    for _ in range(2000):
        said, given = word(), [word() for _ in range(rng.randint(1, 3))]
        want = theirs(prediction=said, gold_labels=given, threshold=0.5)
        assert task("anls").points(answer(said, *given)) == pytest.approx(want), (said, given)


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


def test_relaxed_accuracy_is_that_of_lmms_eval() -> None:
    theirs = lmms_eval("tasks/chartqa/utils.py").relaxed_correctness
    rng = random.Random(2)
    value = lambda: rng.choice(
        [f"{rng.uniform(-3, 3):.2f}", str(rng.randint(-3, 3)), f"{rng.randint(90, 110)}%", "1.0", "red", "Red", "1,000"]
    )
    for _ in range(3000):
        said, truth = value(), value()
        assert task("relaxed_accuracy").points(answer(said, truth)) == theirs(said, truth), (said, truth)


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

CAPTIONS = [
    "a dog runs on the grass",
    "two men ride horses",
    "a red bus",
    "a plate of food on a table",
    "dog",
    "the cat the cat the cat the cat",
]
GIVEN = [
    ["a dog runs over green grass", "the dog is on the grass", "a dog plays"],
    ["two people ride horses on a beach", "men on horses"],
    ["a red double decker bus on a street"],
    ["food on a plate on a wooden table", "a table with a plate of food", "dinner"],
    ["a small dog", "dog"],
    ["the cat sits", "a cat on a mat"],
]


def test_cider_by_hand() -> None:
    """Two questions, one word each: the weight of a word that one of two has is log 2, and of one that both have 0."""
    assert cider_d([["red"], ["blue"]], [[["red"]], [["green"]]]) == pytest.approx([10 / 4, 0])
    assert cider_d([["red"], ["red"]], [[["red"]], [["red"]]]) == [0, 0]
    longer = cider_d([["red", "ball"], ["x"]], [[["red"]], [["y"]]])[0]  # half the weight is on a word that is not there; one word too long
    assert longer == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))


def test_cider_is_that_of_pycocoevalcap() -> None:
    theirs: Any = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    _, want = theirs.compute_score(dict(enumerate(GIVEN)), {k: [said] for k, said in enumerate(CAPTIONS)})
    answers = [answer(said, *given) for said, given in zip(CAPTIONS, GIVEN, strict=True)]
    assert task("cider").all_points(answers) == pytest.approx(list(want), abs=1e-9)
    assert scored(task("cider"), answers)[""] == pytest.approx(want.mean(), abs=1e-9)


def test_bleu_by_hand_and_by_sacrebleu_s_own_command() -> None:
    """Five of six words, four of five pairs, three of four, two of three: all but the last; no brevity penalty."""
    one = answer("a dog runs on the lawn", "a dog runs on the grass")
    assert scored(task("bleu"), [one])[""] == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    sacrebleu: Any = pytest.importorskip("sacrebleu")
    answers = [answer(said, *given) for said, given in zip(CAPTIONS, GIVEN, strict=True)]
    columns = [[given[k] if k < len(given) else None for given in GIVEN] for k in range(3)]
    assert scored(task("bleu"), answers)[""] == pytest.approx(sacrebleu.corpus_bleu(CAPTIONS, columns).score / 100)
    want = [sacrebleu.sentence_bleu(said, given).score / 100 for said, given in zip(CAPTIONS, GIVEN, strict=True)]
    assert task("bleu").all_points(answers) == pytest.approx(want)
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


def boxes_of(rng: random.Random, count: int) -> list[Box]:
    found = []
    for _ in range(count):
        x, y = sorted((rng.randint(0, 40), rng.randint(41, 80))), sorted((rng.randint(0, 40), rng.randint(41, 80)))
        found.append(Box(x[0] / 128, y[0] / 128, x[1] / 128, y[1] / 128, rng.choice(["cat", "dog"])))
    return found


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


def test_mean_average_precision_is_coco_s(capsys: pytest.CaptureFixture[str]) -> None:
    coco, evaluation = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    rng = random.Random(3)
    true, said = [boxes_of(rng, rng.randint(0, 4)) for _ in range(30)], []
    for boxes in true:
        near = [
            Box(box.x0, box.y0, box.x1, max(box.y0, box.y1 - rng.choice([0, 4, 16]) / 128), box.label)
            for box in boxes
            if rng.random() < 0.8
        ]
        said.append(near + boxes_of(rng, rng.randint(0, 3)))
        rng.shuffle(said[-1])
    labels = {"cat": 1, "dog": 2}
    row = lambda image, box: {
        "image_id": image,
        "category_id": labels[box.label],
        "bbox": [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0],
    }
    rows = [row(image, box) for image, boxes in enumerate(true) for box in boxes]
    known: Any = coco.COCO()
    known.dataset = {
        "images": [{"id": image} for image in range(len(true))],
        "categories": [{"id": number, "name": label} for label, number in labels.items()],
        "annotations": [one | {"id": k, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} for k, one in enumerate(rows, 1)],
    }
    known.createIndex()
    ranks = [dict.fromkeys(labels, 0) for _ in said]
    detections = []
    for image, boxes in enumerate(said):
        for box in boxes:
            detections.append(row(image, box) | {"score": -ranks[image][box.label]})
            ranks[image][box.label] += 1
    theirs: Any = evaluation.COCOeval(known, known.loadRes(detections), "bbox")
    theirs.params.areaRng, theirs.params.areaRngLbl = [[0, 1e10]], ["all"]
    theirs.evaluate()
    theirs.accumulate()
    precision = theirs.eval["precision"][:, :, :, 0, 2]
    capsys.readouterr()
    assert 0.1 < precision.mean() < 0.9
    assert mean_average_precision(said, true, OVERLAPS) == pytest.approx(precision.mean(), abs=1e-9)
    assert mean_average_precision(said, true, OVERLAPS[:1]) == pytest.approx(precision[0].mean(), abs=1e-9)


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
