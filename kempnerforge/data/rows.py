"""Samples of a source as encoded rows: the unit that the loader's workers make."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from kempnerforge.data.batch import Batch
from kempnerforge.data.collate import collate
from kempnerforge.data.encode import Encoded, Encoder
from kempnerforge.data.sample import SampleError, Source

MAX_TRIES = 20
"""Candidates in place of one unusable sample before the data are judged unusable."""


class DataError(ValueError):
    """The data cannot be used at all."""


class EncodedSamples(Dataset["Encoded | DataError"]):
    """Encoded samples by ``(index, step)``. An unusable sample is replaced by another one, the same one on every run.

    Args:
        source: the samples.
        encoder: makes rows of them.
        seed: of replacements.
    """

    def __init__(self, source: Source, encoder: Encoder, seed: int) -> None:
        self.source, self.encoder, self.seed = source, encoder, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Encoded | DataError:
        """The row for ``(index, step)``, or what is wrong when ``MAX_TRIES`` candidates in its place were unusable, too. The error is
        returned: raised in a worker, it would reach the user inside a traceback.
        """
        index, step = key
        skipped: list[tuple[str, str]] = []
        candidates: list[int] | None = None
        candidate = index
        while True:
            try:
                encoded = self.encoder.encode(self.source[candidate], step * 1_000_003 + index)
                encoded.skipped = skipped
                return encoded
            except SampleError as error:
                skipped.append((f"{self.source.cfg.source}/{self.source.split}[{candidate}]", str(error)))
            if candidates is None:
                candidates = self._others(index, step)
            if len(skipped) > len(candidates):
                reasons = "; ".join(reason for _, reason in skipped[-3:])
                return DataError(f"data: {len(skipped)} samples in a row cannot be used, the last because: {reasons}")
            candidate = candidates[len(skipped) - 1]

    def _others(self, index: int, step: int) -> list[int]:
        """``MAX_TRIES`` samples, none of them ``index`` and none twice: each is counted as bad once at most."""
        others = len(self) - 1
        drawn = np.random.default_rng((self.seed, step, index)).choice(others, min(MAX_TRIES, others), replace=False) if others else []
        return [int(k) + (k >= index) for k in drawn]


def collate_rows(rows: list[Encoded | DataError], pad_id: int, pad_to: int | None) -> Batch | DataError:
    """A batch of ``rows``, or the first error among them."""
    error = next((row for row in rows if isinstance(row, DataError)), None)
    return error or collate([row for row in rows if isinstance(row, Encoded)], pad_id, pad_to)
