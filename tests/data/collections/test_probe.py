"""The diagnostic source: a second pair of eyes answers its questions from the pixels, held-out combinations are held out, and blind
guessing is at chance."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kempnerforge.config import registry
from kempnerforge.data import Encoder, Text
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.collections.probe import Probe, ProbeConfig
from kempnerforge.data.collections.probe.combinations import WORDS
from kempnerforge.data.collections.probe.scene import COLOURS, SHAPES, Thing, arrange
from kempnerforge.data.collections.probe.skills import SKILLS
from kempnerforge.data.sources import build_source
from kempnerforge.data.text.interleave import LABELS
from kempnerforge.eval.codecs import decode_points, encode_points
from kempnerforge.eval.questions import Question
from kempnerforge.eval.tasks.exact_match import question_only_prior
from kempnerforge.inspection.audit import audit
from tests.eval.scripted import TEXT_ENCODER
from tests.params import quick

EOS = "<eos>"
ASKED = [name for name in SKILLS if name != "description"]


def probe(split: str = "train", **cfg: Any) -> Probe:
    source = build_source(ProbeConfig(**cfg), split)
    assert isinstance(source, Probe)
    return source


def asked(source: Probe, skill: str) -> Iterator[Text]:
    return (text for index in range(len(source)) if source.skill(index) == skill for text in source.texts(index))


# ---- a second pair of eyes ------------------------------------------------------------------------------------------------------------

EYES = {"picture_size": 160, "min_size": 0.12, "max_size": 0.18, "samples": 500, "eval_samples": 500}


class Seen(NamedTuple):
    colour: str
    shape: str
    x: float
    y: float


def _masks(n: int = 32) -> dict[str, np.ndarray]:
    """Shapes that fill their boxes, written down once more, by what they are."""
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    across, down = 0.951 * x, 0.905 * y - 0.095  # the box of a star whose tips are 1 from its middle
    angle = np.arctan2(across, -down) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    along, aside = np.hypot(across, down) * [np.cos(angle), np.sin(angle)]
    notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    star = (1 - along) * notch[1] >= aside * (1 - notch[0])  # on the inner side of the line from a tip to a notch
    return {
        "circle": x**2 + y**2 <= 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": 2 * np.abs(x) <= y + 1,
        "diamond": np.abs(x) + np.abs(y) <= 1,
        "cross": np.minimum(np.abs(x), np.abs(y)) <= 1 / 3,
        "star": star,
    }


MASKS = _masks()


def look(png: bytes) -> list[Seen]:
    """The things on a picture: connected pixels that are not white, by the nearest colour and the most similar shape."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)
    ink = {(int(r), int(c)) for r, c in np.argwhere((255 - pixels).max(axis=2) > 110)}
    found = []
    while ink:
        part, waiting = [], [ink.pop()]
        while waiting:
            r, c = waiting.pop()
            part.append((r, c))
            for near in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if near in ink:
                    ink.remove(near)
                    waiting.append(near)
        rows, columns = np.array(part).T
        (top, bottom), (left, right) = (rows.min(), rows.max()), (columns.min(), columns.max())
        shape = np.zeros((bottom - top + 1, right - left + 1), dtype=np.uint8)
        shape[rows - top, columns - left] = 255
        scaled = np.asarray(Image.fromarray(shape).resize((32, 32))) > 127
        colour = min(pixels[rows, columns], key=lambda values: float(values.sum()))  # edges are mixed with white
        found.append(
            Seen(
                min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - colour).sum())),
                max(MASKS, key=lambda name: float((scaled & MASKS[name]).sum() / (scaled | MASKS[name]).sum())),
                (left + right + 1) / 2 / pixels.shape[1],
                (top + bottom + 1) / 2 / pixels.shape[0],
            )
        )
    return found


def the(things: list[Seen], **what: str) -> Seen:
    """The only one that is so."""
    (one,) = [thing for thing in things if all(getattr(thing, key) == value for key, value in what.items())]
    return one


def singular(word: str) -> str:
    return "cross" if word == "crosses" else word.removesuffix("s")


def answer(prompt: str, pictures: list[list[Seen]]) -> str:
    """What the pictures say to ``prompt``."""
    scene, prompt = pictures[0], prompt.replace("<image>", "")
    if match := re.fullmatch(r"how many (\w+) are there\?", prompt):
        return str(sum(thing.shape == singular(match[1]) for thing in scene))
    if match := re.fullmatch(r"where is the (\w+) (\w+), seen from the (\w+) (\w+)\?", prompt):
        one, other = the(scene, colour=match[1], shape=match[2]), the(scene, colour=match[3], shape=match[4])
        dx, dy = one.x - other.x, one.y - other.y
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
    if match := re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", prompt):
        one, other = the(scene, colour=match[1], shape=match[2]), the(scene, colour=match[4], shape=match[5])
        yes = {"left of": one.x < other.x, "right of": one.x > other.x, "above": one.y < other.y, "below": one.y > other.y}
        return "yes" if yes[match[3]] else "no"
    if match := re.fullmatch(r"what colour is the (\w+)\?", prompt):
        return the(scene, shape=match[1]).colour
    if match := re.fullmatch(r"which shape is (\w+)\?", prompt):
        return the(scene, colour=match[1]).shape
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", prompt):
        assert match[1] in {thing.colour for thing in scene} and match[2] in {thing.shape for thing in scene}, "no lure"
        return "yes" if match.groups() in {thing[:2] for thing in scene} else "no"
    if prompt == "do all pictures show the same?":
        return "yes" if len({tuple(thing[:2] for thing in scene) for scene in pictures}) == 1 else "no"
    if match := re.fullmatch(r"which picture shows (?:more|the most) (\w+)\?", prompt):
        numbers = [sum(thing.shape == singular(match[1]) for thing in scene) for scene in pictures]
        assert len(set(numbers)) == len(numbers)
        return ("first", "second", "third")[int(np.argmax(numbers))]
    if match := re.fullmatch(r"point to the (\w+) (\w+)", prompt):
        one, label = the(scene, colour=match[1], shape=match[2]), f"{match[1]} {match[2]}"
        return f'<point x="{20 * int(5 * one.x) + 10:.1f}" y="{20 * int(5 * one.y) + 10:.1f}" alt="{label}">{label}</point>'
    assert prompt == "describe"
    return ", ".join(f"{thing.colour} {thing.shape}" for thing in sorted(scene, key=lambda thing: thing.x))


@pytest.mark.parametrize("eval_on", ["same", "heldout"])
@pytest.mark.parametrize("skill", [name for name in SKILLS if name != "reading"])
def test_the_pictures_say_what_the_answers_say(skill: str, eval_on: str) -> None:
    images = 3 if skill == "comparison" and eval_on == "heldout" else 2
    source = probe("test", skills=[skill], eval_on=eval_on, compared_images=images, texts=3, max_count=5 if images == 2 else 6, **EYES)
    for index in range(12):
        sample = source[index]
        assert len(sample.images) == source.num_images(index) == (images if skill == "comparison" else 1)
        pictures = [look(image) for image in sample.images]
        assert [text.answer for text in sample.texts] == [answer(text.prompt, pictures) for text in sample.texts], (index, pictures)


@pytest.mark.parametrize("length", [2, 4])
def test_each_string_is_written_in_its_colour(length: int) -> None:
    source = probe(skills=["reading"], reading_length=length, palette=["red", "green", "black"], held_out_every=3, texts=3, **EYES)
    several = 0
    for index in range(12):
        sample = source[index]
        strokes = Counter(thing.colour for thing in look(sample.images[0]))
        several += len(strokes) > 1
        assert {re.fullmatch(r"what is written in (\w+)\?", text.prompt)[1] for text in sample.texts} == set(strokes)  # type: ignore[index]
        assert all(len(text.answer) == length for text in sample.texts)
        assert set(strokes.values()) == {length}  # digits do not touch, and each is one piece
    assert several > 3


# ---- samples are functions of (seed, split, index) --------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_split_and_index_alone() -> None:
    first, second = probe(samples=50, noise=0.1, background="varied"), probe(samples=9, noise=0.1, background="varied")
    assert [first[k] for k in (8, 3, 5)] == [second[k] for k in (8, 3, 5)]
    assert [first[k].texts for k in range(9)] == [second.texts(k) for k in range(9)]
    others = [probe(seed=1), probe("test"), probe("test", eval_on="heldout")]
    for source in others:
        assert all(source[k].images != first[k].images for k in range(7))
    assert len({image for source in (first, *others) for k in range(30) for image in source[k].images}) == 4 * (30 + 5)
    with pytest.raises(IndexError):
        second[9]


def test_skills_take_turns_and_are_named() -> None:
    source = probe("test", skills=["reading", "counting", "reading"], eval_samples=70)
    turns = [source.skill(k) for k in range(70)]
    assert all(sorted(turns[k : k + 3]) == ["counting", "reading", "reading"] for k in range(0, 69, 3))
    assert {turns[k] for k in range(0, 69, 3)} == {"counting", "reading"}  # no stride meets one skill alone
    for index in range(3):
        assert source[index].id == f"probe/{turns[index]}/test/{index}" and {text.kind for text in source.texts(index)} == {turns[index]}
    assert len(source) == 70 and len(probe()) == 20_000
    assert {probe("test", skills=list(SKILLS)).skill(k) for k in range(99)} == set(ASKED)  # a caption is no question
    assert probe("test", skills=["description"]).skill(0) == "description"
    assert source.length(1) == sum(len(text.prompt) + len(text.answer) for text in source[1].texts)


def test_rows_are_made_of_them(make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder(image_size=32, max_text_len=600, seq_len=700)
    source = probe(skills=list(SKILLS), samples=21)
    encoded = [encoder.encode(source[index], 0) for index in range(21)]
    assert [len(row.images) for row in encoded] == [source.num_images(index) for index in range(21)]
    for index, row in enumerate(encoded):  # what is trained is the answers and their ends
        trained = row.table[LABELS][row.table[LABELS] != IGNORE].tolist()
        ends = [k for k, id_ in enumerate(trained) if id_ == encoder.tokenizer.eos_id]
        said = [encoder.tokenizer.decode(trained[a:b]) for a, b in pairwise([0, *(k + 1 for k in ends)])]
        assert [text.removesuffix(EOS) for text in said] == [text.answer for text in source.texts(index)]
    batch = collate(encoded, 0, None)
    assert audit(batch, encoder.tokenizer.eos_id) == []
    assert batch.image_text_ids.eq(0).all()  # all pictures are in front, shared by the questions


KNOBS = [
    {"background": "varied"}, {"noise": 0.2}, {"picture_size": 96}, {"min_size": 0.1, "max_size": 0.12},
    {"palette": ["red", "blue", "black"], "held_out_every": 3}, {"shapes": ["star", "cross", "circle"], "held_out_every": 3}, {"texts": 1},
    {"max_count": 6}, {"distractors": 0}, {"reading": "words"},
    {"reading": "letters"}, {"reading_length": 5}, {"compared_images": 3, "max_count": 6}, {"grid": 8}, {"points": "cell"}, {"held_out_every": 3},
]  # fmt: skip


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: next(iter(knob)))
def test_every_knob_does_something(knob: dict[str, Any]) -> None:
    plain, turned = probe(samples=60), probe(samples=60, **knob)
    assert any(plain[k].images != turned[k].images or plain[k].texts != turned[k].texts for k in range(60))


def test_points_are_those_of_molmo() -> None:
    source = probe(skills=["pointing"], grid=7, samples=40)
    for text in (text for index in range(40) for text in source.texts(index)):
        (point,) = decode_points(str(text.answer))
        assert encode_points([point]) == text.answer and text.prompt == f"point to the {point.label}"


def test_what_the_knobs_say_is_kept() -> None:
    words = probe(skills=["reading"], reading="words")
    assert {text.answer for k in range(200) for text in words.texts(k)} < set(WORDS)
    cells = probe(skills=["pointing"], points="cell", grid=7)
    assert all(re.fullmatch(r"column [1-7] row [1-7]", str(text.answer)) for k in range(50) for text in cells.texts(k))
    source = probe(palette=["red", "blue", "black"], shapes=["star", "cross", "circle"], held_out_every=3, background="varied", noise=0.05)
    for k in range(30):
        things = [thing for scene in source.draft(k)[0].scenes for thing in scene]
        assert {thing.colour for thing in things} <= {"red", "blue", "black"}
        assert {thing.shape for thing in things} <= {"star", "cross", "circle", ""}
    assert Image.open(io.BytesIO(source[0].images[0])).size == (64, 64)


@given(
    st.integers(1, 12),
    st.floats(0.03, 0.3),
    st.floats(1, 2),
    st.lists(st.sampled_from(["", "7", "abc", "largest"]), min_size=12, max_size=12),
    st.integers(),
)
def test_things_are_whole_and_touch_nothing(number: int, low: float, ratio: float, written: list[str], seed: int) -> None:
    things = [Thing("red", "" if string else "star", string) for string in written[:number]]
    placed = arrange(things, Random(seed), low, low * ratio)
    assert sorted(one.thing.writing for one in placed) == sorted(thing.writing for thing in things)
    boxes = [(one.x - w, one.x + w, one.y - h, one.y + h) for one in placed for w, h in [one.half]]
    for k, (left, right, top, bottom) in enumerate(boxes):
        assert -1e-9 <= left < right <= 1 + 1e-9 and -1e-9 <= top < bottom <= 1 + 1e-9
        assert all(right <= a or b <= left or bottom <= c or d <= top for a, b, c, d in boxes[:k])


# ---- what is held out ---------------------------------------------------------------------------------------------------------------------


def combinations(text: Text, every: int, seed: int) -> set[bool]:
    """Whether what a question is about is held out, from its words: the rule written down once more."""
    colours, shapes = list(COLOURS), list(SHAPES)
    prompt, said = text.prompt.replace("<image>", ""), str(text.answer)
    found = [w for w in re.findall(r"\w+", prompt) if w in colours or singular(w) in shapes or w in shapes]
    if prompt.startswith("how many"):
        indices = [shapes.index(singular(found[0])), int(said)]
    elif prompt.startswith(("where", "is the ")):
        indices = [shapes.index(found[1]), shapes.index(found[3])]
    elif prompt.startswith("what is written"):
        indices = [int(digit) for digit in said]
    elif prompt.startswith("what colour"):
        indices = [colours.index(said), shapes.index(found[0])]
    elif prompt.startswith("which shape"):
        indices = [colours.index(found[0]), shapes.index(said)]
    elif prompt.startswith(("is there", "point")):
        indices = [colours.index(found[0]), shapes.index(found[1])]
    else:
        return set()
    return {(sum(indices) + seed) % every == 0}


@pytest.mark.parametrize(("every", "seed"), quick([(4, 0), (3, 5)], (3, 5)))
@pytest.mark.parametrize("skill", ASKED)
def test_no_question_of_training_is_about_what_is_held_out(skill: str, every: int, seed: int) -> None:
    cfg: dict[str, Any] = {"skills": [skill], "held_out_every": every, "seed": seed, "samples": 400, "eval_samples": 400}
    for split, eval_on, unseen in (("train", "same", False), ("test", "same", False), ("test", "heldout", True)):
        source = probe(split, eval_on=eval_on, **cfg)
        seen = [combinations(text, every, seed) for index in range(400) for text in source.texts(index)]
        assert set().union(*seen) == ({unseen} if skill != "comparison" else set())
        scenes = [scene for index in range(400) for scene in source.draft(index)[0].scenes]
        pairs = {(list(COLOURS).index(t.colour), list(SHAPES).index(t.shape)) for scene in scenes for t in scene if t.shape}
        if not unseen and pairs:  # held-out pairs are not even drawn, and all others are
            assert pairs == {(i, j) for i in range(8) for j in range(6) if (i + j + seed) % every}
        if skill in ("counting", "comparison") and not unseen:
            numbers = {(s, n) for scene in scenes if len(scene) > 1 for s, n in Counter(t.shape for t in scene).items()}
            if skill == "counting":
                assert all((list(SHAPES).index(s) + n + seed) % every for s, n in numbers)
        if skill == "reading":
            assert len({len(scene) for scene in scenes}) == 3
            asked_of = {text.answer for index in range(400) for text in source.texts(index)}
            silent = {t.writing for scene in scenes for t in scene} - asked_of
            assert silent and not any((sum(map(int, string)) + seed) % every == 0 for string in silent)
    if skill == "comparison":  # each has a thing, or a number of a shape, that is held out
        rule = [(list(COLOURS), list(SHAPES))]
        for index in range(200):
            draft = source.draft(index)[0]
            things = [t for scene in draft.scenes for t in scene]
            if "same" in draft.texts[0].prompt:
                held = [(c.index(t.colour) + s.index(t.shape) + seed) % every == 0 for t in things for c, s in rule]
                assert any(held)
            else:
                shape = singular(draft.texts[0].prompt.split()[-1].rstrip("?"))
                counts = [sum(t.shape == shape for t in scene) for scene in draft.scenes]
                assert any((list(SHAPES).index(shape) + n + seed) % every == 0 for n in counts)


# ---- blind guessing is at chance ------------------------------------------------------------------------------------------------------------


CHANCE = {"counting": 0.29, "relation": 0.375, "binding": 0.3, "reading": 0.02, "comparison": 0.5, "pointing": 0.06}
"""With the default knobs: 1/4 or 1/3, by shape; the mean of 1/4 and 1/2; of 1/6, 1/5 or so and 1/2; 1/750; 1/2; 1/25."""


@pytest.mark.parametrize("skill", quick(ASKED, "binding", "pointing"))
def test_blind_guessing_is_at_chance(skill: str) -> None:
    train, same, heldout = (
        probe(split, skills=[skill], eval_on=on, samples=3000, eval_samples=1000)
        for split, on in (("train", "same"), ("test", "same"), ("test", "heldout"))
    )
    questions = [
        [Question("", (), text.prompt, str(text.answer)) for index in range(len(source)) for text in source.texts(index)]
        for source in (train, same, heldout)
    ]
    assert question_only_prior(questions[0], questions[1], TEXT_ENCODER) <= CHANCE[skill] + 0.03
    assert question_only_prior(questions[0], questions[2], TEXT_ENCODER) <= CHANCE[skill] + 0.03


@pytest.mark.parametrize(("skill", "words"), [("relation", "is the"), ("binding", "is there"), ("comparison", "do all")])
@pytest.mark.parametrize("eval_on", ["same", "heldout"])
def test_yes_is_as_frequent_as_no(skill: str, words: str, eval_on: str) -> None:
    source = probe("test", skills=[skill], eval_on=eval_on, eval_samples=3000, texts=1)
    said = [text.answer for text in asked(source, skill) if text.prompt.replace("<image>", "").startswith(words)]
    assert len(said) > 800 and abs(said.count("yes") / len(said) - 0.5) < 3 * 0.5 / len(said) ** 0.5


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize(("skill", "pattern"), [("counting", "how many circles"), ("relation", "where"), ("comparison", "which")])
def test_answers_come_equally_often(skill: str, pattern: str, texts: int) -> None:
    source = probe(skills=[skill], samples=4000, texts=texts)
    said = Counter(text.answer for text in asked(source, skill) if pattern in text.prompt)
    total, kinds = said.total(), len(said)
    assert kinds == {"counting": 4, "relation": 4, "comparison": 2}[skill] and total > 500
    spread = 4 * (total / kinds) ** 0.5
    assert all(abs(count - total / kinds) < spread for count in said.values()), said


# ---- the config -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"skills": ["count"]}, r"skills = \['count'\]: 'count' is none; allowed are 'counting'"),
        ({"skills": []}, "skills = .*at least 1"),
        ({"shapes": ["circle", "square"]}, "shapes = .*at least 3 are needed, each once"),
        ({"palette": ["red", "red", "blue"]}, "palette = .*each once"),
        ({"palette": ["red", "pink", "blue"]}, "'pink' is none"),
        ({"eval_on": "other"}, "eval_on = 'other'"),
        ({"held_out_every": 2}, "held_out_every = 2: must be >= 3"),
        ({"held_out_every": 6}, "held_out_every = 6: must be at most 5"),
        ({"compared_images": 4}, "compared_images = 4"),
        (
            {"compared_images": 3, "held_out_every": 3, "max_count": 4, "min_size": 0.1},
            "max_count = 4: leaves fewer than compared_images = 3",
        ),
        ({"min_size": 0.3, "max_size": 0.2}, "max_size = 0.2: must be between"),
        ({"min_size": 0.2}, "min_size = 0.2: up to 12 things"),
        ({"texts": 6}, "min_size = 0.15: up to 32 things"),
        ({"noise": 2.0}, "noise = 2.0"),
        ({"picture_size": 4}, "picture_size = 4"),
        ({"min_size": 0.0}, "min_size = 0.0: must be > 0"),
    ],
)
def test_settings_that_make_no_sense(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**cfg)


def test_it_is_found_by_name() -> None:
    assert registry.data_configs.get("probe") is ProbeConfig
    assert ProbeConfig.needs_images
