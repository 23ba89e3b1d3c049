"""What a rank keeps for the backward pass where ranks share rows, and how long a step takes: a text model of 8 layers on one long row.

Usage: torchrun --nproc-per-node N benchmarks/shared_rows.py [LENGTH ...]
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor, nn

from kempnerforge.config import DistributedConfig, JobConfig, ModelConfig, TrainConfig
from kempnerforge.config.data import TextConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.distributed.world import start, stop
from kempnerforge.training.setup import assemble


def kept(model: nn.Module, batch: Batch) -> tuple[Tensor, int, int]:
    """The loss, the bytes that are kept besides parameters, and those of them that are the mask."""
    owned, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, tuple[int, bool]]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes(), tensor.ndim == 4 and tensor.shape[-1] >= batch.input_ids.shape[1]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch).loss
    return loss, sum(size for size, _ in found.values()), sum(size for size, is_mask in found.values() if is_mask)


def main() -> None:
    lengths = [*map(int, sys.argv[1:])] or [4096]
    world = start(DistributedConfig(context_parallel=int(os.environ.get("WORLD_SIZE", 1))))
    tokenizer = Tokenizer.train(["some words"] * 4, 300)
    for length in lengths:
        sizes = ModelConfig(dim=256, n_layers=8, n_heads=8, n_kv_heads=2, max_seq_len=length)
        train = TrainConfig(max_steps=1, seq_len=length, mixed_precision="fp32")
        it = assemble(JobConfig(model=sizes, data=TextConfig(path="unread.txt"), train=train), tokenizer, data=False)
        encoder = it.data.encoder(it.stages[0])
        text = Sample("a long text", (), (Text("", tuple(11 + k % 100 for k in range(length + 1))),))
        batch = collate([encoder.encode(text, seed=0)], tokenizer.pad_id, None)
        it.model.row_ranks = world.context
        for _ in range(2):
            begin = time.perf_counter()
            loss, size, mask = kept(it.model, batch)
            loss.backward()
            seconds = time.perf_counter() - begin
        if world.is_main:
            print(
                f"{world.size} ranks, {length} positions: {size / 2**20:.1f} MiB kept, {mask / 2**20:.1f} of them the mask; {seconds:.1f} s"
            )
    stop()


if __name__ == "__main__":
    main()
