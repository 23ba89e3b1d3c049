"""What the batching modes make of captions and questions: how much of a batch is no padding, and useful tokens a second.

Data: captions with lengths of two kinds (log-normal; mean 13 as in COCO, and mean 25 with a heavy tail as in alt texts), each with one image;
easy-VQA with each question a sample of its own; with ``--stamps DIR`` the captions of the Tux Paint stamps in their real lengths. A tokenizer is
trained on each. The model is small: what counts is the ratio to "pad", which pads each text to 512 tokens.

A step is forward and backward of one micro-batch; batches are made ahead, so images are not decoded within it. All modes take their steps in turns
in one process; times are CPU time, medians, with one thread: run it on a quiet machine with OMP_NUM_THREADS=1. Then what packing costs before
the first batch, and what a late resume costs.

Usage: OMP_NUM_THREADS=1 python benchmarks/packing.py [--steps 5] [--arch joint_decoder] [--stamps DIR]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Iterator
from itertools import islice

from kempnerforge.util.process import tune_memory

tune_memory()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from kempnerforge.config import JobConfig, ModelConfig, TrainConfig, VLMConfig, registry  # noqa: E402
from kempnerforge.config.adapter import MLPAdapterConfig  # noqa: E402
from kempnerforge.config.data import DataConfig, EasyVQAConfig, TextConfig  # noqa: E402
from kempnerforge.config.vision import ViTConfig  # noqa: E402
from kempnerforge.data import Batch, Encoder, Sample, Source, Text, Tokenizer, build_loader  # noqa: E402
from kempnerforge.data.batching.pack import PackSampler, Sizes, knapsack  # noqa: E402
from kempnerforge.data.sources.build import build_source  # noqa: E402
from kempnerforge.data.text.interleave import Layout  # noqa: E402
from kempnerforge.distributed import world as worlds  # noqa: E402
from kempnerforge.distributed.fsdp import prepare  # noqa: E402
from kempnerforge.distributed.world import compute_dtype  # noqa: E402
from kempnerforge.training.setup import assemble  # noqa: E402
from kempnerforge.vlm.base import VLM  # noqa: E402

SEQ_LEN, TEXT_LEN, SIZE = 2048, 512, 64
ROWS = {"pad": 16, "group": 32, "group by positions": 32, "pack": 4}
"""Of a micro-batch."""
MODES = {mode: DataConfig(batching=mode) for mode in ("pad", "group", "pack")}
MODES["group by positions"] = DataConfig(batching="group", group_by="positions")
SAMPLES = 4096


class Listed(Source):
    """Samples of a list."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__(DataConfig(source="listed"), "train")
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def captions(mean: float, sigma: float) -> Source:
    """Captions of log-normal length; the images are 64 noise pictures of the encoder's size."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    words = list("abcdefghijklmnopqrstuvwxyz")  # each becomes one token
    lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, SAMPLES).clip(3, TEXT_LEN - 8).astype(int)
    texts = [" ".join(rng.choice(words, length)) for length in lengths]
    return Listed([Sample(f"{k}", (pictures[k % 64],), (Text("", text),)) for k, text in enumerate(texts)])


def questions() -> Source:
    """easy-VQA, one question a sample."""
    source = build_source(EasyVQAConfig(), "train")
    assert source is not None
    found = [Sample(f"{s.id}/{k}", s.images, (text,)) for s in map(source.__getitem__, range(400)) for k, text in enumerate(s.texts)]
    return Listed(found)


def stamps(path: str) -> Source:
    """The stamps with their English captions."""
    source = build_source(registry.data_configs.get("stamps")(path=path), "train")  # type: ignore[call-arg]
    assert source is not None
    return Listed([source[index] for index in range(len(source))])


def job(arch: str, tokenizer: Tokenizer) -> tuple[VLM, Layout]:
    """A small model, and how it wants its rows."""
    model = ModelConfig(dim=128, n_layers=4, n_heads=4, activation="gelu", max_seq_len=SEQ_LEN)
    vision = ViTConfig(image_size=SIZE, patch_size=8, dim=96, n_layers=3, n_heads=3)
    found = JobConfig(
        model=model,
        vision_encoder=vision,
        adapter=MLPAdapterConfig(),
        vlm=VLMConfig.for_arch(arch, max_text_len=TEXT_LEN),
        data=TextConfig(path="unread.txt"),
        train=TrainConfig(seq_len=SEQ_LEN, max_steps=1),
    )
    assembly = assemble(found, tokenizer, data=False)
    return assembly.model, assembly.data.layout


def batches(source: Source, encoder: Encoder, layout: Layout, mode: str) -> Iterator[Batch]:
    train_cfg = TrainConfig(batch_size=ROWS[mode], seq_len=SEQ_LEN)
    return iter(build_loader(source, encoder, cfg=MODES[mode], layout=layout, train_cfg=train_cfg))


def measure(model: VLM, made: dict[str, list[Batch]]) -> dict[str, tuple[float, float, float]]:
    """Mode -> useful share, useful tokens a second, samples a second."""
    taken: dict[str, list[float]] = {mode: [] for mode in made}
    for step in range(len(next(iter(made.values())))):
        for mode, found in made.items():
            begin = time.process_time()
            batch = found[step]
            (model(batch).total / batch.num_targets).backward()
            taken[mode].append(time.process_time() - begin)
            model.zero_grad()
    facts = {}
    for mode, found in made.items():
        useful, samples = ([f(b) for b in found] for f in (lambda b: b.useful_tokens, lambda b: len(b.sample_names)))
        rates = [(u / t, n / t) for u, n, t in zip(useful[1:], samples[1:], taken[mode][1:], strict=True)]  # the first one warms up
        share = sum(useful) / sum(b.input_ids.numel() for b in found)
        facts[mode] = (share, *(statistics.median(column) for column in zip(*rates, strict=True)))
    return facts


def shares(source: Source, encoder: Encoder, layout: Layout) -> dict[str, float]:
    """Useful share of each mode over about one epoch, at most 24 batches of it."""
    found = {}
    for mode in ROWS:
        made = list(islice(batches(source, encoder, layout, mode), 24))
        found[mode] = sum(b.useful_tokens for b in made) / sum(b.input_ids.numel() for b in made)
    return found


def costs(name: str, source: Source, encoder: Encoder) -> None:
    """Microseconds a sample before it can be batched, and seconds until the first batch of a late step is known."""

    def timed(call: object) -> float:
        begin = time.process_time()
        call()  # type: ignore[operator]
        return time.process_time() - begin

    n = len(source)
    sizes = Sizes(source, encoder)
    first, again = timed(lambda: sizes(np.arange(n))), timed(lambda: Sizes(source, encoder)(np.arange(n)))
    packing = timed(lambda: knapsack(sizes(np.arange(n)), SEQ_LEN))
    sampler = PackSampler(source.order(0), sizes, 4, SEQ_LEN)
    late = timed(lambda: sampler.micro_batch(2500, 0))
    rows = sampler._windows[-1]
    print(
        f"{name}: measure {1e6 * first / n:.0f} us a sample (texts seen before: {1e6 * again / n:.0f}), pack {1e6 * packing / n:.0f} us;"
        f" step 2500 of 4 rows ({rows.begin} samples) known after {late:.2f} s, sizes known"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--arch", default="joint_decoder")
    parser.add_argument("--stamps", default="")
    args = parser.parse_args()
    data = {"captions, mean 13": captions(13, 0.45), "captions, mean 25, heavy tail": captions(25, 0.9), "easy-VQA questions": questions()}
    if args.stamps:
        data["stamps, English"] = stamps(args.stamps)
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads, {args.arch}\n")
    print("| data | mode | rows | useful | samples/s | useful tokens/s | to pad |")
    print("|---|---|---|---|---|---|---|", flush=True)
    made = {}
    world = worlds.start(JobConfig(data=TextConfig(path="unread.txt")).distributed)
    dtype = compute_dtype("auto", torch.device("cpu"))
    for name, source in data.items():
        tokenizer = Tokenizer.train(source.corpus(), 512)
        model, layout = job(args.arch, tokenizer)
        encoder = Encoder(tokenizer, DataConfig(), layout, seed=0)
        made[name] = source, encoder
        prepare(model, model.shard_units(), world, dtype, reshard=False, recompute=False, compile_units=False)
        share = shares(source, encoder, layout)
        found = measure(model, {mode: list(islice(batches(source, encoder, layout, mode), args.steps + 1)) for mode in ROWS})
        for mode, (_, tokens, samples) in found.items():
            ratio = tokens / found["pad"][1]
            print(f"| {name} | {mode} | {ROWS[mode]} | {share[mode]:.1%} | {samples:.0f} | {tokens:.0f} | {ratio:.2f} |", flush=True)
    print()
    for name, (source, encoder) in made.items():
        costs(name, source, encoder)
    worlds.stop()


if __name__ == "__main__":
    main()
