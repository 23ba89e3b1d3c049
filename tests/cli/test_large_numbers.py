"""The largest numbers that a config may have, one key at a time: a run that ends, or a refusal that names the key. Never a process that the
system kills, an allocation that panics, or a loop that takes forever.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from kempnerforge.config.build import MAX_FLOAT, MAX_INT, SECTIONS, UNIONS, fields_of
from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.config.model import RopeScaling
from tests.processes import Forked, run_module
from tests.training.tiny import CONFIG, environment, make_job

GIB, SECONDS = 10, 100
LONG = ("--model.max_seq_len=4096", "--train.seq_len=4096")
TILES = ("--data.images.fit=tiles", "--data.images.max_side=32", "--data.images.marker_grid=2", *LONG)
NEEDS = {
    "cross_attention": ("--vlm.cross_attention_every_n_layers=1",),
    "perceiver": LONG,
    "probe": ("--data.samples=8", "--data.eval_samples=4"),
    "data.images.max_side": TILES,
    "data.images.marker_grid": TILES,
    "data.images.max_tiles": ("--data.images.fit=tiles", "--data.images.tiling=overlap", "--data.images.markers=false", *LONG),
    "data.images.overlap": ("--data.images.fit=tiles", "--data.images.tiling=overlap", "--data.images.markers=false", *LONG),
    "data.images.augment.crop_ratio": ("--data.images.augment.crop_scale=0.5",),
    "data.max_images_per_row": ("--data.batching=pack",),
    "eval.text_window": ("--eval.text_path={folder}/job.toml",),
    "lora": ('--vlm.freeze=[{module="transformer.*", frozen=false}]',),
    "model.rope_scaling": ('--model.rope_scaling.type="llama3"',),
    "optimizer.muon": ("--optimizer.name=muon",),
    "scheduler.decay_fraction": ("--scheduler.name=wsd",),
    "vlm.unwritten_tokens": ("--model.tie_embeddings=false",),
}
"""By the start of a key or the name of a class: what has to be said besides."""
SAYS = {"latents": f"with {MAX_INT} image tokens"}
"""What a refusal names instead of the key."""
ELSEWHERE = {"hf", "hf_dataset", "hf_stream", "webdataset", "captions", "llava", "finevision", "interleaved", "mixture", "easy_vqa", "digits"} | {
    "openmoji", "text", "siglip", "siglip2", "clip", "dinov2", "mllama", "efficientnet_lite0", "qwen_vl", "picture_codes", "stamps",
}  # fmt: skip
"""Classes that need files of their own."""


def keys() -> Iterator[tuple[str, str, tuple[str, ...], type]]:
    """Class, key, overrides that select the class, and the type of every number."""
    for section, kind in SECTIONS.items():
        union = UNIONS.get(kind)
        for name in [""] if union is None else [name for name in union.entries.names() if name not in ELSEWHERE]:
            cls = kind if union is None else union.class_for(name)
            chosen = (f"--{section}.{union.key}={name}",) if union is not None and name not in ("vit", "jsonl") else ()
            yield from ((name, f"{section}.{key}", chosen, wanted) for key, wanted in numbers_of(cls))
    for where, cls in (("data.images", ImagesConfig), ("data.images.augment", AugmentConfig), ("model.rope_scaling", RopeScaling)):
        yield from (("", f"{where}.{key}", (), wanted) for key, wanted in numbers_of(cls))
    yield from (("", f"lora.{key}", (), wanted) for key, wanted in numbers_of(LoRAConfig))


def numbers_of(cls: type) -> Iterator[tuple[str, type]]:
    given = {field.name for field in fields(cls) if field.default is not MISSING}
    yield from ((key, wanted) for key, wanted in fields_of(cls).items() if key in given and wanted in (int, float))


CASES = {f"{name}{name and ':'}{key}": (name, key, chosen, wanted) for name, key, chosen, wanted in keys()}


def limited(*argv: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
    run_module("kempnerforge", argv)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_largest_number_is_refused_or_harmless(case: str, tmp_path: Path) -> None:
    name, key, chosen, wanted = CASES[case]
    short = key.rpartition(".")[2]
    config = CONFIG if name != "probe" else re.sub(r"(?m)^(path|eval_path|prompt_column) = .*\n", "", CONFIG)
    job = make_job(tmp_path, config=config, extra='\n[[lora]]\nmodule = "transformer.layers.*"\n' if key.startswith("lora") else "")
    needs = [
        word.replace("{folder}", str(tmp_path))
        for start, words in NEEDS.items()
        if key.startswith(start) or start == name
        for word in words
    ]
    where = f"--{key}=" if not key.startswith("lora") else f"--lora.0.{short}="
    process = Forked(
        limited,
        ("train", str(job), *chosen, *needs, f"{where}{MAX_INT if wanted is int else MAX_FLOAT}", "--train.max_steps=1"),
        environment(),
    )
    try:
        _, err = process.communicate(SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0 or (process.returncode == 2 and SAYS.get(short, short) in err), (process.returncode, err[-1500:])
    assert "Traceback" not in err, err[-1500:]
