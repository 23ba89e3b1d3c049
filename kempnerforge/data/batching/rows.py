"""Samples of a source as encoded rows: the unit that the loader's workers make."""

from __future__ import annotations

import sys
from typing import cast

import numpy as np
from torch.utils.data import Dataset

from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.pack import Pack, PackedRow, Sizes, join
from kempnerforge.data.sample import SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.util.errors import InputError, PluginError

MAX_TRIES = 20
"""Candidates in place of one unusable sample before the data are judged unusable."""


class DataError(InputError):
    """The data cannot be used at all."""


class EncodedSamples(Dataset["Encoded | PackedRow | DataError"]):
    """Encoded samples by ``(index, step)``, and rows of several by a tuple of those. An unusable sample is
    replaced by another one, the same one on every run.

    Args:
        seed: of replacements.

    Attributes:
        sizes: of the samples, for the sampler too.
    """

    def __init__(self, source: Source, encoder: Encoder, seed: int) -> None:
        self.source, self.encoder, self.seed = source, encoder, seed
        self.sizes = Sizes(source, encoder)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int] | Pack) -> Encoded | PackedRow | DataError:
        """The row for ``key``, or what is wrong when ``MAX_TRIES`` candidates in place of a sample were
        unusable, too, or a plugin's class gives no sample. The error is returned: raised in a worker, it would
        reach the user inside a traceback.
        """
        try:
            return self._row(cast(Pack, key)) if isinstance(key[0], tuple) else self._one(*cast(tuple[int, int], key))
        except PluginError as error:
            return DataError(str(error))

    def _one(self, index: int, step: int) -> Encoded | DataError:
        skipped: list[tuple[str, str]] = []
        candidates: list[int] | None = None
        candidate = index
        while True:
            encoded = self._encode(candidate, index, step, skipped)
            if encoded is not None:
                encoded.skipped = skipped
                return encoded
            if candidates is None:
                candidates = self._others(index, step)
            if len(skipped) > len(candidates):
                return _unusable(skipped)
            candidate = candidates[len(skipped) - 1]

    def _row(self, key: Pack) -> PackedRow | DataError:
        """The samples of ``key`` in one row. In place of one that cannot be used comes one that fits into
        what is free, or nothing.
        """
        skipped: list[tuple[str, str]] = []
        room = _Room(self.encoder.layout.seq_len, self.encoder.cfg.max_images_per_row or sys.maxsize)
        found = [self._fit(index, index, step, room, skipped) for index, step in key]
        for at, (index, step) in enumerate(key):
            if found[at] is None:
                found[at] = self._stand_in(index, step, room, skipped)
        encoded = [e for e in found if e is not None]
        if not encoded:
            return _unusable(skipped)
        row = join(encoded)
        row.skipped = skipped
        return row

    def _stand_in(self, index: int, step: int, room: _Room, skipped: list[tuple[str, str]]) -> Encoded | None:
        for candidate in self._others(index, step):
            positions, views = self.sizes.measure(candidate)
            if not positions or room.has(positions, views):  # one that is seen to be unusable is counted
                encoded = self._fit(candidate, index, step, room, skipped)
                if encoded is not None:
                    return encoded
        return None

    def _fit(self, candidate: int, index: int, step: int, room: _Room, skipped: list[tuple[str, str]]) -> Encoded | None:
        """``candidate`` if it can be used and ``room`` has place for it, which it takes then."""
        encoded = self._encode(candidate, index, step, skipped)
        if encoded is None:
            return None
        positions, views = encoded.table.shape[1], len(encoded.images)
        if not room.has(positions, views):
            left = f"{room.positions}" if room.positions < positions else f"{room.views} (data.max_images_per_row)"
            what = f"{positions} positions" if room.positions < positions else f"{views} images"
            skipped.append((self._name(candidate), f"sample {encoded.id}: {what}, room in its row for {left}"))
            return None
        room.positions -= positions
        room.views -= views
        return encoded

    def _encode(self, candidate: int, index: int, step: int, skipped: list[tuple[str, str]]) -> Encoded | None:
        """Sample ``candidate`` in the place of ``index``; None, and a line more in ``skipped``, if it cannot
        be used.
        """
        try:
            return self.encoder.encode(self.source[candidate], step * 1_000_003 + index, training=True)
        except SampleError as error:
            skipped.append((self._name(candidate), str(error)))
            return None

    def _name(self, index: int) -> str:
        return f"{self.source.cfg.source}/{self.source.split}[{index}]"

    def _others(self, index: int, step: int) -> list[int]:
        """``MAX_TRIES`` samples, none of them ``index`` and none twice: each is counted as bad once at most."""
        peers = self.source.peers(index)
        others = len(peers) - 1
        drawn = np.random.default_rng((self.seed, step, index)).choice(others, min(MAX_TRIES, others), replace=False) if others else []
        return [peers.start + int(k) + (k >= index - peers.start) for k in drawn]


class _Room:
    """The free positions and views of a row."""

    def __init__(self, positions: int, views: int) -> None:
        self.positions, self.views = positions, views

    def has(self, positions: int, views: int) -> bool:
        return positions <= self.positions and views <= self.views


def _unusable(skipped: list[tuple[str, str]]) -> DataError:
    reasons = "; ".join(reason for _, reason in skipped[-3:])
    return DataError(f"data: {len(skipped)} samples in a row cannot be used, the last because: {reasons}")


def collate_rows(rows: list[Encoded | PackedRow | DataError], pad_id: int, pad_to: int | None) -> Batch | DataError:
    """A batch of ``rows``, or the first error among them."""
    error = next((row for row in rows if isinstance(row, DataError)), None)
    return error or collate([row for row in rows if not isinstance(row, DataError)], pad_id, pad_to)
