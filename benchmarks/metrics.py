"""Our metrics beside public implementations of the same, on random cases: the table "What was compared" of docs/tasks.md.

Prints a row for each: the task, what it is compared with, how many numbers were compared, and their largest difference. What is not installed
is named in its row. tests/eval/test_tasks.py makes the same comparisons.

Usage: PYTHONPATH=. python benchmarks/metrics.py [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.codecs import Box, encode_boxes
from kempnerforge.eval.questions import Question, Truth
from kempnerforge.eval.task import QuestionTask, Score
from kempnerforge.eval.tasks.boxes import OVERLAPS, mean_average_precision
from kempnerforge.eval.tasks.vqa_accuracy import normalised

Pairs = Iterator[tuple[float, float]]
"""Our value and theirs."""
LABELS = {"cat": 1, "dog": 2}
WORDS = ["a", "the", "dog", "cat", "horse", "man", "on", "in", "runs", "sits", "red", "small", "grass", "street", "two"]
VQA_FILE = "tasks/_task_utils/vqa_eval_metric.py"


def task(name: str, **options: Any) -> QuestionTask:
    return registry.tasks.get(name)(**options)


def answer(said: str, truth: str, *others: str, prompt: str = "what?", kind: str = "") -> Answer:
    return Answer(Question("s", (), prompt, truth, references=others, kind=kind), 0, said, Truth(truth, 1, False), False)


def scored(of: QuestionTask, answers: Sequence[Answer]) -> dict[str, float]:
    """The values of a task, by what follows its name."""
    score = Score({}, list(answers), {}, of.all_points(answers))
    return {"": of.value(score), **of.further(score)}


def lmms_eval(path: str) -> Any:
    """A file of lmms-eval by itself, as the package imports much that its metrics do not need."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'lmms_eval'")
    spec = importlib.util.spec_from_file_location("theirs", Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


# ---- texts and numbers ---------------------------------------------------------------------------------------------------


def vqa_words(rng: random.Random) -> Callable[[], str]:
    """Strings of the words and marks that the normalisation treats in its own way."""
    theirs = lmms_eval(VQA_FILE).EvalAIAnswerProcessor
    odd = ["1,000", "2.5", ".5", "5.", "red", "Dog's", "it's", "\n", "\t"]
    pieces = [*theirs.CONTRACTIONS, *theirs.NUMBER_MAP, *theirs.ARTICLES, *theirs.PUNCTUATIONS, *odd]
    make = lambda: "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(0, 6)))
    return lambda: next(text for text in iter(make, None) if ",," not in text)  # there the copy differs from the original


def vqa_normalisation(rng: random.Random) -> Pairs:
    """1 for the same text."""
    theirs, word = lmms_eval(VQA_FILE).EvalAIAnswerProcessor(), vqa_words(rng)
    for _ in range(5000):
        plain = (text := word()).replace("\n", " ").replace("\t", " ").strip()
        yield float(normalised(text) == theirs.process_digit_article(theirs.process_punctuation(plain))), 1.0


def vqa_accuracy(rng: random.Random) -> Pairs:
    theirs, word, of = importlib.import_module("lmms_eval.tasks.vqav2.utils"), vqa_words(rng), task("vqa_accuracy")
    for _ in range(1000):
        some = [word() for _ in range(3)]
        said, *given = rng.choices(some, k=11)
        doc = {"question_id": 0, "answers": [{"answer": text, "answer_id": k} for k, text in enumerate(given)]}
        yield of.points(answer(said, *given)), theirs.vqav2_process_results(doc, [said])["exact_match"]


def anls(rng: random.Random) -> Pairs:
    theirs = importlib.import_module("anls").anls_score
    word = lambda: "".join(rng.choice("ab C") for _ in range(rng.randint(1, 7))).strip() or "a"
    for _ in range(2000):
        said, given = word(), [word() for _ in range(rng.randint(1, 3))]
        yield task("anls").points(answer(said, *given)), theirs(prediction=said, gold_labels=given, threshold=0.5)


def relaxed_accuracy(rng: random.Random) -> Pairs:
    theirs = lmms_eval("tasks/chartqa/utils.py").relaxed_correctness
    value = lambda: rng.choice(
        [f"{rng.uniform(-3, 3):.2f}", str(rng.randint(-3, 3)), f"{rng.randint(90, 110)}%", "1.0", "red", "Red", "1,000"]
    )
    for _ in range(3000):
        said, truth = value(), value()
        yield float(task("relaxed_accuracy").points(answer(said, truth))), float(theirs(said, truth))


def pope(rng: random.Random) -> Pairs:
    """Of answers "yes" and "no": theirs reads no others. Its share of "yes" is of the truth, ours of the answers."""
    theirs = lmms_eval("tasks/pope/utils.py")
    for _ in range(200):
        pairs = [(rng.choice(["yes", "no", "Yes"]), rng.choice(["yes", "no"])) for _ in range(rng.randint(1, 12))]
        ours = scored(task("pope"), [answer(*pair) for pair in pairs])
        rows = [theirs.pope_process_results({"answer": truth, "question_id": 0}, [said])["pope_accuracy"] for said, truth in pairs]
        for name, key in (("accuracy", ""), ("precision", "_precision"), ("recall", "_recall"), ("f1_score", "_f1")):
            yield ours[key], getattr(theirs, f"pope_aggregate_{name}")(rows)


# ---- captions ------------------------------------------------------------------------------------------------------------


def captions(rng: random.Random, count: int) -> list[Answer]:
    """Answers with two to four references, which share words with them."""
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))
    found = []
    for _ in range(count):
        given = [text() for _ in range(rng.randint(2, 4))]
        words = given[0].split()
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        found.append(answer(rng.choice([" ".join(words), text()]), *given))
    return found


def cider(rng: random.Random) -> Pairs:
    theirs: Any = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    answers = captions(rng, 500)
    mean, each = theirs.compute_score(
        {k: list(one.question.given) for k, one in enumerate(answers)}, {k: [one.text] for k, one in enumerate(answers)}
    )
    yield from zip(task("cider").all_points(answers), map(float, each), strict=True)
    yield scored(task("cider"), answers)[""], float(mean)


def bleu(rng: random.Random) -> Pairs:
    """Of each answer, and of all as one corpus."""
    theirs: Any = importlib.import_module("sacrebleu")
    answers = captions(rng, 500)
    said, given = [one.text for one in answers], [one.question.given for one in answers]
    each = [theirs.sentence_bleu(*pair).score / 100 for pair in zip(said, given, strict=True)]
    yield from zip(task("bleu").all_points(answers), each, strict=True)
    columns = [[texts[k] if k < len(texts) else None for texts in given] for k in range(4)]
    yield scored(task("bleu"), answers)[""], theirs.corpus_bleu(said, columns).score / 100


# ---- boxes ---------------------------------------------------------------------------------------------------------------


def boxes_of(rng: random.Random, count: int) -> list[Box]:
    found = []
    for _ in range(count):
        x, y = sorted((rng.randint(0, 40), rng.randint(41, 80))), sorted((rng.randint(0, 40), rng.randint(41, 80)))
        found.append(Box(x[0] / 128, y[0] / 128, x[1] / 128, y[1] / 128, rng.choice([*LABELS])))
    return found


def box_accuracy(rng: random.Random) -> Pairs:
    """One box a question."""
    theirs = lmms_eval("tasks/refcoco/utils_rec.py").compute_accuracy
    for _ in range(1000):
        said, true = boxes_of(rng, 2)
        corners = ([box.x0, box.y0, box.x1, box.y1] for box in (said, true))
        yield float(task("boxes").points(answer(encode_boxes([said]), encode_boxes([true])))), float(theirs(*corners, 0.5))


def box_precision(rng: random.Random) -> Pairs:
    """AP over all overlaps, and at 0.5, of ten sets of 30 images."""
    for _ in range(10):
        true, said = [boxes_of(rng, rng.randint(0, 4)) for _ in range(30)], []
        for boxes in true:
            shorter = lambda box: replace(box, y1=max(box.y0, box.y1 - rng.choice([0, 4, 16]) / 128))
            said.append([shorter(box) for box in boxes if rng.random() < 0.8] + boxes_of(rng, rng.randint(0, 3)))
            rng.shuffle(said[-1])
        precision = coco_precision(said, true)
        yield mean_average_precision(said, true, OVERLAPS), float(precision.mean())
        yield mean_average_precision(said, true, OVERLAPS[:1]), float(precision[0].mean())


def coco_precision(said: list[list[Box]], true: list[list[Box]]) -> Any:
    """(overlaps, recalls, labels) of pycocotools; boxes are ranked by their order in an answer."""
    coco, evaluation = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    row = lambda image, box: {
        "image_id": image, "category_id": LABELS[box.label], "bbox": [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0],
    }  # fmt: skip
    rows = [row(image, box) for image, boxes in enumerate(true) for box in boxes]
    known: Any = coco.COCO()
    known.dataset = {
        "images": [{"id": image} for image in range(len(true))],
        "categories": [{"id": number, "name": label} for label, number in LABELS.items()],
        "annotations": [one | {"id": k, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} for k, one in enumerate(rows, 1)],
    }
    ranks = [dict.fromkeys(LABELS, 0) for _ in said]
    detections = []
    for image, boxes in enumerate(said):
        for box in boxes:
            detections.append(row(image, box) | {"score": -ranks[image][box.label]})
            ranks[image][box.label] += 1
    with contextlib.redirect_stdout(io.StringIO()):
        known.createIndex()
        theirs: Any = evaluation.COCOeval(known, known.loadRes(detections), "bbox")
        theirs.params.areaRng, theirs.params.areaRngLbl = [[0, 1e10]], ["all"]
        theirs.evaluate()
        theirs.accumulate()
    return theirs.eval["precision"][:, :, :, 0, 2]


class Comparison(NamedTuple):
    """
    Attributes:
        peer: a distribution.
        part: what of it.
        pairs: raises ModuleNotFoundError where it is not installed.
    """

    task: str
    peer: str
    part: str
    pairs: Callable[[random.Random], Pairs]


COMPARISONS = [
    Comparison("`vqa_accuracy`, normalisation", "lmms-eval", "the official code's copy", vqa_normalisation),
    Comparison("`vqa_accuracy`", "lmms-eval", "VQAv2", vqa_accuracy),
    Comparison("`anls`", "anls", "", anls),
    Comparison("`relaxed_accuracy`", "lmms-eval", "ChartQA", relaxed_accuracy),
    Comparison("`pope`", "lmms-eval", "POPE", pope),
    Comparison("`cider`", "pycocoevalcap", "its scorer, on tokens split alike", cider),
    Comparison("`bleu`", "sacrebleu", "which computes it", bleu),
    Comparison("`boxes`", "lmms-eval", "RefCOCO", box_accuracy),
    Comparison("`boxes`, AP", "pycocotools", "", box_precision),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    print("| task | with | numbers compared | largest difference |\n|---|---|---|---|")
    for one in COMPARISONS:
        try:
            differences = [abs(ours - theirs) for ours, theirs in one.pairs(random.Random(seed))]
            result = f"{len(differences):,} | {max(differences):.2g}"
            peer = f"`{one.peer}` {version(one.peer)}"
        except ModuleNotFoundError as error:
            peer, result = f"`{one.peer}`", f"0 | not compared: {error}"
        print(f"| {one.task} | {peer}{f', {one.part}' if one.part else ''} | {result} |", flush=True)


if __name__ == "__main__":
    main()
