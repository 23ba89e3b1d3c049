"""Digests of the images, questions and ids of samples, by which two sources are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kempnerforge.data.images.decode import contents
from kempnerforge.data.sample import ImageSource, Sample
from kempnerforge.util.digest import content_digest

KINDS = {"image": "images", "question": "questions about the same image, or none", "id": "ids"}
"""What two samples may share, in words."""


class SampleDigests(NamedTuple):
    """Digests of 16 bytes, and the samples that they are of: (m,) each."""

    digests: np.ndarray
    owners: np.ndarray


NO_DIGESTS = SampleDigests(np.array([], dtype="S16"), np.array([], dtype=np.int64))


def joined(parts: Sequence[SampleDigests]) -> SampleDigests:
    """All of ``parts``."""
    return SampleDigests(*(np.concatenate(columns) for columns in zip(NO_DIGESTS, *parts, strict=True)))


class Traces:
    """Collects the marks of samples.

    Args:
        size: of the source. An id that is a number up to it is a count, and no mark.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: dict[str, list[tuple[bytes, int]]] = {kind: [] for kind in KINDS}

    def add(self, index: int, sample: Sample, images: Sequence[bytes]) -> None:
        """``images``: digests of the contents of its images, those that it shows among them; none where they are not
        looked at.
        """
        self._found["image"] += [(image, index) for image in images]
        known = len(images) == len(sample.images) + len(sample.shows)
        asked = {prompt for text in sample.texts for prompt, _ in text.turns if prompt.strip() and known}
        self._found["question"] += [(content_digest(*images, prompt), index) for prompt in sorted(asked)]
        if sample.key and not (sample.key.isdecimal() and int(sample.key) <= self._size):
            self._found["id"].append((content_digest(sample.key), index))

    def marks(self) -> dict[str, SampleDigests]:
        """By kind."""
        return {
            kind: SampleDigests(np.array([mark for mark, _ in found], dtype="S16"), np.array([owner for _, owner in found], dtype=np.int64))
            for kind, found in self._found.items()
        }


def image_digest(image: ImageSource) -> bytes:
    """A digest of 16 bytes of an encoded image; raises ImageError if its file cannot be read."""
    return hashlib.blake2b(image if isinstance(image, bytes) else contents(image), digest_size=16).digest()


def shared(first: SampleDigests, second: SampleDigests) -> list[tuple[int, int]]:
    """(sample of ``first``, sample of ``second``) for each sample of ``second`` that has a mark of ``first``,
    with the first one that has it.
    """
    if not len(first.digests) or not len(second.digests):
        return []
    known, firsts = np.unique(first.digests, return_index=True)
    at = np.minimum(np.searchsorted(known, second.digests), len(known) - 1)
    hit = known[at] == second.digests
    pairs: dict[int, int] = {}
    for owner, other in zip(second.owners[hit].tolist(), first.owners[firsts[at[hit]]].tolist(), strict=True):
        pairs.setdefault(owner, other)
    return sorted((other, owner) for owner, other in pairs.items())
