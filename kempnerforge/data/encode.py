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

import numpy as np

from kempnerforge.config.data import DataConfig
from kempnerforge.data.images import ImageCache
from kempnerforge.data.interleave import (
    TEXT_IDS,
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
        self.texts = [TextEncoder(tokenizer, section, layout) for section in data_cfg.sections()]
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
            words = [self.texts[sample.part].encode(text) for text in sample.texts]
            shared = self._shared(words, len(images), sample.part)
            words, left_out = self._fit(words, sample.texts, shared, len(images), seed)
            pixels = [self._image_cache.load(image, self.layout.image_size) for image in images]
        except SampleError as error:
            raise SampleError(f"sample {sample.id}: {error}") from None
        table, placements = lay_out(words, shared, self.layout.image_tokens)
        return Encoded(sample.id, table, pixels, placements, self.layout.image_size, left_out)

    def encode_prompt(self, prompt: str, num_images: int, part: int = 0) -> Prompt:
        """As ``TextEncoder.encode_prompt``, with the templates of part ``part``."""
        return self.texts[part].encode_prompt(prompt, num_images)

    def count_placeholders(self, prompt: str, part: int = 0) -> int:
        """As ``TextEncoder.count_placeholders``."""
        return self.texts[part].count_placeholders(prompt)

    def _shared(self, words: list[Words], images: int, part: int) -> int:
        """How many of the sample's images stand in front, once."""
        if not any(text.image_at for text in words):
            return images
        wrong = next((len(text.image_at) for text in words if len(text.image_at) != images), None)
        if wrong is not None:
            name = self.texts[part].cfg.image_placeholder
            raise SampleError(f"{wrong} of {name!r} in a text and {images} images: must be as many in each text")
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
