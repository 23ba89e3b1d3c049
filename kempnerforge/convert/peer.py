"""The same model in a plain loop around transformers, for ``kempnerforge bench --against transformers``."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config import Stage
from kempnerforge.convert.commands import class_of, export_model, write_run
from kempnerforge.convert.verify import class_arguments, in_rows, load_class
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import SampleError
from kempnerforge.data.text.encode import Encoded
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError


class PeerStep(NamedTuple):
    """A step of the plain loop: its time, data included, and what it was made of."""

    seconds: float
    loss: float
    samples: int
    tokens: int


@dataclass
class TransformersLoop:
    """What a script around a class of transformers does: samples in random order, a batch padded to its
    longest row or to ``pad_to``, autocast, the loss of the class's logits, clipping, fused AdamW. Images are
    read, encoded and collated in the loop, by the code that ours uses; of several texts of a sample the first
    is trained.

    Args:
        assembly: with initial weights, on the CPU.
        stage: whose data and batch size it has.
        pad_to: positions of each row; 0: as many as the longest has.

    Raises:
        InputError: no class of transformers is this model, or it gives other logits; or the stage freezes
            something, and the plain loop trains all.
    """

    assembly: Assembly
    stage: Stage
    device: torch.device
    dtype: torch.dtype
    pad_to: int = 0

    def __post_init__(self) -> None:
        if self.stage.freeze:
            raise InputError("--against transformers: the plain loop trains all parameters; set vlm.freeze = []")
        if in_rows(self.assembly) is not None:
            raise InputError("--against transformers: data.images.rows: its class needs the sizes of images, which a batch does not have")
        self.name = class_of(self.assembly).name
        with tempfile.TemporaryDirectory() as folder:
            run, out = Path(folder, "run"), Path(folder, "export")
            run.mkdir()
            write_run(run, run, self.assembly, {})
            export_model(run, out)  # and compares the logits
            self.model = load_class(out, self.name).to(self.device).train()
        self._family = VLM_FAMILIES.get(self.model.config.model_type)
        self._source, self._encoder = self.assembly.data.sources[self.stage.index], self.assembly.data.encoder(self.stage)
        self._rng = np.random.default_rng(self.assembly.job.train.seed)
        cfg = self.stage.optimizer
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, fused=True)

    def step(self) -> PeerStep:
        """Trains one batch."""
        begin = time.perf_counter()
        batch = self.batch().to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.assembly.job.train.grad_clip_norm or 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = loss.item()  # waits for the device
        return PeerStep(time.perf_counter() - begin, value, len(batch.input_ids), batch.useful_tokens)

    def batch(self) -> Batch:
        """The next samples, one text each, padded on the right."""
        rows: list[Encoded] = []
        while len(rows) < self.stage.train.step_rows:
            try:
                sample = self._source[int(self._rng.integers(len(self._source)))]
                rows.append(self._encoder.encode(replace(sample, texts=sample.texts[:1]), 0))
            except SampleError:
                continue
        longest = max(row.table.shape[1] for row in rows)
        if 0 < self.pad_to < longest:
            raise InputError(
                f"--pad-to = {self.pad_to}: a row has {longest} positions; set at least the length of the longest, or leave it out"
            )
        return collate(rows, self._encoder.tokenizer.pad_id, self.pad_to or None)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the trained tokens, by the class's logits."""
        config = self.model.config
        image_id = config.image_token_id if batch.images is not None else None
        given = class_arguments(self.assembly.model, batch, image_id, batch.targets.new_zeros(batch.input_ids.shape[1]), spread=False)
        given["attention_mask"] = (batch.kinds != Kind.PAD).long()
        given = given if self._family is None else self._family.class_inputs(given, config)
        logits = self.model(**given, use_cache=False).logits  # (B, S, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE)
