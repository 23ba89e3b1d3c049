"""The skills: each makes scenes and questions about them, whose answers are decided before anything is drawn.

Answers are balanced: a model that knows the question and not the picture is at chance, for each question
alone.

=============  ========================================  =========================  ===============
skill          question                                  answer                     held out
=============  ========================================  =========================  ===============
counting       how many circles are there?               4                          shape x number
relation       where is the red circle, seen from the    left, right, above, below  shape x shape
               blue star?
               is the red circle left of the blue star?  yes, no
binding        what colour is the circle?                red                        colour x shape
               which shape is red?                       circle
               is there a red circle?                    yes, no
reading        what is written in red?                   407                        the string
comparison     which picture shows more circles?         first, second              shape x number
               do all pictures show the same?            yes, no                    colour x shape
pointing       point to the red circle                   see ``point``              colour x shape
description    describe                                  red circle, blue star      colour x shape
=============  ========================================  =========================  ===============

Where something is there to be left out, there is a lure: if it is asked whether there is a red circle and
there is none, something else is red and some circle has another colour. ``description`` is a caption, from
left to right: a task to learn from, not a skill with a chance.
"""

from __future__ import annotations

from collections.abc import Callable

from kempnerforge.data.collections.probe.scene import Thing
from kempnerforge.data.collections.probe.setting import Draft, Setting
from kempnerforge.data.sample import Text

PLURALS = {"cross": "crosses"}
RELATIONS = {"left": ("left of", -1, 0), "right": ("right of", 1, 0), "above": ("above", 0, -1), "below": ("below", 0, 1)}
"""Answer -> what the question says, and the direction of its x and y."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ORDINALS = ("first", "second", "third")
MOST_STRINGS = 3
MOST_DESCRIBED = 4


def plural(shape: str) -> str:
    return PLURALS.get(shape, f"{shape}s")


def counting(s: Setting) -> Draft:
    """Each shape occurs a different number of times, also one that is not asked about, so the number of all
    things does not give an answer.
    """
    numbers = s.known.counts[s.unseen]
    asked = s.rng.sample(list(numbers), min(s.cfg.texts, len(numbers)))
    groups = [(shape, s.rng.choice(numbers[shape])) for shape in asked]
    texts = tuple(Text(f"how many {plural(shape)} are there?", str(number)) for shape, number in groups)
    if rest := [shape for shape in s.known.shapes if shape not in asked]:
        other = s.rng.choice(rest)
        groups.append((other, s.rng.choice([0, *(n for n in s.known.counts[False].get(other, []) if n <= s.cfg.distractors)])))
    things = tuple(Thing(s.colour_for(shape), shape) for shape, number in groups for _ in range(number))
    return Draft((things,), texts)


def relation(s: Setting) -> Draft:
    """One of the two is clearly on one side of the other: at least twice as far away as it is off that axis."""
    one, other = (Thing(s.colour_for(shape), shape) for shape in s.rng.choice(s.known.partners[s.unseen]))
    answer = s.rng.choice(list(RELATIONS))
    far = s.rng.uniform(1.5 * s.cfg.max_size, 0.95 - s.cfg.max_size)
    off_axis = s.rng.uniform(-far / 2, far / 2)
    _, dx, dy = RELATIONS[answer]
    dx, dy = (dx * far, off_axis) if dx else (off_axis, dy * far)
    margin = s.cfg.max_size / 2
    x, y = (s.rng.uniform(margin - min(d, 0), 1 - margin - max(d, 0)) for d in (dx, dy))
    texts = []
    for kind in s.rng.sample(("where", "is"), min(2, s.cfg.texts)):
        if kind == "where":
            texts.append(Text(f"where is the {one.name}, seen from the {other.name}?", answer))
        else:
            right = s.rng.random() < 0.5
            words = RELATIONS[answer if right else OPPOSITE[answer]][0]
            texts.append(Text(f"is the {one.name} {words} the {other.name}?", "yes" if right else "no"))
    pair = [Thing(other.colour, other.shape, at=(x, y)), Thing(one.colour, one.shape, at=(x + dx, y + dy))]
    return Draft((tuple(pair + s.others(s.distractors(), shapes=(one.shape, other.shape))),), tuple(texts))


def binding(s: Setting) -> Draft:
    """No colour and no shape is there twice."""
    colour, shape = s.rng.choice(s.known.pairs[s.unseen])
    kinds = s.rng.sample(("colour", "shape", "exists"), min(3, s.cfg.texts))
    exists = "exists" not in kinds or s.rng.random() < 0.5
    things = [Thing(colour, shape)]
    if not exists:
        lures = [(c, t) for c, t in s.known.pairs[False] if c == colour and t != shape]
        things = [Thing(*s.rng.choice(lures)), Thing(s.colour_for(shape, avoid=(colour,)), shape)]
        if s.unseen:
            kinds = ["exists"]  # the colour of the shape is not a held-out one here
    answers = {
        "colour": Text(f"what colour is the {shape}?", things[-1].colour),
        "shape": Text(f"which shape is {colour}?", things[0].shape),
        "exists": Text(f"is there a {colour} {shape}?", "yes" if exists else "no"),
    }
    shapes, colours = [thing.shape for thing in things], [thing.colour for thing in things]
    more = s.others(s.distractors() + exists, shapes, colours)  # a lure counts as one distractor
    return Draft((tuple(things + more),), tuple(answers[kind] for kind in kinds))


def reading(s: Setting) -> Draft:
    """Strings, each in a different colour."""
    colours = s.rng.sample(list(s.known.colours), min(1 + s.distractors(), MOST_STRINGS, len(s.known.colours)))
    asked = colours[: s.cfg.texts]
    written = {colour: s.write(s.unseen and colour in asked) for colour in colours}
    texts = tuple(Text(f"what is written in {colour}?", written[colour]) for colour in asked)
    return Draft((tuple(Thing(colour, writing=string) for colour, string in written.items()),), texts)


def comparison(s: Setting) -> Draft:
    """The pictures are before the question, in their order."""
    pictures = s.cfg.image_placeholder * s.cfg.compared_images
    return _same(s, pictures) if s.rng.random() < 0.5 else _more(s, pictures)


def _same(s: Setting, pictures: str) -> Draft:
    """One thing a picture; where they are not the same, one of them has another colour, or another shape."""
    colour, shape = s.rng.choice(s.known.pairs[s.unseen])
    things = [Thing(colour, shape)] * s.cfg.compared_images
    same = s.rng.random() < 0.5
    if not same:
        lures = [(c, t) for c, t in s.known.pairs[False] if (c == colour) != (t == shape)]
        things[s.rng.randrange(len(things))] = Thing(*s.rng.choice(lures))
    text = Text(f"{pictures}do all pictures show the same?", "yes" if same else "no")
    return Draft(tuple((thing,) for thing in things), (text,))


def _more(s: Setting, pictures: str) -> Draft:
    """No two pictures have the same number of an asked shape."""
    seen, images = s.known.counts[False], s.cfg.compared_images
    usable = [shape for shape, numbers in seen.items() if len(numbers) >= images and (not s.unseen or s.known.counts[True].get(shape))]
    asked = s.rng.sample(usable, min(s.cfg.texts, len(usable)))
    scenes: list[list[Thing]] = [[] for _ in range(images)]
    texts = []
    for shape in asked:
        numbers = s.rng.sample(seen[shape], images)
        if s.unseen:
            numbers[s.rng.randrange(images)] = s.rng.choice(s.known.counts[True][shape])
        for scene, number in zip(scenes, numbers, strict=True):
            scene += [Thing(s.colour_for(shape), shape) for _ in range(number)]
        word = "more" if images == 2 else "the most"
        texts.append(Text(f"{pictures}which picture shows {word} {plural(shape)}?", ORDINALS[numbers.index(max(numbers))]))
    return Draft(tuple(tuple(scene + s.others(s.distractors(), shapes=asked)) for scene in scenes), tuple(texts))


def point(s: Setting, column: int, row: int, label: str) -> str:
    """The middle of a cell of the grid, as ``data.points`` says.

    "point" is what Molmo writes (Deitke et al. 2024, section 4): shares of width and height in percent with
    one decimal, from the upper left corner, ``<point x="30.0" y="70.0" alt="red circle">red circle</point>``.
    "cell" is ``column 2 row 4``, counted from 1.
    """
    if s.cfg.points == "cell":
        return f"column {column + 1} row {row + 1}"
    x, y = (100 * (k + 0.5) / s.cfg.grid for k in (column, row))
    return f'<point x="{x:.1f}" y="{y:.1f}" alt="{label}">{label}</point>'


def pointing(s: Setting) -> Draft:
    """What is pointed to is in the middle of a cell, anywhere on the grid where it is seen whole. Some others
    have its shape or its colour.
    """
    middle = [(k + 0.5) / s.cfg.grid for k in range(s.cfg.grid)]
    inside = [k for k, at in enumerate(middle) if min(at, 1 - at) >= s.cfg.min_size / 2]
    pairs = s.rng.sample(s.known.pairs[s.unseen], min(s.cfg.texts, len(s.known.pairs[s.unseen])))
    things: list[Thing] = []
    texts = []
    for colour, shape in pairs:
        column, row = s.rng.choice(inside), s.rng.choice(inside)
        x, y = middle[column], middle[row]
        if all(max(abs(x - a), abs(y - b)) >= s.cfg.max_size for a, b in (thing.at for thing in things if thing.at)):
            things.append(Thing(colour, shape, at=(x, y), limit=2 * min(x, 1 - x, y, 1 - y)))
            texts.append(Text(f"point to the {colour} {shape}", point(s, column, row, f"{colour} {shape}")))
    lures = [(c, t) for c, t in s.known.pairs[False] if (c, t) not in pairs and any(c == a or t == b for a, b in pairs)]
    more = [Thing(*pair) for pair in s.rng.sample(lures, min(s.distractors(), len(lures)))]
    return Draft((tuple(things + more),), tuple(texts))


def description(s: Setting) -> Draft:
    """Things side by side."""
    number = s.rng.randint(1, MOST_DESCRIBED)
    pairs = [s.rng.choice(s.known.pairs[False]) for _ in range(number)]
    if s.unseen:
        pairs[s.rng.randrange(number)] = s.rng.choice(s.known.pairs[True])
    high = s.cfg.max_size / 2
    places = [((k + 0.5) / number, s.rng.uniform(high, 1 - high)) for k in range(number)]
    things = tuple(Thing(*pair, at=at, limit=0.9 / number) for pair, at in zip(pairs, places, strict=True))
    return Draft((things,), (Text("describe", ", ".join(thing.name for thing in things)),))


SKILLS: dict[str, Callable[[Setting], Draft]] = {
    skill.__name__: skill for skill in (counting, relation, binding, reading, comparison, pointing, description)
}
