"""Text for a small language model: scenes in words, each with a question and its answer, in the words of the
``probe`` source. No picture is drawn.

    python recipes/studies/parts/scenes_in_words.py data/scenes

writes ``train.jsonl`` (40,000 lines) and ``test.jsonl`` (1,000).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "triangle", "cross")
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def counting(rng: random.Random) -> tuple[str, str]:
    numbers = {shape: rng.randint(1, 3) for shape in rng.sample(SHAPES, 2)}
    things = [f"{rng.choice(COLOURS)} {shape}" for shape, number in numbers.items() for _ in range(number)]
    rng.shuffle(things)
    asked = rng.choice(list(numbers))
    return f"{', '.join(things)}. how many {plural(asked)} are there?", str(numbers[asked])


def relation(rng: random.Random) -> tuple[str, str]:
    one, other = (f"{rng.choice(COLOURS)} {shape}" for shape in rng.sample(SHAPES, 2))
    where = rng.choice(list(RELATIONS))
    scene = rng.choice([f"{one} {RELATIONS[where]} {other}", f"{other} {RELATIONS[OPPOSITE[where]]} {one}"])
    if rng.random() < 0.5:
        return f"{scene}. where is the {one}, seen from the {other}?", where
    said = where if rng.random() < 0.5 else rng.choice([name for name in RELATIONS if name != where])
    return f"{scene}. is the {one} {RELATIONS[said]} the {other}?", "yes" if said == where else "no"


def binding(rng: random.Random) -> tuple[str, str]:
    things = list(zip(rng.sample(COLOURS, 2), rng.sample(SHAPES, 2), strict=True))
    scene = ", ".join(f"{colour} {shape}" for colour, shape in things)
    colour, shape = rng.choice(things)
    kind = rng.randrange(3)
    if kind == 0:
        return f"{scene}. what colour is the {shape}?", colour
    if kind == 1:
        return f"{scene}. which shape is {colour}?", shape
    there = rng.random() < 0.5
    wrong = rng.choice([other for _, other in things if other != shape])
    return f"{scene}. is there a {colour} {shape if there else wrong}?", "yes" if there else "no"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines, seed in (("train", 40_000, 0), ("test", 1_000, 1)):
        rng = random.Random(seed)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(lines):
                prompt, answer = rng.choice((counting, relation, binding))(rng)
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
