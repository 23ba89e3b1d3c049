"""What is known of a batch's images before the encoder sees them. N images, F features of one, E their width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kempnerforge.model.transfer import moved


@dataclass
class KnownFeatures:
    """Features that an earlier pass of the (frozen) encoder has given.

    Attributes:
        features: (F, E) of each image; None where they are not known.
        complete: on all ranks they are known of all images: the encoder is not called.
        computed: (N, F, E) what the encoder gave in this pass; None until it was called.
    """

    keys: list[str]
    features: list[Tensor | None]
    complete: bool
    dtype: torch.dtype
    computed: Tensor | None = None

    def all(self, num_tokens: int, dim: int, device: torch.device) -> Tensor:
        """(N, F, E) of images whose features are all known; without images zeros, for one blank image."""
        known = [features for features in self.features if features is not None]
        assert len(known) == len(self.keys), "not all features are known"
        return moved(torch.stack(known) if known else torch.zeros(1, num_tokens, dim, dtype=self.dtype), device)

    def merge(self, computed: Tensor) -> Tensor:
        """``computed`` (N, F, E), with what was known before in its place: the value of an image never
        depends on its neighbours in a batch.
        """
        self.computed = computed.detach()
        if not any(features is not None for features in self.features):
            return computed
        rows = zip(self.features, computed, strict=False)  # one computed row without a key is the blank image of an empty batch
        return torch.stack([new if old is None else old.to(new.device, new.dtype) for old, new in rows])
