"""Samples -> token rows with labels -> batches.

One sample is one row: the images that its texts share, then the texts, which do not see each other
(multi-annotated images: Deitke et al. 2024, "Molmo and PixMo", section 3)::

    token      <image>*P  BOS what colour ? \\n  red  EOS   BOS what shape ? \\n circle EOS
    text_id        0       1   1     1    1  1   1    1     2 ...
    position     0..P-1    P  P+1 ...                       P ...
    label          -       -   -     -    -  red EOS  -     - ...

Images are in front, unless the texts say where. Prompt "is <image> like <image> ?", answer "no <image> yes",
P = 2::

    token      BOS is <image>*2 like <image>*2  ? \\n no <image>*2 yes EOS
    text_id     1   1   1  1     1     1  1     1  1  1   1   1    1   1
    position    0   1   2  3     4     5  6     7  8  9  10  11   12  13
    label       -   -   -  -     -     -  -     - no  -   - yes  EOS   -

The rules of the placeholder (``data.image_placeholder``; "<image>" here):

* A rendered prompt and a rendered answer, templates and all, are split at it, and the pieces are tokenised
  each alone. The k-th of a text is image k of its sample.
* If any text of a sample has one, each must have as many as there are images. If none has, all images are in
  front.
* Images that lead every text of a sample, before any of its tokens, are in front once, shared by the texts,
  and BOS follows them. The others are inside each text. An image that is in several texts is encoded once.
* A position's label is the token right after it, if that is trained; so the last position of an image may
  have one, and none predicts an image.
* Where an image takes no position (cross-attention), nothing is in its place and the next token is the first
  to see it. It may therefore not be right before a trained token, which an earlier position predicts. With
  the placeholder among ``model.new_tokens`` it may: that token is at each written placeholder then, leading
  ones as well, untrained.
* In a job without images the placeholders vanish with them.

An image may be several views (``data.images.fit = "tiles"``), each of P positions, with tokens that say which
follows. They come in the place of the one, and those tokens are read, not trained. Nothing is ever cut out of
them: they are all there, or the sample is not used::

    token      <|global_image|> <image>*P <row_1_col_1> <image>*P <row_1_col_2> <image>*P  BOS what colour ? \\n  red  EOS

B rows, S positions, N images, M placements, T trained positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from kempnerforge.config.data import DataConfig
from kempnerforge.config.template import WITH_SYSTEM
from kempnerforge.data.batching.batch import Part
from kempnerforge.data.images.cache import ImageCache
from kempnerforge.data.images.views import Views
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Text
from kempnerforge.data.text.asking import Asking
from kempnerforge.data.text.interleave import TEXT_IDS, VIEW, ImageBlock, Layout, Prompt, TextTokens, lay_out
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.data.text.words import TextEncoder
from kempnerforge.util.errors import InputError


class Plan(NamedTuple):
    """What a sample's row is made of.

    Attributes:
        words: all texts, also those that do not fit.
        shared: images in front, once for all texts.
        blocks: what each image is in the row.
    """

    words: list[TextTokens]
    shared: int
    blocks: list[ImageBlock]


@dataclass
class Encoded:
    """One row.

    Attributes:
        table: (5, S) int64: input_ids, labels, positions, text_ids, kinds, as in ``Batch``. Image positions
            hold 0 for an id.
        images: n arrays of (H, W, 3) uint8: the views of the sample's images.
        placements: (3, M) int64: number of the view, first position, text; in the order of the row.
        image_size: H and W; 0: no images in this job.
        left_out: texts of the sample that did not fit.
        skipped: (sample id, reason) of unusable samples that this one replaces.
        image_parts: what of each view is in the row; empty: all.
        codes: as in ``Layout``.
    """

    id: str
    table: np.ndarray
    images: list[np.ndarray]
    placements: np.ndarray
    image_size: int
    left_out: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    part: int = 0
    image_parts: tuple[Part, ...] = ()
    codes: range = range(0)

    @property
    def num_texts(self) -> int:
        return int(self.table[TEXT_IDS, -1])


class Encoder:
    """Encodes samples for one model.

    Args:
        seed: of choices among texts that do not all fit, and of what changes images in training.
        asking: how the texts of the training placed their images; None: as is usual with the source.

    Raises:
        ValueError: ``data.images`` does not go with the encoder's image size, or its tokens are not in the
            tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, data_cfg: DataConfig, layout: Layout, seed: int, asking: Asking | None = None) -> None:
        self.asking = asking or Asking.usual(data_cfg.sections()[0])
        self.tokenizer, self.cfg, self.layout, self.seed = tokenizer, data_cfg, layout, seed
        cache = ImageCache(data_cfg.image_cache_mib)
        sections = data_cfg.sections()
        self.texts = [TextEncoder(tokenizer, section, layout) for section in sections]
        self.images = [Views(section.images, layout, tokenizer, cache) for section in sections]
        side, in_parts = layout.token_side, any(section.images.in_parts for section in sections)
        self._whole = (Part(side, side, alone=False),) if in_parts and layout.image_size else ()

    @property
    def marker_ids(self) -> frozenset[int]:
        """Tokens that are before views."""
        return frozenset().union(*(views.marker_ids for views in self.images))

    def encode(self, sample: Sample, seed: int, *, training: bool = False) -> Encoded:
        """One row from one sample. Nothing is cut: a text is there in full or not at all, and so are the
        views of an image.

        Args:
            seed: decides which texts are taken when they do not all fit, and what changes the images; the
                same seed does the same.
            training: ``data.images.augment`` applies.

        Raises:
            SampleError: no texts, an empty answer, a text that can never fit, text that is not Unicode, an
                unusable image, placeholders that do not match the images, an image that the token after it
                cannot see.
        """
        views = self.images[sample.part]
        images = self._images_of(sample)
        try:
            sample = self._as_asked(sample)
            words, shared, blocks = self._plan(sample, images)
            words, left_out = self._fit(words, sample.texts, shared, blocks, seed)
            pixels: list[np.ndarray] = []
            for k, image in enumerate(images):
                rng = np.random.default_rng((self.seed, seed, 1 + k)) if training and views.cfg.augment.enabled else None
                pixels += views.load(image, blocks[k].views, rng)
        except SampleError as error:
            raise SampleError(f"sample {sample.id}: {error}") from None
        table, placements = lay_out(words, shared, blocks)
        parts = tuple(part for k, block in enumerate(blocks) for part in block.parts_of(k) or self._whole * len(block.starts))
        size, codes = self.layout.image_size, self.layout.codes
        return Encoded(sample.id, table, pixels, placements, size, left_out, part=sample.part, image_parts=parts, codes=codes)

    def measure(self, sample: Sample) -> tuple[int, int]:
        """The size of a sample's row without its pixels: of images at most the headers are read.

        Returns:
            Positions, and views to encode. If not all texts fit, an upper bound of the positions. (0, 0) for
            a sample that cannot be used, as far as that shows without pixels.
        """
        try:
            sample = self._as_asked(sample)
            words, shared, blocks = self._plan(sample, self._images_of(sample))
            fitting, left_out = self._fit(words, sample.texts, shared, blocks, 0)
        except SampleError:
            return 0, 0
        front, inside = _positions(blocks[:shared]), _positions(blocks[shared:])
        positions = front + sum(text.length + inside for text in fitting)
        if left_out:
            room = max(self.layout.max_text_len, *(text.length for text in words))
            positions = min(self.layout.seq_len, front + room + inside * len(words))
        return positions, sum(block.views for block in blocks)

    def views(self, sample: Sample) -> list[np.ndarray]:
        """All views of a sample's images, (H, W, 3) uint8 each, as evaluation sees them.

        Raises:
            ImageError: an image cannot be used.
        """
        views = self.images[sample.part]
        return [view for image in self._images_of(sample) for view in views.load(image)]

    def encode_prompt(self, prompt: str | Text, num_images: int, part: int = 0) -> Prompt:
        """As ``TextEncoder.encode_prompt``, with the templates of part ``part``. Each image is one view."""
        return self.texts[part].encode_prompt(prompt, num_images)

    def encode_question(self, prompt: str | Text, images: Sequence[ImageSource], part: int = 0) -> Prompt:
        """As ``TextEncoder.encode_prompt``, with the places of all views of ``images``, which are not
        decoded.

        Raises:
            ValueError: the prompt cannot be asked, or an image cannot be used, as far as that shows without
                pixels.
        """
        asked = self.encode_prompt(prompt, len(images), part)
        return asked._replace(blocks=tuple(self.images[part].blocks(images))) if self.layout.image_size else asked

    def ask(self, prompt: str, images: Sequence[ImageSource], history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """The row of a question of a user, ``asked``. All tools that ask a model go through here;
        ``encode_question`` is for questions of the data themselves.

        Raises:
            ValueError: as ``encode_question`` and ``asked``.
        """
        return self.encode_question(self.asked(prompt, len(images), history), images)

    def asked(self, prompt: str, num_images: int, history: Sequence[tuple[str, str]] = ()) -> Text:
        """The conversation up to a question of a user, without its answer: if it does not place its images,
        they are placed as in training.

        Args:
            history: (prompt, answer) of the turns before. The images are the whole conversation's.

        Raises:
            ValueError: the template takes no earlier turns.
        """
        texts = self.texts[0]
        if history and not texts.has_turns:
            raise InputError("the template of this model writes one turn and takes no earlier ones")
        shown = 0 if self.count_placeholders("") else num_images  # the template places them itself
        asking = self.asking if texts.cfg.template in WITH_SYSTEM else replace(self.asking, system="")
        return asking.text(prompt, shown, texts.cfg.image_placeholder, history)

    def count_placeholders(self, prompt: str | Text) -> int:
        """As ``TextEncoder.count_placeholders``, for the first part of a mixture."""
        return self.texts[0].count_placeholders(prompt)

    def end_id(self) -> int:
        """As ``TextEncoder.end_id``, for the first part of a mixture."""
        return self.texts[0].end_id

    def stops(self, part: int = 0) -> frozenset[int]:
        """As ``TextEncoder.stops``."""
        return self.texts[part].stops

    def _as_asked(self, sample: Sample) -> Sample:
        texts = self.texts[sample.part]
        if not texts.template.by_turn:
            return sample
        return replace(sample, texts=tuple(part for text in sample.texts for part in texts.as_asked(text)))

    def _images_of(self, sample: Sample) -> tuple[ImageSource, ...]:
        return sample.images if self.layout.image_size else ()

    def _plan(self, sample: Sample, images: Sequence[ImageSource]) -> Plan:
        if not sample.texts:
            raise SampleError("has no texts")
        words = [self.texts[sample.part].encode(text) for text in sample.texts]
        shared = self._shared(words, len(images), sample.part)
        return Plan(words, shared, self.images[sample.part].blocks(images))

    def _shared(self, words: list[TextTokens], images: int, part: int) -> int:
        """How many of the sample's images are in front, once."""
        if not any(text.image_at for text in words):
            return images
        wrong = next((len(text.image_at) for text in words if len(text.image_at) != images), None)
        if wrong is not None:
            name = self.texts[part].cfg.image_placeholder
            raise SampleError(f"{wrong} of {name!r} in a text and {images} images: must be as many in each text")
        return min(text.lead for text in words)

    def _fit(
        self, words: list[TextTokens], texts: Sequence[Text], shared: int, blocks: list[ImageBlock], seed: int
    ) -> tuple[list[TextTokens], int]:
        """All texts if they fit, else a random subset that does, in order; and how many are left out."""
        max_len, seq_len = self.layout.max_text_len, self.layout.seq_len
        lengths = [text.length for text in words]
        front, inside = _positions(blocks[:shared]), _positions(blocks[shared:])  # positions of images, the latter in each text
        for length, text in zip(lengths, texts, strict=True):
            if length > max_len and not isinstance(text.answer, tuple):
                raise SampleError(f"a text of {length} tokens, max_text_len = {max_len}")
            if front + inside + length > seq_len:
                raise SampleError(f"{_counted(blocks)} and {length} text tokens, train.seq_len = {seq_len}")
        tokens, positions = max(max_len, max(lengths)), seq_len - front
        if sum(lengths) <= tokens and sum(lengths) + inside * len(words) <= positions:
            return words, 0
        taken = []
        for k in np.random.default_rng((self.seed, seed)).permutation(len(words)):
            if lengths[k] <= tokens and lengths[k] + inside <= positions:
                taken.append(int(k))
                tokens, positions = tokens - lengths[k], positions - lengths[k] - inside
        return [words[k] for k in sorted(taken)], len(words) - len(taken)


def _positions(blocks: Sequence[ImageBlock]) -> int:
    return sum(len(block.ids) for block in blocks)


def _counted(blocks: Sequence[ImageBlock]) -> str:
    """What images take of a row, in words."""
    image = sum(block.ids.count(VIEW) for block in blocks)
    views, others = sum(block.views for block in blocks), _positions(blocks) - image
    return f"{image} image" + (f" (of {views} views), {others} marker" if others or views > len(blocks) else "")
