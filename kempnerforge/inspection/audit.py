"""What is trained, read from a finished batch: text with the trained tokens marked, and a list of what looks
wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby

from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.inspection.audit_rows import AuditRow, Decoder, PlacedImage, Segment, pieces_of, rows_of
from kempnerforge.util.errors import visible
from kempnerforge.util.numbers import counted

TRAINED, TRAINED_SPECIAL, DIM, IMAGE, SPECIAL, RESET = "\x1b[30;42m", "\x1b[4;30;42m", "\x1b[2m", "\x1b[36m", "\x1b[35m", "\x1b[0m"


def row_name(row: AuditRow, number: int) -> str:
    """How messages call a row."""
    named = f" ({visible(row.samples[0])}{f' and {len(row.samples) - 1} more' if len(row.samples) > 1 else ''})" if row.samples else ""
    return f"row {number}{named}"


# ---- as text -------------------------------------------------------------------------------------


def render_row(row: AuditRow, number: int, tokenizer: Decoder, color: bool, names: Mapping[int, str]) -> str:
    """A row as text with its trained tokens marked.

    Args:
        number: of the row in the batch.
        color: mark trained tokens by a green background and print the rest dim; otherwise put trained tokens
            in [brackets], and write a bracket or the name of a special token that the text itself holds after
            a backslash.
        names: special tokens by id, which are spelled out.

    Returns:
        A line of counts, then a line for each text (and for what a sample's texts share, and for the
        padding), numbered as in ``text_ids``. An image is ``[image x16]`` with its positions, or ``[image]``
        where it takes none. In a row of several samples each begins with a line that names it, and texts are
        numbered "sample.text".
    """
    trained = sum(label != IGNORE for label in row.labels)
    useful = sum(kind != Kind.PAD for kind in row.kinds)
    several = row.num_samples > 1
    counts = [counted(useful, "useful token"), f"{trained:,} trained", counted(len(row.images), "image"), counted(row.num_texts, "text")]
    if several:
        counts.append(counted(row.num_samples, "sample"))
    lines = [f"{row_name(row, number)}: {', '.join(counts)}"]
    seen = -1
    for segment in row.segments:
        if segment.sample > seen:
            seen = segment.sample
            if several:
                name = visible(row.samples[seen]) if seen < len(row.samples) else ""
                lines.append(f"  sample {seen}{f' ({name})' if name else ''}")
            if floating := row.floating(seen):
                lines.append(f"  {'':>3}  {_paint('[image]' * len(floating), IMAGE, color)}")
        number_of = "" if segment.sample < 0 or not segment.text else f"{seen}.{segment.text}" if several else str(segment.text)
        lines.append(f"  {number_of:>3}  {_render_segment(row, segment, tokenizer, color, names)}")
    return "\n".join(lines)


def _render_segment(row: AuditRow, segment: Segment, tokenizer: Decoder, color: bool, names: Mapping[int, str]) -> str:
    parts: list[tuple[str, str]] = []  # (colour, text)
    for (what, trained), group in groupby(pieces_of(row, segment, tokenizer, names), key=lambda piece: (piece.what, piece.trained)):
        run = list(group)
        if what == "image":
            lengths = [piece.end - piece.start for piece in run]
            parts.append((TRAINED if trained else IMAGE, "".join(f"[image x{length}]" if length else "[image]" for length in lengths)))
        elif what == "padding":
            parts.append((TRAINED if trained else IMAGE, f"[pad x{sum(piece.end - piece.start for piece in run)}]"))
        elif what == "special":
            parts.append((TRAINED_SPECIAL if trained else SPECIAL, visible("".join(piece.text for piece in run))))
        else:
            text = visible("".join(piece.text for piece in run))
            parts.append((TRAINED if trained else DIM, text if color else _escaped(text, names)))
    if not color:
        parts = [(TRAINED if paint in (TRAINED, TRAINED_SPECIAL) else DIM, text) for paint, text in parts]
    return "".join(_paint("".join(text for _, text in group), paint, color) for paint, group in groupby(parts, key=lambda part: part[0]))


def _escaped(text: str, names: Mapping[int, str]) -> str:
    """``text`` with a backslash before what it would otherwise share with the marks and the special tokens."""
    shared = sorted({"[", "]", *map(visible, names.values())} - {""}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, shared)), lambda found: f"\\{found[0]}", text)


def _paint(text: str, paint: str, color: bool) -> str:
    if color:
        return f"{paint}{text}{RESET}"
    return f"[{text}]" if paint == TRAINED else text


# ---- what looks wrong ----------------------------------------------------------------------------


def audit(
    batch: Batch, eos_id: int | None = None, *, ends: Collection[int] = (), every_turn: bool = True, markers: Collection[int] = ()
) -> list[str]:
    """What is wrong with the labels of a batch; nothing, if all is well.

    Found are: rows, samples and texts without a trained token; trained positions of images, padding or
    prompts; answers with untrained tokens; labels that are not the next token, or that reach out of their
    text; answers whose last trained token is neither EOS nor the end of a turn; images that do not are where
    the positions of images are, or in another sample or text than those; positions that do not begin anew for
    each sample and text; samples that are in pieces; texts that would see each other; ``targets`` that are
    not the positions with a label. Windows of plain text, where each position is trained, need no EOS and end
    on a token beyond the row.

    Args:
        eos_id: id of EOS; None leaves the check for the end of answers out.
        ends: further tokens that an answer may end in, such as the template's end of a turn.
        every_turn: each answer of a conversation has an end. False: its last one alone, as with templates
            that write none.
        markers: tokens around images that are part of them, such as the markers of tiles.

    Returns:
        One line per row and kind of finding, with a count and the first position.
    """
    findings = []
    labelled = [row * batch.labels.shape[1] + at for row, at in (batch.labels != IGNORE).nonzero().tolist()]
    if sorted(batch.targets.tolist()) != labelled:
        findings.append(f"targets: {counted(len(batch.targets), 'position')} listed, {len(labelled)} have a label, or not the same ones")
    rows = rows_of(batch, markers)
    if not batch.has_documents and any(row.num_samples > 1 or row.num_texts > 1 for row in rows):
        findings.append("has_documents is false, and a row holds several samples or texts: they would see each other")
    findings += _images_left_over(batch)
    lengths = {image_length(row, number) for row in rows for number in range(len(row.images))}
    allowed = None if eos_id is None else frozenset({eos_id, *ends})
    for number, row in enumerate(rows):
        name = row_name(row, number)
        if all(label == IGNORE for label in row.labels):
            findings.append(f"{name}: no trained token")
        found: dict[str, list[int]] = {}
        for what, position in (*_faults(row, allowed, every_turn), *_misplaced(row, max(lengths, default=0))):
            found.setdefault(what, []).append(position)
        findings += [f"{name}: {what}: {counted(len(at), 'position')}, the first is {at[0]}" for what, at in found.items()]
    return findings


def _images_left_over(batch: Batch) -> Iterator[str]:
    used = set(batch.image_index.tolist())
    if beyond := sorted(index for index in used if not 0 <= index < batch.num_images):
        yield f"image_index: {beyond[0]} is none of the batch's {counted(batch.num_images, 'image')}"
    used |= {number for number, part in enumerate(batch.image_parts) if part.view}  # read with the view before
    if idle := batch.num_images - len(used & set(range(batch.num_images))):
        yield f"images: {idle} of {batch.num_images} are in no row"


def image_length(row: AuditRow, number: int) -> int:
    """Positions of the row's image ``number``: those of its tokens that are shown, or all to where the next one
    begins, or something else.
    """
    if row.shown:
        return len(row.shown[number])
    start = row.images[number].start
    others = {image.start for image in row.images} - {start}
    end = start
    while end < len(row.kinds) and row.kinds[end] == Kind.IMAGE and end not in others:
        end += 1
    return end - start


def _misplaced(row: AuditRow, image_positions: int) -> Iterator[tuple[str, int]]:
    """(what is wrong, position): images, ids and positions that contradict each other over one row."""
    starts = {image.start for image in row.images}
    if row.shown:
        tokens = sorted(at for positions in row.shown for at in positions)
        if tokens != (found := [at for at, kind in enumerate(row.kinds) if kind == Kind.IMAGE]):
            yield "image positions without an image, or the other way round", min({*tokens} ^ {*found}, default=0)
    elif row.images_take_positions:
        for at, kind in enumerate(row.kinds):
            begins = kind == Kind.IMAGE and (at == 0 or row.kinds[at - 1] != Kind.IMAGE)
            if (at in starts) > (kind == Kind.IMAGE) or begins > (at in starts):
                yield "image positions without an image, or the other way round", at
        for number, image in enumerate(row.images):
            if 0 < image_length(row, number) != image_positions:
                yield f"image of fewer than {image_positions} positions", image.start
    for number, image in enumerate(row.images):
        if row.shown and not row.shown[number]:
            continue  # nothing of it is in the row
        owner = row.owners[image.start] if image.start < len(row.owners) else (image.sample, image.text)
        if owner != (image.sample, image.text) and not _leads(row, image):
            yield "image of another sample or text than the position", image.start
    known: set[tuple[int, int]] = set()
    front: dict[int, int] = {}  # positions that the texts of a sample share
    before = (0, 0)
    for sample, text, start, end in row.segments:
        if sample < 0:
            continue
        if (sample, text) in known or (sample, text) < before:
            yield "sample or text that is in pieces, or not in order", start
        known.add((sample, text))
        before = sample, text
        first = front.get(sample, 0)
        if not text:
            front[sample] = end - start
        if row.positions[start:end] != list(range(first, first + end - start)):
            yield f"positions of a text do not count up from {'what its sample shares' if first else '0'}", start


def _leads(row: AuditRow, image: PlacedImage) -> bool:
    """Whether an image that takes no positions is directly before the texts that share it."""
    before = row.owners[image.start - 1] if image.start else (-1, 0)
    of_sample = image.start < len(row.owners) and row.owners[image.start][0] == image.sample
    return not row.images_take_positions and not image.text and of_sample and (before[0] != image.sample or before[1] == 0)


def _faults(row: AuditRow, ends: frozenset[int] | None, every_turn: bool) -> Iterator[tuple[str, int]]:
    """(what is wrong, position): labels of one row. The position is where the trained token is, if there is
    one.
    """
    length = len(row.ids)
    for segment in row.segments:
        sample, text, start, end = segment
        window = end in row.windows
        if text > 0 and sample >= 0 and not _learns(row, start, end):
            yield "text without a trained token", start
        for at in range(start, end):
            label, last = row.labels[at], at == end - 1
            if sample < 0 and label != IGNORE:
                yield "padding has a label", at
            if row.kinds[at] == Kind.ANSWER and not window and (at == 0 or row.labels[at - 1] == IGNORE):
                yield "answer token is not trained", at
            if label == IGNORE or (last and window):
                continue
            ended = ends is None or label in ends or _goes_on(row, at, end)
            if not ended and (every_turn or all(later == IGNORE for later in row.labels[at + 1 : end - 1])):
                yield "last trained token of an answer is not EOS or an end of turn", at + 1
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


def _learns(row: AuditRow, start: int, end: int) -> bool:
    """Whether any token of a segment is trained. The first may be: by the last position of what its sample
    shares.
    """
    before = start > 0 and row.labels[start - 1] != IGNORE and row.trained(start)
    return before or any(label != IGNORE for label in row.labels[start : end - 1]) or end in row.windows


def _goes_on(row: AuditRow, at: int, end: int) -> bool:
    """Whether another trained token follows the one that ``at`` predicts, with at most images between them."""
    before = at + 1
    while before + 1 < end and row.is_image(before + 1):
        before += 1
    return before < end and row.labels[before] != IGNORE
