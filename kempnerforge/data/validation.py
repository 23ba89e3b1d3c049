"""A validation split that is cut from the training samples, of any source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kempnerforge.data.batching.order import Order, drawn
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError

if TYPE_CHECKING:
    from kempnerforge.data.sources.keys import Ignoring
    from kempnerforge.data.text.tokenizer import Tokenizer


class Cut(Source):
    """The training samples that ``data.validation`` leaves (split "train"), or those that it holds out
    ("test").

    Which ones depends on their number and the share alone, so stages that read the same samples hold out the
    same ones.

    Args:
        inner: all training samples.

    Raises:
        InputError: one of the two parts would be empty.
    """

    def __init__(self, inner: Source, split: str) -> None:
        super().__init__(inner.cfg, split)
        share, count = inner.cfg.validation, len(inner)
        held_out = round(share * count)
        if not 0 < held_out < count:
            raise InputError(f"data.validation = {share}: of {count} training samples it holds out {held_out}")
        chosen = np.zeros(count, dtype=bool)
        chosen[drawn(count, held_out, 0)] = True
        self.inner, self.from_files = inner, inner.from_files
        self._numbers = np.flatnonzero(chosen if split == "test" else ~chosen)  # (len(self),) numbers in ``inner``

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.inner[self._at(index)]

    def _at(self, index: int) -> int:
        return int(self._numbers[index])

    def texts(self, index: int) -> tuple[Text, ...]:
        return self.inner.texts(self._at(index))

    def length(self, index: int) -> int:
        return self.inner.length(self._at(index))

    def num_images(self, index: int) -> int:
        return self.inner.num_images(self._at(index))

    def part(self, index: int) -> int:
        return self.inner.part(self._at(index))

    def asks(self, index: int) -> bool:
        return self.inner.asks(self._at(index))

    def peers(self, index: int) -> range:
        all_peers = self.inner.peers(self._at(index))
        begin, end = np.searchsorted(self._numbers, [all_peers.start, all_peers.stop])
        return range(int(begin), int(end))

    def order(self, seed: int) -> Order:
        return CutOrder(self.inner.order(seed), self._numbers)

    def tokenised(self, tokenizer: Tokenizer, seq_len: int) -> Source:
        source = self.inner.tokenised(tokenizer, seq_len)
        return self if source is self.inner else Cut(source, self.split)

    def fingerprint(self) -> str:
        return digest(self.inner.fingerprint(), self.cfg.validation, self.split)

    def shards(self) -> Sequence[str]:
        return self.inner.shards()

    def ignoring(self) -> Iterator[Ignoring]:
        return self.inner.ignoring()

    def corpus(self) -> Iterator[str]:
        """Of all training samples: a tokenizer that is trained is the same with and without a validation
        split.
        """
        return self.inner.corpus()


class CutOrder(Order):
    """The stream of another order; in place of a sample that is not in ``numbers`` comes the next one that
    is.
    """

    def __init__(self, inner: Order, numbers: np.ndarray) -> None:
        self.inner, self.numbers = inner, numbers
        self.window, self.phase_steps = inner.window, inner.phase_steps

    def indices(self, begin: int, end: int) -> np.ndarray:
        found = np.searchsorted(self.numbers, self.inner.indices(begin, end))
        return np.minimum(found, len(self.numbers) - 1)

    def stretch(self, position: int) -> tuple[int, int]:
        return self.inner.stretch(position)

    def at(self, step: int, position: int) -> Order:
        return CutOrder(self.inner.at(step, position), self.numbers)
