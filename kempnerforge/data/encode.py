"""Samples -> token rows with labels -> batches.

One sample is one row: the images that its texts share, then the texts, which do not see each other (multi-annotated images: Deitke et al.
2024, "Molmo and PixMo", section 3)::

    token      <image>*P  BOS what colour ? \\n  red  EOS   BOS what shape ? \\n circle EOS
    text_id        0       1   1     1    1  1   1    1     2 ...
    position     0..P-1    P  P+1 ...                       P ...
    label          -       -   -     -    -  red EOS  -     - ...

Images stand in front, unless the texts say where. Prompt "is <image> like <image> ?", answer "no <image> yes", P = 2::

    token      BOS is <image>*2 like <image>*2  ? \\n no <image>*2 yes EOS
    text_id     1   1   1  1     1     1  1     1  1  1   1   1    1   1
    position    0   1   2  3     4     5  6     7  8  9  10  11   12  13
    label       -   -   -  -     -     -  -     - no  -   - yes  EOS   -

The rules of the placeholder (``data.image_placeholder``; "<image>" here):

* A rendered prompt and a rendered answer, templates and all, are split at it, and the pieces are tokenised each alone. The k-th of a text is
  image k of its sample.
* If any text of a sample has one, each must have as many as there are images. If none has, all images stand in front.
* Images that lead every text of a sample, before any of its tokens, stand in front once, shared by the texts, and BOS follows them. The
  others stand inside each text. An image that stands in several texts is encoded once.
* A position's label is the token right behind it, if that is trained; so the last position of an image may have one, and none predicts an
  image.
* Where an image takes no position (cross-attention), nothing stands in its place and the next token is the first to see it. It may therefore
  not stand right before a trained token, which an earlier position predicts. With the placeholder among ``model.new_tokens`` it may: that
  token stands at each written placeholder then, leading ones as well, untrained.
* In a job without images the placeholders vanish with them.

B rows, S positions, N images, M placements, T trained positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batch import IGNORE, Batch, Kind
from kempnerforge.data.images import ImageCache
from kempnerforge.data.interleave import (
    IMAGES,
    INPUT_IDS,
    KINDS,
    LABELS,
    POSITIONS,
    STARTS,
    TEXT_IDS,
    TEXTS,
    Layout,
    Prompt,
    Words,
    lay_out,
)
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.data.words import TextEncoder


@dataclass
class Encoded:
    """One row.

    Attributes:
        id: of the sample.
        table: (5, S) int64: input_ids, labels, positions, text_ids, kinds, as in ``Batch``. Image positions hold 0 for an id.
        images: n arrays of (H, W, 3) uint8.
        placements: (3, M) int64: number of the image, first position, text; in the order of the row.
        image_size: H and W; 0: no images in this job.
        left_out: texts of the sample that did not fit.
        skipped: (sample id, reason) of those that this one stands in for.
    """

    id: str
    table: np.ndarray
    images: list[np.ndarray]
    placements: np.ndarray
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
        data_cfg: templates, placeholder and size of the image cache.
        layout: what the model needs.
        seed: of choices among texts that do not all fit.
    """

    def __init__(self, tokenizer: Tokenizer, data_cfg: DataConfig, layout: Layout, seed: int) -> None:
        self.tokenizer, self.cfg, self.layout, self.seed = tokenizer, data_cfg, layout, seed
        self.texts = TextEncoder(tokenizer, data_cfg, layout)
        self._image_cache = ImageCache(data_cfg.image_cache_mib)

    def encode(self, sample: Sample, seed: int) -> Encoded:
        """One row from one sample. Nothing is cut: a text is there in full or not at all.

        Args:
            sample: what to encode.
            seed: decides which texts are taken when they do not all fit; the same seed takes the same ones.

        Raises:
            SampleError: no texts, an empty answer, a text that can never fit, text that is not Unicode, an unusable image, placeholders that
                do not match the images, an image that the token behind it cannot see.
        """
        images = sample.images if self.layout.image_size else ()
        try:
            if not sample.texts:
                raise SampleError("has no texts")
            words = [self.texts.encode(text) for text in sample.texts]
            shared = self._shared(words, len(images))
            words, left_out = self._fit(words, sample.texts, shared, len(images), seed)
            pixels = [self._image_cache.load(image, self.layout.image_size) for image in images]
        except SampleError as error:
            raise SampleError(f"sample {sample.id}: {error}") from None
        table, placements = lay_out(words, shared, self.layout.image_tokens)
        return Encoded(sample.id, table, pixels, placements, self.layout.image_size, left_out)

    def encode_prompt(self, prompt: str, num_images: int) -> Prompt:
        """As ``TextEncoder.encode_prompt``."""
        return self.texts.encode_prompt(prompt, num_images)

    def _shared(self, words: list[Words], images: int) -> int:
        """How many of the sample's images stand in front, once."""
        if not any(text.image_at for text in words):
            return images
        wrong = next((len(text.image_at) for text in words if len(text.image_at) != images), None)
        if wrong is not None:
            raise SampleError(f"{wrong} of {self.cfg.image_placeholder!r} in a text and {images} images: must be as many in each text")
        return min(text.lead for text in words)

    def _fit(self, words: list[Words], texts: Sequence[Text], shared: int, images: int, seed: int) -> tuple[list[Words], int]:
        """All texts if they fit, else a random subset that does, in order; and how many are left out."""
        max_len, seq_len, image_tokens = self.layout.max_text_len, self.layout.seq_len, self.layout.image_tokens
        lengths = [text.table.shape[1] for text in words]
        inside = (images - shared) * image_tokens  # positions of images in each text
        shared = shared * image_tokens
        for length, text in zip(lengths, texts, strict=True):
            if length > max_len and not isinstance(text.answer, tuple):
                raise SampleError(f"a text of {length} tokens, max_text_len = {max_len}")
            if shared + inside + length > seq_len:
                raise SampleError(f"{shared + inside} image and {length} text tokens, train.seq_len = {seq_len}")
        tokens, positions = max(max_len, max(lengths)), seq_len - shared
        if sum(lengths) <= tokens and sum(lengths) + inside * len(words) <= positions:
            return words, 0
        taken = []
        for k in np.random.default_rng((self.seed, seed)).permutation(len(words)):
            if lengths[k] <= tokens and lengths[k] + inside <= positions:
                taken.append(int(k))
                tokens, positions = tokens - lengths[k], positions - lengths[k] - inside
        return [words[k] for k in sorted(taken)], len(words) - len(taken)


def collate(encoded: list[Encoded], pad_id: int, pad_to: int | None) -> Batch:
    """Rows to a batch, padded on the right.

    Args:
        encoded: B rows.
        pad_id: the id on padding and on positions of images.
        pad_to: row length; None pads to the longest. A row that is longer is kept whole.
    """
    length = max([e.table.shape[1] for e in encoded] + [pad_to or 0])
    firsts = np.cumsum([0] + [len(e.images) for e in encoded])  # the number of each row's first image in the batch
    return _batch(
        [(e.table, e.placements) for e in encoded],
        [first + e.placements[IMAGES] for first, e in zip(firsts, encoded, strict=False)],
        [0] * len(encoded),
        length,
        pad_id,
        images=_stack([image for e in encoded for image in e.images], encoded[0].image_size),
        has_documents=any(e.num_texts > 1 for e in encoded),
        skipped=[bad for e in encoded for bad in e.skipped],
        sample_names=[e.id for e in encoded],
        texts_left_out=sum(e.left_out for e in encoded),
    )


def prompt_batch(
    prompts: Sequence[Prompt],
    images: torch.Tensor | None,
    image_of_row: Sequence[int | Sequence[int]] | None,
    layout: Layout,
    pad_id: int,
) -> Batch:
    """Prompts to generate from, padded on the left so that all answers start at the same position. Nothing is trained.

    Args:
        prompts: B of them, as from ``Encoder.encode_prompt``.
        images: (N, 3, H, W) uint8, or None where the job has none.
        image_of_row: which image (or images) each row has, so that rows can share one; None: row b has image b.
        layout: what the model needs.
        pad_id: the id on padding and on positions of images.
    """
    chosen = range(len(prompts)) if image_of_row is None else image_of_row
    rows, indices = [], []
    for prompt, which in zip(prompts, chosen, strict=True):
        numbers = [] if images is None else [which] if isinstance(which, int) else list(which)
        assert len(numbers) == len(prompt.image_at), f"{len(prompt.image_at)} images in the prompt, {len(numbers)} given"
        lead = sum(at == 0 for at in prompt.image_at)
        words = Words.of(prompt.ids, np.zeros(len(prompt.ids), dtype=bool), prompt.image_at, lead)
        rows.append(lay_out([words], lead, layout.image_tokens))
        indices.append(np.asarray(numbers, dtype=np.int64))
    lengths = [table.shape[1] for table, _ in rows]
    begins = [max(lengths) - length for length in lengths]
    names = [str(row) for row in range(len(rows))]
    return _batch(rows, indices, begins, max(lengths), pad_id, images=images, has_documents=any(begins), sample_names=names)


def _batch(
    rows: list[tuple[np.ndarray, np.ndarray]], indices: list[np.ndarray], begins: list[int], length: int, pad_id: int, **others: Any
) -> Batch:
    """A batch of ``rows`` as from ``lay_out``.

    Args:
        indices: which image of the batch stands at each placement, row by row.
        begins: the first column of each row.
        length: S.
        others: fields of ``Batch``.
    """
    table = np.zeros((5, len(rows), length), dtype=np.int64)  # (5, B, S)
    table[INPUT_IDS], table[LABELS] = pad_id, IGNORE
    sample_ids = np.full((len(rows), length), -1, dtype=np.int64)
    for row, ((columns, _), begin) in enumerate(zip(rows, begins, strict=True)):
        end = begin + columns.shape[1]
        table[:, row, begin:end] = columns
        sample_ids[row, begin:end] = 0
    table[INPUT_IDS][table[KINDS] == Kind.IMAGE] = pad_id
    counts = [placed.shape[1] for _, placed in rows]
    placements = np.concatenate([placed for _, placed in rows], axis=1)  # (3, M)
    columns = torch.from_numpy(table)
    return Batch(
        input_ids=columns[INPUT_IDS],
        labels=columns[LABELS],
        positions=columns[POSITIONS],
        sample_ids=torch.from_numpy(sample_ids),
        text_ids=columns[TEXT_IDS],
        kinds=columns[KINDS].to(torch.uint8),
        targets=torch.from_numpy(np.flatnonzero(table[LABELS] != IGNORE)),
        image_index=torch.from_numpy(np.concatenate(indices)),
        image_rows=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        image_starts=torch.from_numpy(placements[STARTS] + np.repeat(np.asarray(begins), counts)),
        image_text_ids=torch.from_numpy(placements[TEXTS]),
        image_sample_ids=torch.zeros(sum(counts), dtype=torch.int64),
        image_slots=torch.from_numpy(np.concatenate([np.arange(count) for count in counts])),
        **_row_facts(table[KINDS], counts),
        **others,
    )


def _row_facts(kinds: np.ndarray, placements: Sequence[int]) -> dict[str, int]:
    """``row_images``, ``row_words`` and ``leading_images`` of a ``Batch``.

    Args:
        kinds: (B, S).
        placements: images of each row.
    """
    images = (kinds == Kind.IMAGE).sum(axis=1)  # (B,) positions
    alike = placements[0] > 0 and len(set(placements)) == 1 and images.min() == images.max() > 0
    leading = alike and bool((kinds[:, : images[0]] == Kind.IMAGE).all())
    return {
        "row_images": max(placements),
        "row_words": int((kinds > Kind.IMAGE).sum(axis=1).max()),
        "leading_images": placements[0] if leading else 0,
    }


def _stack(images: list[np.ndarray], size: int) -> torch.Tensor | None:
    if not size:
        return None
    if not images:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))  # (N, 3, H, W)
