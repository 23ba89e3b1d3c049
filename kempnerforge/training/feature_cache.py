"""Features of a frozen encoder, kept on disk, so that each image is encoded once.

It saves time where the encoder is a large part of a step and images are used again: about ``2 P_v T_v / (6 P
T)`` of a step, with parameters P and tokens T of the encoder (v) and of the whole model.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.known_features import KnownFeatures
from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.distributed.world import World
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.util.entries import Entries
from kempnerforge.vlm.base import VLM

WHERE = "train.feature_cache"


class FeatureCache:
    """Outputs of ``model.vision_encoder`` by its weights and the pixels of the image.

    A stored feature is always used, also where its batch has to be encoded because of other images: the value
    does not depend on the batch. If all ranks have the features of all images of their micro-batches, the
    encoder is not called.

    Args:
        directory: may be shared by runs and processes.
        model: sharded already. Every use takes the weights as they are then, whether the optimizer, a reset,
            a checkpoint or an average wrote them.
        world: the encoder is sharded over it, so all ranks call it, or none.
        dtype: of compute; features of another dtype are stored apart.

    Raises:
        ValueError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, model: VLM, world: World, dtype: torch.dtype) -> None:
        self.directory, self.model, self.world, self.dtype = directory, model, world, dtype
        # taken here: later the modules may show gathered parameters
        self._weights = dict(model.vision_encoder.named_parameters())
        self._versions: list[int] | None = None
        self._entries: Entries | None = None
        Entries(directory, WHERE).check()

    def _open(self) -> Entries | None:
        """The features of the encoder with its current weights; None: the encoder trains."""
        if any(parameter.requires_grad for parameter in self._weights.values()):
            self._versions = self._entries = None
            return None
        versions = [local(value)._version for value in self._weights.values()]
        if self.world.sum([versions != self._versions])[0]:  # all ranks must read them together
            self._entries = Entries(self.directory / self._key(), WHERE)
            self._versions = versions
        return self._entries

    def _key(self) -> str:
        """A digest of everything that decides the features: settings, code, dtype, weights."""
        encoder = self.model.vision_encoder
        facts = f"{self.model.job.vision_encoder} {encoder.signature} {self.dtype}"
        digest = hashlib.blake2b(facts.encode(), digest_size=16)
        for module in sorted({type(module).__module__ for module in encoder.modules()}):
            source = getattr(sys.modules.get(module), "__file__", None)
            digest.update(f"{module} {source and file_fingerprint(source)}".encode())
        for name, value in sorted([*self._weights.items(), *encoder.named_buffers()]):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(name.encode())
            digest.update(whole.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def attach(self, batch: Batch) -> Batch:
        """``batch`` (on the CPU) with the known features of its images. All ranks call it for each one."""
        if self._open() is None or batch.images is None:
            return batch
        seen = [repr(part[:2]).encode() if part.alone else b"" for part in batch.image_parts] or [b""] * len(batch.images)
        keys = [
            hashlib.blake2b(image.numpy().tobytes() + part, digest_size=16).hexdigest()
            for image, part in zip(batch.images, seen, strict=True)
        ]
        found = [self._read(key) for key in keys]
        missing = sum(features is None for features in found)
        return replace(batch, known_features=KnownFeatures(keys, found, self.world.sum([missing])[0] == 0, self.dtype))

    def keep(self, batch: Batch) -> None:
        """Stores the features that a forward pass computed for a batch from ``attach``."""
        known = batch.known_features
        if known is None or known.computed is None:
            return
        computed = known.computed.to("cpu", self.dtype)
        for key, old, features in zip(known.keys, known.features, computed, strict=False):  # the blank image of an empty batch has no key
            if old is None:
                self._write(key, features)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.model.vision_encoder.num_tokens, self.model.vision_encoder.dim  # (F, E)

    def _read(self, image: str) -> Tensor | None:
        assert self._entries is not None
        found = self._entries.read(self._entry(image), math.prod(self._shape) * self.dtype.itemsize)
        return None if found is None else torch.frombuffer(bytearray(found), dtype=self.dtype).reshape(self._shape)

    def _write(self, image: str, features: Tensor) -> None:
        assert self._entries is not None and features.shape == self._shape
        self._entries.write(self._entry(image), features.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _entry(self, image: str) -> str:
        assert self._entries is not None
        return f"{self._entries.directory.name}\0{image}"
