"""Trains a picture tokenizer and a classifier of real pictures for the jobs of this folder, in about two minutes of one core.

python recipes/image-generation/codec.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kempnerforge.config import DataConfig, registry
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.source import Source
from kempnerforge.data.sources import build_source
from kempnerforge.data.sources.picture_codes import captions
from kempnerforge.model.vq import VQVAE, ClassifierConfig, PictureClassifier, VQConfig, scaled

BATCH = 64
RESTART = 40
"""Steps after which codes that were not used since begin again at a feature of the encoder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/image-generation"), help="gets the folders codec and classifier")
    parser.add_argument("--steps", type=int, default=1600, help="of the tokenizer; half as many of the classifier")
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = registry.data_configs.get("easy_vqa")
    train, test = (pictures(build_source(cfg(form="captions"), split)) for split in ("train", "test"))
    codec = train_codec(VQConfig(), train[0], args.steps)
    codec.save(args.out / "codec")
    judge = train_classifier(ClassifierConfig(sorted(set(train[1]))), *train, args.steps // 2)
    judge.save(args.out / "classifier")
    codes = codec.encode(test[0])
    again = codec.decode(codes)
    error = float(np.square((again.astype(float) - np.stack(test[0])) / 255).mean())
    used = np.bincount(np.ravel(codes), minlength=codec.cfg.codes) / np.size(codes)
    entropy = float(-(used[used > 0] * np.log(used[used > 0])).sum())
    print(f"held out: {len(codes)} pictures; mean squared error {error:.5f} (values 0 to 1), PSNR {-10 * np.log10(error):.1f} dB")
    print(f"codes used {int((used > 0).sum())} of {codec.cfg.codes}, perplexity {np.exp(entropy):.1f}")
    for what, shown in (("real", test[0]), ("reconstructed", list(again))):
        print(f"classifier, {what} pictures: {100 * np.mean([a == b for a, b in zip(judge.name(shown), test[1], strict=True)]):.1f} %")


def pictures(source: Source | None) -> tuple[list[np.ndarray], list[str]]:
    """Pictures and captions."""
    assert source is not None and isinstance(source.cfg, DataConfig)
    samples = [source[index] for index in range(len(source))]
    return [load_image(s.images[0], VQConfig().image_size) for s in samples], [captions(s.texts)[0] for s in samples]


def train_codec(cfg: VQConfig, images: list[np.ndarray], steps: int) -> VQVAE:
    codec, data, began = VQVAE(cfg), scaled(images), time.monotonic()
    optimizer = torch.optim.Adam(codec.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    unused = torch.ones(cfg.codes, dtype=torch.bool)
    for step in range(1, steps + 1):
        batch = shifted(data[torch.randint(len(data), (BATCH,))])
        out = codec(batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        unused[out.codes.unique()] = False
        if step % RESTART == 0 and step < 0.8 * steps:
            with torch.no_grad():
                codec.codebook[unused] = out.features[torch.randint(len(out.features), (int(unused.sum()),))]
            unused[:] = True
        if step % 200 == 0:
            print(
                f"codec {step}/{steps}: loss {out.loss:.4f}, {len(out.codes.unique())} codes in this batch, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return codec.eval()


def train_classifier(cfg: ClassifierConfig, images: list[np.ndarray], names: list[str], steps: int) -> PictureClassifier:
    judge, data, began = PictureClassifier(cfg), scaled(images), time.monotonic()
    labels = torch.tensor([cfg.classes.index(name) for name in names])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data), (BATCH,))
        loss = F.cross_entropy(judge(shifted(data[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"classifier {step}/{steps}: loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return judge.eval()


def shifted(batch: torch.Tensor) -> torch.Tensor:
    """Moved by up to four pixels, its edge repeated: few pictures become many."""
    left, top = torch.randint(-4, 5, (2,)).tolist()
    side = batch.shape[-1]
    return F.pad(batch, (4, 4, 4, 4), mode="replicate")[..., 4 + top : 4 + top + side, 4 + left : 4 + left + side]


if __name__ == "__main__":
    main()
