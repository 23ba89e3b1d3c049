"""Decode, fit or tile, tokenise, lay out: samples per second on one core, ours against plain PIL with a processor and a tokenizer of transformers.

Both read the same files and end with what a model takes: ours in a row with labels and uint8 views, theirs in padded ids with the prompt masked
and normalised float32 views. (Ours normalises on the device; what that costs here is shown in a column of its own.) Nothing is kept in
memory between samples; the last row reads views from ``data.images.cache_dir``. The candidates take turns, pass by pass; times are CPU time of the
process, medians over the passes.

Usage: OMP_NUM_THREADS=1 python benchmarks/decode.py [--passes 7] [--images 8]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kempnerforge.config.data import DataConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.data import Encoder, Layout, Sample, Text, Tokenizer

WORDS = (
    "a",
    "the",
    "of",
    "red",
    "green",
    "small",
    "large",
    "dog",
    "cat",
    "tree",
    "house",
    "river",
    "under",
    "over",
    "beside",
    "two",
    "old",
    "new",
)
SIZES = {"640x480 JPEG": (640, 480, "JPEG"), "1600x1200 JPEG": (1600, 1200, "JPEG"), "640x480 PNG": (640, 480, "PNG")}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "squash 224": (224, {}),
    "crop 224": (224, {"fit": "crop"}),
    "letterbox 336": (336, {"fit": "letterbox"}),
    "tiles 512, up to 2048": (512, {"fit": "tiles"}),
    "any-res 336": (336, {"fit": "tiles", "tiling": "anyres"}),
}
Pass = Callable[[list[Path], list[str]], None]


def photo(width: int, height: int, kind: str, seed: int) -> bytes:
    """Something with the spectrum of a photo: noise of several scales."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3))
    for scale in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (max(2, scale * height // width), scale, 3), dtype=np.uint8))
        layers += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / scale**0.5
    layers = (layers - layers.min()) / (layers.max() - layers.min())
    buffer = io.BytesIO()
    Image.fromarray((255 * layers).astype(np.uint8)).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def captions(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 40)) for _ in range(count)]


def ours(tokenizer: Tokenizer, side: int, images: dict[str, Any], normalise: bool = False) -> Pass:
    layout = Layout(image_tokens=64, image_size=side, max_text_len=512, seq_len=4096, pad_to=576)
    cfg = DataConfig(images=ImagesConfig(**images), image_cache_mib=0)

    def run(paths: list[Path], texts: list[str]) -> None:
        encoder = Encoder(tokenizer, cfg, layout, seed=0)
        for path, text in zip(paths, texts, strict=True):
            encoded = encoder.encode(Sample("s", (path,), (Text("describe the image", text),)), 0)
            views = torch.from_numpy(np.stack(encoded.images)).permute(0, 3, 1, 2)  # (N, 3, H, W)
            if normalise:
                views.float().div_(255).sub_(0.5).div_(0.5)

    return run


def theirs(tokenizer: Tokenizer, side: int, images: dict[str, Any]) -> Pass:
    import transformers

    square = {"height": side, "width": side}
    common: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    fit = images.get("tiling") or images.get("fit", "squash")
    if fit == "squash":
        processor: Any = transformers.SiglipImageProcessorPil(size=square, **common)
    elif fit == "crop":
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **common)
    elif fit == "letterbox":
        processor = transformers.LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size=square, **common)
    elif fit == "anyres":
        grids = [[side * rows, side * columns] for rows, columns in ImagesConfig().pinpoints]
        processor = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids, **common
        )
    else:
        processor = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": side}, **common)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, pad_token=tokenizer.pad, eos_token=tokenizer.eos)

    def run(paths: list[Path], texts: list[str]) -> None:
        for path, text in zip(paths, texts, strict=True):
            prompt = "describe the image\n"
            ids = words(prompt + text + words.eos_token, padding="max_length", max_length=512, truncation=True, return_tensors="pt")[
                "input_ids"
            ]
            labels = ids.clone()
            labels[:, : len(words(prompt)["input_ids"])] = -100
            labels[ids == words.pad_token_id] = -100
            with Image.open(path) as image:
                views = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            assert labels.shape == ids.shape and views.dtype == torch.float32

    return run


def measure(candidates: list[Pass], paths: list[Path], passes: int) -> list[float]:
    """Median CPU milliseconds of a sample, for each candidate."""
    times: list[list[float]] = [[] for _ in candidates]
    for number in range(passes + 1):
        for candidate, taken in zip(candidates, times, strict=True):
            texts = captions(len(paths), number)  # new ones: tokenised texts are remembered
            begin = time.process_time()
            candidate(paths, texts)
            taken.append((time.process_time() - begin) / len(paths) * 1e3)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(captions(200, 0), 512)
    tokenizer.add_tokens(list(dict.fromkeys(name for _, images in CASES.values() for name in ImagesConfig(**images).new_tokens())))
    print("| images | views | samples/s, ours | with normalisation | PIL + transformers | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, kind) in SIZES.items():
            paths = [Path(folder) / f"{name}-{k}" for k in range(args.images)]
            for k, path in enumerate(paths):
                path.write_bytes(photo(width, height, kind, k))
            for case, (side, images) in CASES.items():
                candidates = [ours(tokenizer, side, images), ours(tokenizer, side, images, normalise=True), theirs(tokenizer, side, images)]
                mine, normalised, other = measure(candidates, paths, args.passes)
                print(
                    f"| {name} | {case} | {1e3 / mine:.0f} | {1e3 / normalised:.0f} | {1e3 / other:.0f} | {other / normalised:.2f} |",
                    flush=True,
                )
            side, images = CASES["squash 224"]
            (cached,) = measure([ours(tokenizer, side, {**images, "cache_dir": f"{folder}/cache"})], paths, args.passes)
            print(f"| {name} | squash 224, from the cache on disk | {1e3 / cached:.0f} | | | |", flush=True)


if __name__ == "__main__":
    main()
