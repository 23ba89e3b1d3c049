"""Short digests of values."""

from __future__ import annotations

import hashlib


def digest(*parts: object) -> str:
    """16 hex digits that depend on all ``parts``."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def content_digest(*parts: object) -> bytes:
    """A digest of 16 bytes of ``parts``."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
