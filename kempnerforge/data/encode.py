"""Samples -> token rows with labels -> batches.

One sample is one row: its images first, which are shared, then its texts, which do not see each other (multi-annotated images: Deitke et
al. 2024, "Molmo and PixMo", section 3)::

    token      <image>*P  BOS what colour ? \\n  red  EOS   BOS what shape ? \\n circle EOS
    text_id        0       1   1     1    1  1   1    1     2 ...
    position     0..P-1    P  P+1 ...                       P ...
    label          -       -   -     -    -  red EOS  -     - ...

B rows, S positions, N images, M placements, T trained positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batch import IGNORE, Batch, Kind
from kempnerforge.data.images import ImageCache
from kempnerforge.data.sample import Sample, SampleError, Text, render_answer, render_prompt
from kempnerforge.data.tokenizer import Tokenizer

# rows of Encoded.table
INPUT_IDS, LABELS, POSITIONS, TEXT_IDS, KINDS = range(5)
CACHED_TEXTS = 65536


@dataclass(frozen=True)
class Layout:
    """What the data must know of the model.

    Attributes:
        image_tokens: positions that one image takes in the row; 0 where images stay out of the residual stream.
        image_size: pixels of a side; 0: the job has no images, and those of the samples are left out.
        max_text_len: positions of all texts of a row at most.
        seq_len: positions of a row at most.
        pad_to: length of a row with ``data.batching = "pad"``.
    """

    image_tokens: int
    image_size: int
    max_text_len: int
    seq_len: int
    pad_to: int


@dataclass
class Encoded:
    """One row.

    Attributes:
        id: of the sample.
        table: (5, S) int64: input_ids, labels, positions, text_ids, kinds, as in ``Batch``. Image positions hold 0 for an id.
        images: n arrays of (H, W, 3) uint8.
        image_starts: first position of each image.
        image_size: H and W; 0: no images in this job.
        left_out: texts of the sample that did not fit.
        skipped: (sample id, reason) of those that this one stands in for.
    """

    id: str
    table: np.ndarray
    images: list[np.ndarray]
    image_starts: list[int]
    image_size: int
    left_out: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def num_texts(self) -> int:
        return int(self.table[TEXT_IDS, -1])


class Encoder:
    """Encodes samples for one model.

    Args:
        tokenizer: of the model.
        data_cfg: templates and size of the image cache.
        layout: what the model needs.
        seed: of choices among texts that do not all fit.
    """

    def __init__(self, tokenizer: Tokenizer, data_cfg: DataConfig, layout: Layout, seed: int) -> None:
        self.tokenizer, self.cfg, self.layout, self.seed = tokenizer, data_cfg, layout, seed
        self._image_cache = ImageCache(data_cfg.image_cache_mib)
        self._pieces: dict[tuple[str, str], np.ndarray] = {}

    def encode(self, sample: Sample, seed: int) -> Encoded:
        """One row from one sample. Nothing is cut: a text is there in full or not at all.

        Args:
            sample: what to encode.
            seed: decides which texts are taken when they do not all fit; the same seed takes the same ones.

        Raises:
            SampleError: no texts, an empty answer, a text that can never fit, text that is not Unicode, an unusable image.
        """
        images = sample.images if self.layout.image_size else ()
        shared = len(images) * self.layout.image_tokens
        try:
            if not sample.texts:
                raise SampleError("has no texts")
            pieces = [self._piece(text) for text in sample.texts]  # each (5, L)
            pieces, left_out = self._fit(pieces, sample.texts, shared, seed)
            pixels = [self._image_cache.load(image, self.layout.image_size) for image in images]
        except SampleError as error:
            raise SampleError(f"sample {sample.id}: {error}") from None
        lengths = [piece.shape[1] for piece in pieces]
        table = np.concatenate([self._image_piece(shared), *pieces], axis=1)  # (5, S)
        table[TEXT_IDS, shared:] = np.repeat(np.arange(1, len(pieces) + 1), lengths)
        table[POSITIONS, shared:] += shared
        starts = [k * self.layout.image_tokens for k in range(len(images))]
        return Encoded(sample.id, table, pixels, starts, self.layout.image_size, left_out)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids that stand before an answer, for generation: the same as in training.

        Raises:
            ValueError: ``prompt`` is not Unicode text.
        """
        ids = self.tokenizer.encode(render_prompt(self.cfg, prompt))
        if self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id, *ids]
        return ids or [self.tokenizer.eos_id]  # without a BOS, EOS starts an empty prompt: the first answer token needs one before it

    def _piece(self, text: Text) -> np.ndarray:
        """One text alone: (5, L) with positions from 0."""
        if isinstance(text.answer, tuple):
            return self._window(text.answer)
        if not isinstance(text.prompt, str) or not isinstance(text.answer, str):
            raise SampleError(f"prompt and answer must be strings, not {type(text.prompt).__name__} and {type(text.answer).__name__}")
        key = text.prompt, text.answer
        piece = self._pieces.get(key)
        if piece is None:
            if len(self._pieces) >= CACHED_TEXTS:
                self._pieces.clear()
            piece = self._pieces[key] = self._encode_text(text.prompt, text.answer)
        return piece

    def _encode_text(self, prompt: str, answer: str) -> np.ndarray:
        if not answer.strip():
            raise SampleError("empty answer")
        try:
            before = self.encode_prompt(prompt)
            after = [*self.tokenizer.encode(render_answer(self.cfg, answer)), self.tokenizer.eos_id]
        except ValueError as error:
            raise SampleError(str(error)) from None
        piece = np.empty((5, len(before) + len(after)), dtype=np.int64)
        piece[INPUT_IDS] = before + after
        piece[LABELS] = [IGNORE] * (len(before) - 1) + after + [IGNORE]
        piece[POSITIONS] = np.arange(piece.shape[1])
        piece[TEXT_IDS] = 1
        piece[KINDS] = [Kind.PROMPT] * len(before) + [Kind.ANSWER] * len(after)
        return piece

    def _window(self, ids: tuple[int, ...]) -> np.ndarray:
        if len(ids) < 2:
            raise SampleError(f"a window of {len(ids)} tokens: nothing to predict")
        piece = np.empty((5, len(ids) - 1), dtype=np.int64)
        piece[INPUT_IDS], piece[LABELS] = ids[:-1], ids[1:]
        piece[POSITIONS] = np.arange(len(ids) - 1)
        piece[TEXT_IDS], piece[KINDS] = 1, Kind.ANSWER
        return piece

    def _image_piece(self, length: int) -> np.ndarray:
        """The shared part: (5, length)."""
        piece = np.zeros((5, length), dtype=np.int64)
        piece[LABELS], piece[KINDS] = IGNORE, Kind.IMAGE
        piece[POSITIONS] = np.arange(length)
        return piece

    def _fit(self, pieces: list[np.ndarray], texts: Sequence[Text], shared: int, seed: int) -> tuple[list[np.ndarray], int]:
        """All pieces if they fit, else a random subset that does, in order; and how many are left out."""
        max_len, seq_len = self.layout.max_text_len, self.layout.seq_len
        lengths = [piece.shape[1] for piece in pieces]
        for length, text in zip(lengths, texts, strict=True):
            if length > max_len and not isinstance(text.answer, tuple):
                raise SampleError(f"a text of {length} tokens, max_text_len = {max_len}")
            if shared + length > seq_len:
                raise SampleError(f"{shared} image and {length} text tokens, train.seq_len = {seq_len}")
        budget = min(max(max_len, max(lengths)), seq_len - shared)
        if sum(lengths) <= budget:
            return pieces, 0
        taken = []
        for k in np.random.default_rng((self.seed, seed)).permutation(len(pieces)):
            if lengths[k] <= budget:
                taken.append(int(k))
                budget -= lengths[k]
        return [pieces[k] for k in sorted(taken)], len(pieces) - len(taken)


def collate(encoded: list[Encoded], pad_id: int, pad_to: int | None) -> Batch:
    """Rows to a batch, padded on the right.

    Args:
        encoded: B rows.
        pad_id: the id on padding and on positions of images.
        pad_to: row length; None pads to the longest. A row that is longer is kept whole.
    """
    length = max([e.table.shape[1] for e in encoded] + [pad_to or 0])
    table = np.zeros((5, len(encoded), length), dtype=np.int64)  # (5, B, S)
    table[INPUT_IDS], table[LABELS] = pad_id, IGNORE
    sample_ids = np.full((len(encoded), length), -1, dtype=np.int64)
    for row, e in enumerate(encoded):
        end = e.table.shape[1]
        table[:, row, :end] = e.table
        sample_ids[row, :end] = 0
    table[INPUT_IDS][table[KINDS] == Kind.IMAGE] = pad_id
    images = [image for e in encoded for image in e.images]
    rows = [row for row, e in enumerate(encoded) for _ in e.images]
    columns = torch.from_numpy(table)
    return Batch(
        input_ids=columns[INPUT_IDS],
        labels=columns[LABELS],
        positions=columns[POSITIONS],
        sample_ids=torch.from_numpy(sample_ids),
        text_ids=columns[TEXT_IDS],
        kinds=columns[KINDS].to(torch.uint8),
        targets=torch.from_numpy(np.flatnonzero(table[LABELS] != IGNORE)),
        images=_stack(images, encoded[0].image_size),
        image_index=torch.arange(len(images)),
        image_rows=torch.tensor(rows, dtype=torch.int64),
        image_starts=torch.tensor([start for e in encoded for start in e.image_starts], dtype=torch.int64),
        has_documents=any(e.num_texts > 1 for e in encoded),
        skipped=[bad for e in encoded for bad in e.skipped],
        sample_names=[e.id for e in encoded],
        texts_left_out=sum(e.left_out for e in encoded),
    )


def _stack(images: list[np.ndarray], size: int) -> torch.Tensor | None:
    if not size:
        return None
    if not images:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))  # (N, 3, H, W)


def prompt_batch(
    prompts: list[list[int]],
    images: torch.Tensor | None,
    image_of_row: Sequence[int | Sequence[int]] | None,
    layout: Layout,
    pad_id: int,
) -> Batch:
    """Prompts to generate from, padded on the left so that all answers start at the same position. Nothing is trained.

    Args:
        prompts: B lists of ids, as from ``Encoder.encode_prompt``.
        images: (N, 3, H, W) uint8, or None where the job has none.
        image_of_row: which image (or images) stands in each row, so that rows can share one; None: image b in row b.
        layout: what the model needs.
        pad_id: the id on padding and on positions of images.
    """
    if images is None:
        per_row: list[list[int]] = [[] for _ in prompts]
    else:
        chosen = range(len(prompts)) if image_of_row is None else image_of_row
        per_row = [[k] if isinstance(k, int) else list(k) for k in chosen]
    lengths = [len(which) * layout.image_tokens + len(ids) for which, ids in zip(per_row, prompts, strict=True)]
    shape = len(prompts), max(lengths)
    input_ids, positions, text_ids, kinds = np.full(shape, pad_id), np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, np.uint8)
    sample_ids, starts = np.full(shape, -1), []
    for row, (which, ids, length) in enumerate(zip(per_row, prompts, lengths, strict=True)):
        begin, text = shape[1] - length, shape[1] - len(ids)
        input_ids[row, text:] = ids
        positions[row, begin:] = np.arange(length)
        sample_ids[row, begin:] = 0
        text_ids[row, text:] = 1
        kinds[row, begin:text], kinds[row, text:] = Kind.IMAGE, Kind.PROMPT
        starts += [begin + k * layout.image_tokens for k in range(len(which))]
    return Batch(
        input_ids=torch.from_numpy(input_ids),  # (B, S)
        labels=torch.full(shape, IGNORE, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        sample_ids=torch.from_numpy(sample_ids),
        text_ids=torch.from_numpy(text_ids),
        kinds=torch.from_numpy(kinds),
        targets=torch.empty(0, dtype=torch.int64),
        images=images,
        image_index=torch.tensor([k for which in per_row for k in which], dtype=torch.int64),
        image_rows=torch.tensor([row for row, which in enumerate(per_row) for _ in which], dtype=torch.int64),
        image_starts=torch.tensor(starts, dtype=torch.int64),
        has_documents=len(set(lengths)) > 1,
        sample_names=[str(row) for row in range(len(prompts))],
    )
