"""Rows of a finished batch as plain lists, and as pieces to show: tokens, images, padding.

Which tokens are trained follows from ``labels`` and nothing else: ``labels[b, t]`` is what position t learns
to say next, so the token at t + 1 is trained. ``kinds``, which the same code writes beside the labels, is
only ever compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from kempnerforge.data.batching.batch import IGNORE, Batch, Kind, Part

UNFINISHED = "\ufffd"
"""What a decoder makes of bytes that are no character, such as the first token of a character that is spread
over two."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    bos_id: int | None
    eos_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


class Segment(NamedTuple):
    """A stretch of a row that belongs to one text of one sample: positions ``start <= p < end``. Padding has
    sample -1, what the texts of a sample share text 0.
    """

    sample: int
    text: int
    start: int
    end: int


class PlacedImage(NamedTuple):
    """An image in a row: its first position, the sample and text that it is in, its number in
    ``Batch.images``.
    """

    start: int
    sample: int
    text: int
    picture: int


@dataclass(frozen=True)
class AuditRow:
    """One row.

    Attributes:
        ids, labels, kinds, positions: as in ``Batch``.
        owners: (sample, text) of each position; sample -1 is padding, text 0 the shared part.
        images: in the order of the row.
        shown: of each of ``images`` the positions of its tokens, where a part of its tokens is in the row
            (``Batch.image_parts``); empty: all are, one after the other.
        samples: ids of its samples, by sample number; empty where the batch does not tell.
        parts: which section of a mixture each sample is of, by sample number.
        markers: ids of tokens around images that are part of them, such as the markers of tiles.
    """

    ids: list[int]
    labels: list[int]
    kinds: list[int]
    positions: list[int]
    owners: list[tuple[int, int]]
    images: list[PlacedImage]
    samples: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    markers: frozenset[int] = frozenset()
    shown: list[list[int]] = field(default_factory=list)

    @cached_property
    def segments(self) -> list[Segment]:
        found, start = [], 0
        for (sample, text), positions in groupby(self.owners):
            end = start + len(list(positions))
            found.append(Segment(sample, text, start, end))
            start = end
        return found

    @cached_property
    def windows(self) -> frozenset[int]:
        """Ends of the segments that are a piece of plain text: each position is trained, the last on a token
        that is not in the row.
        """
        return frozenset(
            s.end for s in self.segments if s.sample >= 0 and s.text > 0 and all(label != IGNORE for label in self.labels[s.start : s.end])
        )

    @cached_property
    def num_samples(self) -> int:
        return len({sample for sample, _ in self.owners if sample >= 0})

    @cached_property
    def num_texts(self) -> int:
        return len({owner for owner in self.owners if owner[0] >= 0 and owner[1] > 0})

    @cached_property
    def images_take_positions(self) -> bool:
        return Kind.IMAGE in self.kinds

    def trained(self, position: int) -> bool:
        """Whether the token at ``position`` is one that the position before it learns to say."""
        if position == 0 or self.labels[position - 1] == IGNORE:
            return False
        return self.owners[position] == self.owners[position - 1] or position not in self.windows

    def is_image(self, position: int) -> bool:
        """Whether ``position`` is one of an image, or of a token that belongs to one: a marker, or the token
        in the place of an image that takes no positions.
        """
        if self.kinds[position] == Kind.IMAGE or (self.kinds[position] == Kind.PROMPT and self.ids[position] in self.markers):
            return True
        is_placeholder = any(image.start == position and image.text > 0 for image in self.images)
        return not self.images_take_positions and is_placeholder and self.kinds[position] == Kind.PROMPT

    def floating(self, sample: int) -> list[ShownPiece]:
        """Images of ``sample`` that all its texts share and that take no position."""
        return [
            ShownPiece("image", image.start, image.start, False, picture=image.picture, slot=slot)
            for slot, image in enumerate(self.images)
            if (image.sample, image.text) == (sample, 0) and (sample, 0) not in self.owners[image.start : image.start + 1]
        ]

    def shares(self, sample: int | None = None) -> dict[str, int]:
        """Number of positions of the row, or of one of its samples, by kind; ``trained`` counts labels."""
        positions = [at for at, (owner, _) in enumerate(self.owners) if sample is None or owner == sample]
        counts = {
            "positions": len(positions),
            "padding": sum(self.kinds[at] == Kind.PAD for at in positions),
            "image": sum(self.kinds[at] == Kind.IMAGE for at in positions),
            "trained": sum(self.labels[at] != IGNORE for at in positions),
        }
        return counts | {"prompt": counts["positions"] - counts["padding"] - counts["image"] - counts["trained"]}


def rows_of(batch: Batch, markers: Collection[int] = ()) -> list[AuditRow]:
    """The rows of ``batch``."""
    images: list[list[PlacedImage]] = [[] for _ in batch.input_ids]
    shown: list[list[list[int]]] = [[] for _ in batch.input_ids]
    placements = (batch.image_rows, batch.image_starts, batch.image_sample_ids, batch.image_text_ids, batch.image_index)
    for row, *placed in zip(*(column.tolist() for column in placements), strict=True):
        images[row].append(image := PlacedImage(*placed))
        if batch.image_parts:
            part = batch.image_parts[image.picture] if 0 <= image.picture < len(batch.image_parts) else Part(0, 0)
            begins = range(image.start, image.start + part.rows * (part.step or part.columns), part.step or part.columns or 1)
            shown[row].append([at + column for at in begins for column in range(part.columns)])
    columns = (batch.input_ids, batch.labels, batch.kinds, batch.positions, batch.sample_ids, batch.text_ids)
    rows = []
    known = dict(zip(_named_samples(batch), zip(batch.sample_names, _parts(batch), strict=True), strict=False))
    for number, (ids, labels, kinds, positions, samples, texts) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        known_samples = [known[number, sample] for sample in range(max([*samples, -1]) + 1) if (number, sample) in known]
        owners = list(zip(samples, texts, strict=True))
        names, parts = [name for name, _ in known_samples], [part for _, part in known_samples]
        rows.append(AuditRow(ids, labels, kinds, positions, owners, images[number], names, parts, frozenset(markers), shown[number]))
    return rows


def _named_samples(batch: Batch) -> list[tuple[int, int]]:
    """(row, sample) of each of ``sample_names``; empty where they are not as many."""
    found = sorted({(row, int(sample)) for row, ids in enumerate(batch.sample_ids.tolist()) for sample in ids if sample >= 0})
    return found if len(found) == len(batch.sample_names) else []


def _parts(batch: Batch) -> list[int]:
    return batch.parts if len(batch.parts) == len(batch.sample_names) else [0] * len(batch.sample_names)


@dataclass(frozen=True)
class ShownPiece:
    """What is shown as one thing.

    Attributes:
        what: "text": one token, or several that only together are text; "special": a token with a name;
            "image"; "padding".
        start, end: its positions; none where an image takes none, and one beyond the row for the last token
            of a window.
        trained: whether the model learns to say it.
        text: as decoded, unescaped; the name of a special token.
        picture: number in ``Batch.images``, and which of the row's images it is.
    """

    what: Literal["text", "special", "image", "padding"]
    start: int
    end: int
    trained: bool
    text: str = ""
    ids: tuple[int, ...] = ()
    picture: int = -1
    slot: int = -1


def pieces_of(row: AuditRow, segment: Segment, tokenizer: Decoder, names: Mapping[int, str]) -> Iterator[ShownPiece]:
    """``segment`` in pieces, in order."""
    items = list(_items(row, segment, names))
    for (what, trained, _), group in groupby(items, key=lambda item: (item.what, item.trained, item.slot)):
        run = list(group)
        if what == "image":
            first = run[0]
            positions = 0 if first.start == first.end else len(run)
            yield ShownPiece("image", first.start, first.start + positions, trained, picture=first.picture, slot=first.slot)
        elif what == "padding":
            yield ShownPiece("padding", run[0].start, run[-1].end, trained)
        elif what == "special":
            yield from run
        else:
            yield from _texts(run, tokenizer.decode)


def _items(row: AuditRow, segment: Segment, names: Mapping[int, str]) -> Iterator[ShownPiece]:
    """One piece for each position; texts are not decoded yet."""
    inside = [(slot, image) for slot, image in enumerate(row.images) if segment.start <= image.start < segment.end]
    begins = {at: (slot, image) for slot, image in inside for at in (row.shown[slot] if row.shown else [image.start])}
    current: tuple[int, PlacedImage] | None = None
    for at in range(segment.start, segment.end):
        trained, kind = row.trained(at), row.kinds[at]
        if not row.images_take_positions:
            standing = [(slot, image) for slot, image in inside if image.start == at and (image.sample, image.text) == row.owners[at]]
            for slot, image in standing:
                yield ShownPiece("image", at, at, False, picture=image.picture, slot=slot)
        if kind == Kind.IMAGE:
            current = begins.get(at, current)
            slot, picture = (current[0], current[1].picture) if current else (-1, -1)
            yield ShownPiece("image", at, at + 1, trained, picture=picture, slot=slot)
        elif kind == Kind.PAD:
            yield ShownPiece("padding", at, at + 1, trained)
        else:
            yield _token(row.ids[at], at, trained, names)
    if segment.end in row.windows:
        yield _token(row.labels[segment.end - 1], segment.end, True, names)


def _token(id_: int, at: int, trained: bool, names: Mapping[int, str]) -> ShownPiece:
    name = names.get(id_)
    return ShownPiece("text" if name is None else "special", at, at + 1, trained, name or "", (id_,))


def _texts(run: Sequence[ShownPiece], decode: Callable[[Sequence[int]], str]) -> Iterator[ShownPiece]:
    """The text of each token of a run. Joined, the texts are the text of the whole run. A token may depend on
    the one before it, and a character may take several tokens: each token is decoded after the last one that
    was shown, and tokens without text are joined to the next one.
    """
    ids = [id_ for piece in run for id_ in piece.ids]
    context, begin = 0, 0  # tokens that are decoded along, tokens that are shown
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[context:begin]), decode(ids[context:end])
        if end < len(ids) and (text.endswith(UNFINISHED) or len(text) <= len(before)):
            continue
        yield ShownPiece("text", run[begin].start, run[end - 1].end, run[begin].trained, text[len(before) :], tuple(ids[begin:end]))
        context, begin = begin, end
