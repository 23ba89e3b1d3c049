"""A job of every arch that is small enough to try everything on, real batches for it, and which archs are
tried.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint import model_tensors
from kempnerforge.config import JobConfig, ModelConfig, Stage, TrainConfig, VLMConfig, registry
from kempnerforge.config.adapter import MLPAdapterConfig
from kempnerforge.config.build import build
from kempnerforge.config.data import JsonlConfig, TextConfig
from kempnerforge.config.files import assign, parse_overrides
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.model import picture_tokens
from kempnerforge.config.plugins import FILE_PREFIX, load_plugins
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import MASKS
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.batching.collate import collate, prompt_batch
from kempnerforge.data.batching.pack import join
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sample import ImageSource, Sample, Text
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.distributed.fsdp import prepare
from kempnerforge.distributed.world import World
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import Problems
from kempnerforge.util.name_rules import match_names
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.masks import SEES_PROMPT

SIZE = 16
"""Pixels of an image's side."""
VISION = ViTConfig(image_size=SIZE, patch_size=8, dim=16, n_layers=2, n_heads=2)  # 4 tokens
CODES = 48
"""Of pictures that are written: enough of them that a random model writes some."""
MODEL = ModelConfig(dim=32, n_layers=4, n_heads=2, max_seq_len=128, new_tokens=["<image>", *picture_tokens(CODES)])
GQA = replace(MODEL, n_heads=4, n_kv_heads=2, qk_norm=True, tie_embeddings=False, init_std=0.05, new_tokens=[])
KEYS: dict[str | None, dict[str, Any]] = {}
"""Keys of ``[vlm]`` by arch, for those whose defaults do not fit a job of this size, or that need some. Most
checks are of words: an arch that may write none is tried with the keys with which it writes."""
FOREIGN: dict[str | None, Callable[[], dict[str, Any]]] = {}
"""Archs that are built from files: what makes their keys of ``[vlm]``. All sizes are in the files, and the
text backbone is not ours."""


@cache
def tokenizer(*new_tokens: str) -> Tokenizer:
    made = Tokenizer.train(["what colour is it?\n", "red", "blue", "is there a circle?\n", "yes", "no"] * 4, 300)
    made.add_tokens(new_tokens)
    return made


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


ONE = Sample("one image, one text", (picture(0),), (Text("what colour is it?", "red"),))
THREE = Sample(
    "one image, three texts", (picture(1),), (Text("what colour?", "blue"), Text("is it red?", "no"), Text("is there a circle?", "yes"))
)
TWO_IMAGES = Sample("two images", (picture(2), picture(3)), (Text("what colour is it?", "blue red"),))
NO_IMAGE = Sample("no image, two texts", (), (Text("what?", "no"), Text("", "yes yes")))
INTERLEAVED = Sample("an image, words, an image", (picture(4), picture(5)), (Text("<image>what colour?<image>is it red?", "no"),))
LATE = Sample("words before three images", tuple(map(picture, (6, 7, 8))), (Text("is <image> like <image>, <image>?", "yes"),))
TWICE = Sample("two texts around one image", (picture(9),), (Text("what is <image> here?", "red"), Text("is <image> red?", "no")))
ANSWERED = Sample("images inside an answer", (picture(10), picture(11)), (Text("what colour?", "red <image> blue <image> yes"),))
WRITTEN = Sample("a picture that is written", (picture(12),), (Text("what <code_3>?", "<boi><code_7><code_0><eoi>"),))
WINDOW = Sample("running text", (), (Text("", (11, 12, 13, 14, 15, 16)),))
SAMPLES = (ONE, THREE, TWO_IMAGES, NO_IMAGE, INTERLEAVED, LATE, TWICE, ANSWERED, WRITTEN)


# ---- the archs that are tried --------------------------------------------------------------------


class Plugin(NamedTuple):
    """A file or module that registers archs, and overrides of their keys of ``[vlm]`` ("--vlm.key=value")."""

    name: str
    overrides: Sequence[str] = ()


PLUGINS: list[Plugin] = []
"""Loaded by every process that the suite starts."""
CHOSEN: list[str] = []
"""The archs that the suite tries; empty: all that are registered, and the text model."""


def load(plugin: Plugin) -> list[str]:
    """Imports a plugin; the names of its archs. Its overrides hold for each of them from now on.

    Raises:
        InputError: it cannot be imported, or an override does not fit.
    """
    load_plugins([], Path(), "contract")
    before = set(registry.archs.names())
    (name,) = load_plugins([plugin.name], Path(), "contract")
    archs = [arch for arch in registry.archs if arch not in before or _is_from(registry.archs.get(arch), name)]
    problems, table = Problems("the command line"), dict[str, Any]()
    for key, value in parse_overrides(plugin.overrides, problems):
        if key[0] != "vlm":
            problems.add((), f"--{'.'.join(map(str, key))}: only keys of [vlm] can be given; the rest of the job is small and fixed")
        assign(table, key, value, problems)
    for arch in archs:
        keys = table.get("vlm", {})
        section = build(VLMConfig, {"arch": arch, **keys}, ("vlm",), problems)
        KEYS[arch] = {key: getattr(section, key, None) for key in keys}
    problems.raise_if_any()
    return archs


def plugins() -> list[Plugin]:
    """``PLUGINS``, and the modules of registered archs that were imported in another way."""
    classes = [registry.archs.get(name) for name in registry.archs]
    elsewhere = [cls for cls in classes if not cls.__module__.startswith("kempnerforge.")]
    others = {_source(cls) for cls in elsewhere if not any(_is_from(cls, plugin.name) for plugin in PLUGINS)}
    return [*PLUGINS, *map(Plugin, sorted(others))]


def _source(cls: type) -> str:
    """The module of ``cls``, or its file where that was loaded as a plugin."""
    module = sys.modules[cls.__module__]
    return module.__name__ if not module.__name__.startswith(FILE_PREFIX) else str(module.__file__)


def _is_from(cls: type, name: str) -> bool:
    """Whether ``cls`` is in the file or module ``name``, which this process may have imported before."""
    file = getattr(sys.modules[cls.__module__], "__file__", None) or ""
    return str(Path(file).resolve()) == name if name.endswith(".py") else f"{cls.__module__}.".startswith(f"{name}.")


def accepted_masks(arch: str | None) -> list[str]:
    """The values of ``attention_mask`` that the arch's config takes."""
    if arch is None:
        return ["causal"]
    found = []
    for mask in MASKS:
        try:
            VLMConfig.for_arch(arch, **{"attention_mask": mask} | KEYS.get(arch, {}))
        except ValueError:
            continue
        found.append(mask)
    return found


def tiny_job(arch: str | None, mask: str = "causal", **sections: Any) -> JobConfig:
    """A job that any arch takes with its own defaults; None is a pure text run."""
    keys = FOREIGN[arch]() if arch in FOREIGN else {}
    fixed = {"max_text_len": 64, "freeze": [], "attention_mask": mask}
    vlm = None if arch is None else VLMConfig.for_arch(arch, **fixed | keys | KEYS.get(arch, {}))
    train = TrainConfig(max_steps=4, seq_len=96, mixed_precision="fp32")
    sizes = {"model": MODEL, "vision_encoder": VISION, "adapter": MLPAdapterConfig(), "data": TextConfig(path="unread.txt"), "train": train}
    if keys:
        sizes |= {"model": ModelConfig(max_seq_len=MODEL.max_seq_len, new_tokens=MODEL.new_tokens), "vision_encoder": ViTConfig()}
    return JobConfig(**{"vlm": vlm, **sizes, **sections})


@dataclass
class Tiny:
    """A job put together, and what makes batches for it."""

    job: JobConfig
    model: VLM
    stages: list[Stage]
    encoder: Encoder

    @cached_property
    def patterns(self) -> dict[str, list[str]]:
        return self.job.vlm.module_patterns if self.job.vlm is not None else {}

    def encode(self, sample: Sample) -> Encoded:
        return self.encoder.encode(sample, seed=0)

    def batch(self, *samples: Sample, pad_to: int | None = None) -> Batch:
        """One row a sample, as in training."""
        return collate([self.encode(sample) for sample in samples], self.encoder.tokenizer.pad_id, pad_to)

    def each_word_changed(self, sample: Sample) -> tuple[Tensor, Batch]:
        """The columns of its words, and rows of ``sample``: row j has its j-th word changed, the last row
        none.
        """
        words = (self.batch(sample).kinds[0] >= Kind.PROMPT).nonzero().flatten()
        batch, rows = self.batch(*[sample] * (len(words) + 1)), torch.arange(len(words))
        batch.input_ids[rows, words] = self.others(batch.input_ids[rows, words])
        return words, batch

    def others(self, ids: Tensor) -> Tensor:
        """Another word for each word, and another code for each code."""
        codes = self.encoder.layout.codes
        code = (ids >= codes.start) & (ids < codes.stop)
        return torch.where(code, codes.start + (ids - codes.start + 7) % CODES, (ids + 7) % self.encoder.tokenizer.base_vocab_size)

    def pack(self, *rows: Sequence[Sample], pad_to: int | None = None) -> Batch:
        """Rows of several samples."""
        packed = [join([self.encode(sample) for sample in samples]) for samples in rows]
        return collate(packed, self.encoder.tokenizer.pad_id, pad_to)

    def prompts(self, rows: Iterable[tuple[str, Sequence[int]]], images: Sequence[ImageSource]) -> Batch:
        """A batch to generate from: each row has a prompt and indices into ``images``."""
        asked = list(rows)
        pixels = torch.empty(len(images), 3, SIZE, SIZE, dtype=torch.uint8)
        for k, image in enumerate(images):
            pixels[k] = torch.from_numpy(load_image(image, SIZE).copy()).permute(2, 0, 1)
        return prompt_batch(
            [self.encoder.encode_prompt(prompt, len(which)) for prompt, which in asked],
            pixels if self.model.has_images else None,
            [list(which) for _, which in asked],
            self.encoder.layout,
            self.encoder.tokenizer.pad_id,
        )


def tiny(arch: str | None, mask: str = "causal", *, device: str | None = None, noise: float = 0.1, **sections: Any) -> Tiny:
    """Builds a tiny job.

    Args:
        noise: added to all parameters, so that gates that start at zero are open and no two weights are the
            same by accident.
    """
    job = tiny_job(arch, mask, **sections)
    assembly = assemble(job, tokenizer(*job.model.new_tokens), device=device, data=False)
    if noise and device != "meta":
        shake(assembly.model, noise)
    return Tiny(assembly.job, assembly.model, assembly.stages, assembly.data.encoder(assembly.stages[0]))


def with_grids(arch: str, **sections: Any) -> dict[str, Any]:
    """``sections`` of a small job of an arch with image tokens in the stream, with positions by row and column,
    and, where the arch has an encoder that knows its layers, their features and images of any shape.
    """
    model = sections.pop("model", MODEL)
    pairs = model.head_width // 2
    sections["model"] = replace(model, rope_sections=[pairs // 2, pairs // 4, pairs // 4], rope_interleaved=True)
    if not gives_layers(arch):
        return sections
    data = JsonlConfig(path="unread.jsonl", images=ImagesConfig(fit="native"))
    return {"vision_encoder": replace(VISION, deepstack_layers=[-2, -1]), "data": data, **sections}


@cache
def gives_layers(arch: str) -> bool:
    """Whether the arch's encoder gives features of inner layers, and sees a part of its square."""
    model = tiny(arch, device="meta").model
    return model.vision_encoder.layer_dim > 0 and model.cell > 0


@torch.no_grad()
def shake(model: nn.Module, noise: float) -> None:
    """Adds noise that depends on a parameter's name and shape alone."""
    for name, parameter in model.named_parameters():
        parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def everywhere(batch: Batch) -> Batch:
    """The batch, asking for the logits of every position."""
    return replace(batch, targets=torch.arange(batch.input_ids.numel()))


@torch.no_grad()
def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, S, V) of a full forward pass."""
    return model(everywhere(batch)).logits.unflatten(0, batch.input_ids.shape)


def gradients(model: nn.Module, *batches: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all trained tokens and pairs of ``batches``, and what it sends back to each parameter
    that it reaches.
    """
    targets, pairs = sum(batch.num_targets for batch in batches), sum(batch.num_pairs for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = model(batch).mean(targets, pairs)
        part.backward()
        loss += part.detach()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def install(
    it: Tiny, world: World, dtype: torch.dtype = torch.float32, *, recompute: bool = False, compile_units: bool = False, **options: bool
) -> None:
    """Shards as the trainer does; ``options`` as of ``prepare``."""
    prepare(it.model, it.model.shard_units(), world, dtype, reshard=True, recompute=recompute, compile_units=compile_units, **options)
    it.model.row_ranks, it.model.pair_ranks = world.context, world.across_parts()


def copies(model: nn.Module) -> dict[str, Tensor]:
    """All weights as they are now."""
    return {key: value.detach().clone() for key, value in model_tensors(model).items()}


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bitwise the same."""
    a, b = full(a), full(b)
    assert a.keys() == b.keys()
    return sorted(name for name in a if not torch.equal(a[name], b[name]))


def may_see(batch: Batch, mask: str) -> Tensor:
    """(S, S) bool, [q, k]: whether position q of row 0 may depend on the *word* at k, written down from the
    rules.
    """
    kinds, texts, length = batch.kinds[0].tolist(), batch.text_ids[0].tolist(), batch.kinds.shape[1]
    answered = [any(kinds[j] == Kind.ANSWER and texts[j] == texts[q] for j in range(q)) for q in range(length)]
    informed = [  # "image_sees_prompt": an image that knows the prompt was there already
        any(kinds[j] == Kind.IMAGE and (texts[j] == texts[q] or max(texts) == 1) and not answered[j] for j in range(q + 1))
        for q in range(length)
    ]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            in_prefix = mask in SEES_PROMPT and kinds[k] == Kind.PROMPT and not answered[k]
            ahead = in_prefix and kinds[q] in (Kind.PROMPT, Kind.IMAGE) and not answered[q]
            if mask == "image_sees_prompt":
                ahead = in_prefix and informed[q]
            allowed[q, k] = texts[q] == texts[k] and (k <= q or ahead)
            if in_prefix and kinds[q] == Kind.IMAGE and texts[q] == 0:
                allowed[q, k] = max(texts) == 1  # several texts must not see each other through the image
    return allowed


def with_answer(prompts: Batch, ids: Tensor) -> Batch:
    """``prompts`` followed by ``ids`` (B, n), asking for the logits after the last token of each row."""
    new = ids.shape[1]
    longer = {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE),
        "positions": prompts.positions[:, -1:] + torch.arange(1, new + 1),
        "sample_ids": prompts.sample_ids[:, -1:].expand(-1, new),
        "text_ids": prompts.text_ids[:, -1:].expand(-1, new),
        "kinds": torch.full_like(ids, Kind.ANSWER, dtype=torch.uint8),
    }
    columns = {name: torch.cat([getattr(prompts, name), value], dim=1) for name, value in longer.items()}
    rows, length = columns["input_ids"].shape
    sizes = {"row_words": prompts.row_words + new, "row_codes": prompts.row_codes + new}  # at most
    return replace(prompts, **columns, **sizes, targets=torch.arange(1, rows + 1) * length - 1, has_documents=True)


def seeing(it: Tiny) -> list[str]:
    """Names of the parameters that images pass before they are in the stream."""
    names = [name for name, _ in it.model.named_parameters()]
    return [
        name for alias in ("adapter", "vision_encoder") if alias in it.patterns for name in match_names(names, alias, it.patterns, "alias")
    ]
