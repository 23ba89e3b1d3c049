"""What is trained, read from a finished batch: text with the trained tokens marked, and a list of what looks wrong.

Which tokens are trained follows from ``labels`` and nothing else: ``labels[b, t]`` is what position t learns to say next, so the token at
t + 1 is trained. ``kinds``, which the same code writes beside the labels, is only ever compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from kempnerforge.data.batch import IGNORE, Batch, Kind

TRAINED, DIM, IMAGE, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[36m", "\x1b[0m"


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    bos_id: int | None
    eos_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class _Row:
    """One row as plain lists, and its segments: stretches that belong to the same text of the same sample."""

    ids: list[int]
    labels: list[int]
    kinds: list[int]
    owners: list[tuple[int, int]]  # (sample, text) of each position; sample -1 is padding, text 0 the shared part
    images: list[tuple[int, tuple[int, int]]]  # (start, owner) of each, in the order of the row

    def segments(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """(owner, first position, position behind the last)."""
        start = 0
        for owner, positions in groupby(self.owners):
            end = start + len(list(positions))
            yield owner, start, end
            start = end

    def is_window(self, start: int, end: int) -> bool:
        """Whether a segment is a piece of plain text: each position is trained, the last one on a token that is not in the row."""
        sample, text = self.owners[start]
        return sample >= 0 and text > 0 and all(label != IGNORE for label in self.labels[start:end])

    def trained(self, position: int) -> bool:
        """Whether the token at ``position`` is one that the position before it learns to say."""
        if position == 0 or self.labels[position - 1] == IGNORE:
            return False
        if self.owners[position] == self.owners[position - 1]:
            return True
        start = next(start for _, start, end in self.segments() if end == position)
        return not self.is_window(start, position)

    @property
    def images_take_positions(self) -> bool:
        return Kind.IMAGE in self.kinds

    def image_number(self, position: int) -> int:
        """Images that have begun at ``position``."""
        return sum(start <= position for start, _ in self.images)

    def is_image(self, position: int) -> bool:
        """Whether ``position`` is one of an image, or of the token that stands for one."""
        if self.kinds[position] == Kind.IMAGE:
            return True
        stands_for_one = any(start == position and text > 0 for start, (_, text) in self.images)
        return not self.images_take_positions and stands_for_one and self.kinds[position] == Kind.PROMPT


def _rows(batch: Batch) -> list[_Row]:
    columns = (batch.input_ids, batch.labels, batch.kinds, batch.sample_ids, batch.text_ids)
    images: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in batch.input_ids]
    placements = (batch.image_rows, batch.image_starts, batch.image_sample_ids, batch.image_text_ids)
    for row, start, sample, text in zip(*(column.tolist() for column in placements), strict=True):
        images[row].append((start, (sample, text)))
    return [
        _Row(ids, labels, kinds, list(zip(samples, texts, strict=True)), images[row])
        for row, (ids, labels, kinds, samples, texts) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]


def _row_name(batch: Batch, row: int) -> str:
    named = len(batch.sample_names) == len(batch.input_ids)
    return f"row {row} ({_visible(batch.sample_names[row])})" if named else f"row {row}"


def _visible(text: str) -> str:
    """Line breaks and other controls as escapes, so that data cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def render_rows(batch: Batch, tokenizer: Decoder, color: bool) -> list[str]:
    """Each row as text with its trained tokens marked.

    Args:
        batch: as training gets it.
        tokenizer: of the model.
        color: mark trained tokens by a green background and print the rest dim; otherwise put trained tokens in [brackets], and write a
            bracket of the text itself as ``\\[``.

    Returns:
        One string per row: a line of counts, then a line for each text (and for the shared images and the padding), numbered as in
        ``text_ids``. An image is ``[image x16]`` with its positions, or ``[image]`` where it takes none.
    """
    return [_render_row(batch, index, row, tokenizer, color) for index, row in enumerate(_rows(batch))]


def _render_row(batch: Batch, index: int, row: _Row, tokenizer: Decoder, color: bool) -> str:
    useful = sum(kind != Kind.PAD for kind in row.kinds)
    trained = sum(label != IGNORE for label in row.labels)
    texts = len({owner for owner in row.owners if owner[0] >= 0 and owner[1] > 0})
    counts = [_count(useful, "useful token"), f"{trained} trained", _count(len(row.images), "image"), _count(texts, "text")]
    lines = [f"{_row_name(batch, index)}: {', '.join(counts)}"]
    several = len({sample for sample, _ in row.owners if sample >= 0}) > 1
    shared = (
        [] if row.images_take_positions else [owner[0] for _, owner in row.images if not owner[1]]
    )  # samples of images without positions
    for (sample, text), start, end in row.segments():
        if text > 0 and sample in shared:
            lines.append(f"  {'':>3}  {_paint('[image]' * shared.count(sample), False, True, color)}")
            shared = [other for other in shared if other != sample]
        name = "" if sample < 0 or not text else f"{sample}.{text}" if several else str(text)
        lines.append(f"  {name:>3}  {_render_segment(row, start, end, tokenizer, color)}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _render_segment(row: _Row, start: int, end: int, tokenizer: Decoder, color: bool) -> str:
    parts: list[tuple[bool, bool, str]] = []  # (trained, image or padding, text)
    for (trained, shown), group in groupby(_tokens(row, start, end), key=lambda token: token[:2]):
        ids = [token[2] for token in group]
        text = shown.split("#")[0].format(len(ids)) if shown else _decode(ids, tokenizer, color)
        parts.append((trained, bool(shown), text))
    if color:
        return "".join(_paint(text, trained, plain, color) for trained, plain, text in parts)
    merged = [(trained, "".join(text for _, _, text in group)) for trained, group in groupby(parts, key=lambda part: part[0])]
    return "".join(_paint(text, trained, False, color) for trained, text in merged)


def _tokens(row: _Row, start: int, end: int) -> Iterator[tuple[bool, str, int]]:
    """(trained, what to show instead of the token, id) over a segment; what is shown differs from image to image behind a "#"."""
    for at in range(start, end):
        if not row.images_take_positions:
            count = sum(begin == at and owner == row.owners[at] for begin, owner in row.images)
            yield from [(False, "[image]" * count, 0)] * bool(count)
        instead = {Kind.IMAGE: f"[image x{{}}]#{row.image_number(at)}", Kind.PAD: "[pad x{}]"}.get(Kind(row.kinds[at]), "")
        yield row.trained(at), instead, row.ids[at]
    if row.is_window(start, end):
        yield True, "", row.labels[end - 1]


def _paint(text: str, trained: bool, plain: bool, color: bool) -> str:
    if color:
        return f"{TRAINED if trained else IMAGE if plain else DIM}{text}{RESET}"
    return f"[{text}]" if trained else text


def _decode(ids: list[int], tokenizer: Decoder, color: bool) -> str:
    """Text of ``ids`` with BOS and EOS spelled out."""
    special = {tokenizer.eos_id: "<eos>"}
    if tokenizer.bos_id is not None:
        special.setdefault(tokenizer.bos_id, "<bos>")
    text = ""
    for name, group in groupby(ids, key=special.get):
        if name is not None:
            text += name * len(list(group))
            continue
        plain = _visible(tokenizer.decode(list(group)))
        text += plain if color else plain.replace("[", "\\[").replace("]", "\\]")
    return text


def audit(batch: Batch, eos_id: int | None = None) -> list[str]:
    """What is wrong with the labels of a batch; nothing, if all is well.

    Found are: rows without a trained token; trained positions of images, padding or prompts; answers with untrained tokens; labels that
    are not the next token, or that reach out of their text; answers whose last trained token is not EOS; images that do not stand where the
    positions of images are; ``targets`` that are not the positions with a label. Windows of plain text, where each position is trained, need
    no EOS and end on a token beyond the row.

    Args:
        batch: as training gets it.
        eos_id: id of EOS; None leaves the check for it out.

    Returns:
        One line per row and kind of finding, with a count and the first position.
    """
    findings = []
    labelled = [row * batch.labels.shape[1] + at for row, at in (batch.labels != IGNORE).nonzero().tolist()]
    if sorted(batch.targets.tolist()) != labelled:
        findings.append(f"targets: {_count(len(batch.targets), 'position')} listed, {len(labelled)} have a label, or not the same ones")
    for index, row in enumerate(_rows(batch)):
        name = _row_name(batch, index)
        if all(label == IGNORE for label in row.labels):
            findings.append(f"{name}: no trained token")
        found: dict[str, list[int]] = {}
        for what, position in _faults(row, eos_id):
            found.setdefault(what, []).append(position)
        findings += [f"{name}: {what}: {_count(len(at), 'position')}, the first is {at[0]}" for what, at in found.items()]
    return findings


def _faults(row: _Row, eos_id: int | None) -> Iterator[tuple[str, int]]:
    """(what is wrong, position) over one row. A position is that of the trained token, where there is one."""
    length = len(row.ids)
    if row.images_take_positions:
        starts = {start for start, _ in row.images}
        for at in range(length):
            begins = row.kinds[at] == Kind.IMAGE and (at == 0 or row.kinds[at - 1] != Kind.IMAGE)
            if (at in starts) > (row.kinds[at] == Kind.IMAGE) or begins > (at in starts):
                yield "image positions without an image, or the other way round", at
    for (sample, text), start, end in row.segments():
        window = row.is_window(start, end)
        for at in range(start, end):
            label, last = row.labels[at], at == end - 1
            if sample < 0 and label != IGNORE:
                yield "padding has a label", at
            if row.kinds[at] == Kind.ANSWER and not window and (at == 0 or row.labels[at - 1] == IGNORE):
                yield "answer token is not trained", at
            if label == IGNORE or (last and window):
                continue
            if eos_id is not None and label != eos_id and not _goes_on(row, at, end):
                yield "last trained token of an answer is not EOS", at + 1
            follows_shared = last and text == 0 and end < length and row.owners[end][0] == sample
            if last and not follows_shared:
                yield "label reaches beyond its text", at
            if at + 1 == length:
                continue
            if row.kinds[at + 1] in (Kind.IMAGE, Kind.PAD):
                yield f"trained {'image' if row.kinds[at + 1] == Kind.IMAGE else 'padding'} position", at + 1
            elif label != row.ids[at + 1]:
                yield "label is not the next token", at + 1
            if row.kinds[at + 1] == Kind.PROMPT:
                yield "trained prompt token", at + 1


def _goes_on(row: _Row, at: int, end: int) -> bool:
    """Whether another trained token follows the one that ``at`` predicts, with at most images between them."""
    before = at + 1
    while before + 1 < end and row.is_image(before + 1):
        before += 1
    return before < end and row.labels[before] != IGNORE
