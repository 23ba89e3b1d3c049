"""Zero-shot classification and retrieval against cases computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kempnerforge.config import EvalConfig
from kempnerforge.config.vlm_dual_encoder import DualEncoderConfig
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.sample import Sample, Text
from kempnerforge.eval.evaluate import Measured, evaluate, require_tasks
from kempnerforge.eval.exam import Exam, Ranks
from kempnerforge.eval.questions import examine
from kempnerforge.eval.tasks.retrieval import embed_all, places_of
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import Output
from tests.data.samples import ListSource
from tests.eval.scripted import BROKEN, DEVICE, ENCODER, TOKENIZER, grey
from tests.vlm.tiny import tiny

GIVES = frozenset({"embeddings"})
TEXTS = {"red": 10, "yes": 50, "blue": 80, "no red": 70, "no blue": 100}
"""The angles of texts in degrees; the angle of an image is its brightness."""


class Angles(nn.Module):
    """Its embeddings are points on a circle.

    Attributes:
        asked: the texts of each call.
    """

    def __init__(self, texts: dict[str, int]) -> None:
        super().__init__()
        self.texts = texts
        self.asked: list[list[str]] = []

    def forward(self, batch: Batch) -> Output:
        assert not self.training and not len(batch.targets) and batch.images is not None
        levels = batch.images.float().mean((1, 2, 3)).round()[batch.pair_images].tolist()
        words = [batch.input_ids[(batch.pair_ids == pair) & (batch.kinds == Kind.ANSWER)] for pair in range(batch.num_pairs)]
        self.asked.append([TOKENIZER.decode(ids[:-1].tolist()).strip() for ids in words])
        angles = torch.tensor([levels, [self.texts[text] for text in self.asked[-1]]]).T.deg2rad()  # (P, 2)
        return Output(torch.zeros(()), torch.zeros(0), embeddings=torch.stack([angles.cos(), angles.sin()], dim=-1))


def about(level: int | None, answer: str, *more: str, images: int = 1) -> Sample:
    image = BROKEN if level is None else grey(level)
    return Sample(f"{level} {answer}", (image,) * images, (Text("what colour?", answer, references=more),))


def exam_of(samples: Sequence[Sample], **options: dict[str, Any]) -> Exam:
    cfg = EvalConfig(tasks=list(options), options=options, batch_size=2)
    return Exam(Angles(TEXTS), ENCODER, cfg, DEVICE, held_out=examine(ListSource(samples), ENCODER, cfg, pictures=0), gives=GIVES)


def measured(samples: Sequence[Sample], **options: dict[str, Any]) -> Measured:
    return evaluate(exam_of(samples, **options))


def test_retrieval_by_hand() -> None:
    """Images at 0, 40 and 90 degrees; the first has two texts, one of which is the third's, too; one cannot be read, one text has two images."""
    samples = [about(0, "red", "yes"), about(40, "blue"), about(90, "red"), about(None, "red"), about(5, "red", images=2)]
    assert measured(samples, retrieval={}).values == {
        "eval/retrieval": pytest.approx(1 / 3),
        "eval/retrieval_text_r1": pytest.approx(1 / 3),  # wrong texts before the right one: 0, 2, 2
        "eval/retrieval_text_r5": 1,
        "eval/retrieval_text_r10": 1,
        "eval/retrieval_image_r1": pytest.approx(1 / 3),  # red 0, yes 2, blue 1
        "eval/retrieval_image_r5": 1,
        "eval/retrieval_image_r10": 1,
        "eval/retrieval_images": 3,
        "eval/retrieval_texts": 3,
        "eval/retrieval_unreadable": 1,
    }


def test_the_recall_is_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kempnerforge.eval.tasks.retrieval.ROWS", 3)
    vectors = nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    queries, gallery = vectors[:8], vectors[8:]
    right = [(q, (q + k) % 12) for q in range(8) for k in range(1 + q % 3)]
    places = places_of(queries, gallery, torch.tensor(right))
    for q, query in enumerate(queries):
        order = (gallery @ query).argsort(descending=True).tolist()
        assert places[q] == min(order.index(entry) for of, entry in right if of == q)
    same = torch.ones(5, 1)
    assert places_of(same, same, torch.arange(5)[:, None].expand(5, 2)).tolist() == [4] * 5, "one embedding for all finds nothing"


def test_two_ranks_share_the_pairs() -> None:
    exam = exam_of([about(level, "red") for level in (0, 40, None, 90, 100)], retrieval={})
    assert exam.held_out is not None
    pairs = exam.held_out.questions

    class Half(Ranks):
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

    halves = []
    for rank in range(2):
        model = Angles(TEXTS)
        halves.append(embed_all(replace(exam, model=model, ranks=Half(rank)), pairs))
        assert len(model.asked) == 2, "as often on both"
    found, failed = embed_all(exam, pairs)
    assert {**halves[0][0], **halves[1][0]}.keys() == found.keys() == {0, 1, 3, 4} and {*halves[0][1], *halves[1][1]} == {*failed} == {2}
    for half, _ in halves:
        for number, both in half.items():
            assert torch.equal(both, found[number])


def test_zero_shot_by_hand() -> None:
    """A class is the mean of its texts: red at 40, blue at 90. At 62 the nearest text is one of red, at 70 too, and the nearest class is not."""
    samples = [about(62, "red"), about(70, "red"), about(70, "no blue"), about(80, "blue"), about(80, "yes"), about(None, "blue")]
    found = measured(samples, zero_shot={"classes": ["red", "blue"], "templates": ["{}", "no {}"]})
    assert [str(a.text) for a in found.tasks["zero_shot"].seeing.answers] == ["red", "blue", "blue", "blue"]  # type: ignore[union-attr]
    assert found.values["eval/zero_shot"] == 3 / 4
    assert found.values["eval/zero_shot_classes"] == 2
    assert (found.values["eval/zero_shot_questions"], found.values["eval/zero_shot_unreadable"]) == (4, 1)
    assert found.values["eval/zero_shot_blind"] == 2 / 4  # 128 degrees are always blue


def test_classes_are_the_answers_unless_named() -> None:
    exam = exam_of([about(12, "red"), about(48, "red"), about(48, "yes"), about(85, "blue")], zero_shot={})
    values = evaluate(exam).values
    assert (values["eval/zero_shot"], values["eval/zero_shot_classes"]) == (3 / 4, 3)
    assert len(exam.model.asked) == 2 + 2 + 2, "classes once, images and blank ones"  # type: ignore[arg-type]
    assert sorted(text for call in exam.model.asked[:2] for text in call) == ["blue", "red", "yes"]  # type: ignore[union-attr, operator]


def test_a_model_that_gives_embeddings_alone_is_asked_for_nothing_else() -> None:
    it = tiny("dual_encoder", vlm=DualEncoderConfig(max_text_len=64, freeze=[], embed_dim=24))
    samples = [about(level, answer) for level, answer in ((0, "red"), (100, "blue"), (200, "red"))]
    cfg = EvalConfig(tasks=["retrieval", "zero_shot"])
    exam = Exam(it.model, it.encoder, cfg, DEVICE, held_out=examine(ListSource(samples), it.encoder, cfg), gives=it.model.gives)
    found = evaluate(exam)
    assert [*found.tasks] == ["retrieval", "zero_shot"] and found.values["eval/retrieval_images"] == 3
    embedded, _ = embed_all(exam, exam.held_out.questions)  # type: ignore[union-attr]
    it.model.eval()
    assert isinstance(it.model(it.batch(*samples)).embeddings, Tensor)
    torch.testing.assert_close(torch.stack([*embedded.values()]), it.model(it.batch(*samples)).embeddings)
    assert not math.isclose(found.values["eval/zero_shot_blind"], 0)


@pytest.mark.parametrize(
    ("cfg", "gives", "message"),
    [
        (EvalConfig(tasks=["retrieval"]), {"words"}, "'retrieval' needs embeddings of the model, which gives words"),
        (EvalConfig(tasks=["anls"]), {"embeddings"}, "'anls' needs words of the model, which gives embeddings"),
        (EvalConfig(loss=True), {"embeddings"}, r"eval\.loss = True: this model predicts no words, it gives embeddings"),
        (EvalConfig(tasks=["retrieval"]), {"embeddings"}, "'retrieval' needs held-out data"),
    ],
)
def test_what_a_model_does_not_give(cfg: EvalConfig, gives: set[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_tasks(cfg, None, frozenset(gives))


def test_no_pair_is_held_out() -> None:
    held_out = examine(ListSource([about(0, "red", images=2)]), ENCODER, EvalConfig(), pictures=0)
    with pytest.raises(InputError, match="'retrieval' asks none of the 1 held-out questions"):
        require_tasks(EvalConfig(tasks=["retrieval"]), held_out, GIVES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["red"]}, "classes = .*must be none, or two or more"),
        ({"classes": ["red", "red "]}, "classes = .*different"),
        ({"templates": []}, r"templates = \[\]"),
        ({"templates": ["a photo"]}, "'a photo' must hold {}"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exam = exam_of([about(0, "red")], zero_shot=options)
        evaluate(exam)
