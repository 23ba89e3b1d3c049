"""Some batches through a class of transformers and through our model: whether they are the same function.

Shapes: B rows, S positions, K of them that are scored, N images, V vocabulary.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kempnerforge.config.images import NEWLINE
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.batching.collate import prompt_batch, stack_views
from kempnerforge.data.images.views import Views
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.interop.dual_encoders import DualEncoderFamily
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.model.hf_checks import check_room, class_call, names_keys
from kempnerforge.model.hf_files import load_whole, read_config
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError, library_call
from kempnerforge.vlm.base import VLM

TOLERANCE = 1e-4
"""Limit of the difference between two logits, in units of the largest logit, both computed in fp32."""
ANGLE = 2.0**-22
"""Further difference that is allowed for each position: the rounding error of fp32 for an angle of one radian
per position, in two formulas."""
WORDS, BEFORE, ANSWER = 11, 3, 4
"""A short row: its tokens, the tokens before its image, the tokens of its answer."""
LONG_WORDS = 48
"""Tokens of a long row at least, and of one whose positions are far apart."""
TIMES = 4
"""Length of a long row, in windows."""
SCORED = 256
"""Positions of a row at most whose logits are compared."""
COST, SCORES = 7e13, 2**30
"""Of a long row at most: floating point operations of one model (a minute or two for 7 billion parameters on
a machine with the memory for them), and attention scores of a layer."""


@dataclass(frozen=True)
class Agreement:
    """The difference of two models.

    Attributes:
        difference: the largest difference of two logits, or of two numbers of embeddings.
        scale: the largest one.
        farthest: the largest position.
        covered: the rows that were compared, for people.
        kind: "logit" or "embedding".
    """

    difference: float
    scale: float
    farthest: int = 0
    covered: str = ""
    kind: str = "logit"

    @property
    def excess(self) -> float:
        """``difference / scale``, less what angles of such positions account for; infinite for NaN."""
        apart = self.difference / self.scale - ANGLE * self.farthest if self.scale else self.difference
        return apart if math.isfinite(apart) else math.inf

    def require(self, what: str, tolerance: float = TOLERANCE) -> str:
        """A line with the figures.

        Raises:
            InputError: the difference is more than ``tolerance`` times ``scale``.
        """
        sizes = f"max|difference| {self.difference:.2g}, max|{self.kind}| {self.scale:.3g}"
        line = f"{self.kind}s of {what}: {sizes}; compared: {self.covered}"
        if not self.excess <= tolerance:
            raise InputError(f"{line}; more than {tolerance:g} of it: these are two different models")
        return line


class Form(NamedTuple):
    """The form of a probe's rows.

    Attributes:
        words: tokens of a row.
        image_at: tokens before each image.
        rows: B.
        answer: words of the answer, at the end.
        farthest: the last position, with the others in equal steps before it; 0: positions 0, 1, 2, ...
    """

    words: int
    image_at: tuple[int, ...] = ()
    rows: int = 1
    answer: int = ANSWER
    farthest: int = 0


@dataclass(frozen=True)
class ProbeBatch:
    """A batch for our model, and the same for transformers."""

    batch: Batch
    inputs: dict[str, Tensor]


def compared(model: VLM) -> str:
    """What is compared of it: a "logit" or an "embedding"."""
    return "logit" if "words" in model.gives else "embedding"


def short_form(model: VLM) -> Form:
    """Two rows with an image each: in front where image and prompt see each other (as the classes have it),
    else after a few words.
    """
    at = (0 if model.attention_mask == "prefix" else BEFORE,) if model.has_images else ()
    return Form(WORDS, at, rows=2)


def make_probe(assembly: Assembly, image_id: int | None, vocab_size: int, form: Form | None = None) -> ProbeBatch:
    """Random words and images.

    Args:
        image_id: the token at the positions of an image in transformers. Where images take no position it is
            a word of the stream.
        vocab_size: words are drawn from so many token ids.
        form: None: a short one.
    """
    model, layout = assembly.model, assembly.data.layout
    form = form or short_form(model)
    rng = torch.Generator().manual_seed(0)
    embeds, end = "words" not in model.gives, assembly.tokenizer.eos_id
    allowed = torch.tensor([i for i in range(min(vocab_size, 10_000)) if i != image_id and not (embeds and i == end)])
    rows: list[list[int]] = allowed[torch.randint(len(allowed), (form.rows, form.words), generator=rng)].tolist()  # (B, words)
    for row in rows if embeds else ():  # a class may look for the end of a text
        row[-1] = end
    images, at = None, form.image_at
    if model.has_images:
        count = form.rows * len(at)
        images = torch.randint(256, (count, 3, layout.image_size, layout.image_size), generator=rng, dtype=torch.uint8)
    if image_id is not None and not layout.image_tokens:
        at = tuple(words + before for before, words in enumerate(at))
        for row in rows:
            for index in at:
                row.insert(index, image_id)
    numbers = [range(row * len(at), (row + 1) * len(at)) for row in range(form.rows)]
    prompts, sizes = [Prompt(row, at) for row in rows], dict[str, Tensor]()
    if at and (views := in_rows(assembly)) is not None:
        drawn = [[_picture(views, number, number - row[0]) for number in row] for row in numbers]
        prompts = [
            prompt._replace(blocks=tuple(views.blocks([one.png for one in row]))) for prompt, row in zip(prompts, drawn, strict=True)
        ]
        images = stack_views([view for row in drawn for one in row for view in views.load(one.png)], layout.image_size)
        ends = accumulate((sum(len(block.starts) for block in prompt.blocks) for prompt in prompts), initial=0)
        numbers = [range(begin, end) for begin, end in pairwise(ends)]
        sizes["image_sizes"] = torch.tensor([one.size for row in drawn for one in row])  # (N, 2)
    batch = prompt_batch(prompts, images, numbers, layout, 0)
    length = batch.kinds.shape[1]
    kinds, scored = batch.kinds.clone(), torch.linspace(0, length - 1, min(length, SCORED)).long()  # (B, S), (K,)
    kinds[:, -form.answer :] = Kind.ANSWER
    targets = (torch.arange(form.rows)[:, None] * length + scored).flatten()  # (B * K,)
    positions = torch.linspace(0, form.farthest, length).long().expand_as(kinds) if form.farthest else batch.positions
    batch = replace(batch, kinds=kinds, targets=targets, positions=positions)
    return ProbeBatch(batch, class_arguments(model, batch, image_id, scored, spread=form.farthest > 0) | sizes)


def in_rows(assembly: Assembly) -> Views | None:
    """The maker of views whose tokens are in rows across an image, each with a token at its end, if there is one."""
    return next((views for views in assembly.data.encoder(assembly.stages[-1]).images if views.cfg.rows), None)


class Picture(NamedTuple):
    """An image of noise; ``size`` is height and width."""

    png: bytes
    size: tuple[int, int]


def _picture(views: Views, seed: int, place: int) -> Picture:
    """The image at ``place`` of its row: wide ones and tall ones, in turns."""
    side = views.layout.image_size
    size = ((side, side + side // 2), (2 * side, side // 2 + 1))[place % 2]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return Picture(buffer.getvalue(), size)


def class_arguments(model: VLM, batch: Batch, image_id: int | None, scored: Tensor, spread: bool) -> dict[str, Tensor]:
    """Arguments of the class in transformers; ``scored`` columns (K,) have logits."""
    ids, kinds = batch.input_ids, batch.kinds
    inputs = {"attention_mask": torch.ones_like(ids)}
    if "words" not in model.gives and batch.images is not None:
        return inputs | {"input_ids": ids, "pixel_values": model.normalise(batch.images)}
    taken = getattr(model, "images", None)  # of a class of transformers that is used as it is
    if batch.images is not None and image_id is not None:
        ids = model.with_image_ids(batch, image_id)
        if len(batch.images):
            pixels = model.normalise(batch.images)
            inputs |= {"pixel_values": pixels} if taken is None else taken.arguments(pixels)
            if taken is not None and taken.reads_kinds:
                inputs["mm_token_type_ids"] = (kinds == Kind.IMAGE).int()
        if model.attention_mask != "causal":  # the classes make their masks of it
            inputs["token_type_ids"] = (kinds == (Kind.ANSWER if model.attention_mask == "prefix" else Kind.IMAGE)).long()
    if len(scored) < ids.shape[1]:
        inputs["logits_to_keep"] = scored
    if spread:
        inputs["position_ids"] = batch.positions if taken is None else taken.positions(batch, None)
    return inputs | {"input_ids": ids}


def load_class(path: Path, architecture: str) -> Any:
    """A model of transformers in fp32, with every parameter read from the files.

    Raises:
        ValueError: it cannot be loaded, or keys are missing, left over or of another shape.
    """
    import transformers

    what = f"{architecture} of transformers does not load it"
    cls, given = getattr(transformers, architecture), read_config(path)
    with class_call(str(path), what, given):
        config = cls.config_class.from_pretrained(path, local_files_only=True)
    check_room(lambda: cls(config), str(path), what, given)
    with names_keys(given):
        return load_whole(cls, path, str(path), what, local_files_only=True).eval()


@torch.no_grad()
def our_logits(model: VLM, batch: Batch) -> Tensor:
    """(B, K, V) logits of our model, on the CPU in fp32; (P, 2, E) embeddings, if it gives nothing else."""
    found = model(batch)
    return found.logits.unflatten(0, (len(batch.input_ids), -1)) if "words" in model.gives else found.embeddings


@torch.no_grad()
def class_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, K, V) logits of a class of transformers; (P, 2, E) embeddings, if it gives nothing else."""
    family = VLM_FAMILIES.get(model.config.model_type)
    if isinstance(family, DualEncoderFamily):
        with library_call(model.config.model_type, f"{type(model).__name__} of transformers cannot run what it has loaded"):
            return family.class_embeddings(model, inputs)
    inputs = dict(inputs) if family is None else family.class_inputs(inputs, model.config)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    scored = None if keeps else inputs.pop("logits_to_keep", None)
    with library_call(model.config.model_type, f"{type(model).__name__} of transformers cannot run what it has loaded"):
        logits = model(**inputs, use_cache=False).logits
    return (logits if scored is None else logits[:, scored]).float()


def agreement(logits: Tensor, others: Tensor, farthest: int = 0) -> Agreement:
    """Of (B, K, V) logits; rows of the vocabulary that only one of them has are left out."""
    size = min(logits.shape[-1], others.shape[-1])
    difference = (logits[..., :size] - others[..., :size]).abs().max()
    return Agreement(difference.item(), logits[..., :size].abs().max().item(), farthest)


# ---- how far -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelLimits:
    """Positions from which a model computes otherwise, by its settings or by the settings of the class.

    Attributes:
        windows: sizes of attention windows, each once.
        rope: the original lengths of scaled rotary positions.
        room: positions of a row at most: the model's limit, or as many as can be computed in reasonable time.
    """

    windows: tuple[int, ...]
    rope: tuple[int, ...]
    room: int

    @property
    def length(self) -> int:
        """Positions of a row beyond all windows, as far as there is room; 0: no long row is needed."""
        beyond = TIMES * max(self.windows + self.rope, default=0) if self.windows else 0
        return min(beyond, self.room)


def limits(assembly: Assembly, hf_model: Any) -> ModelLimits:
    """The limits of both models: either can be wrong."""
    cfg, text = assembly.job.model, hf_model.config.get_text_config()
    windows, rope = {getattr(text, "sliding_window", None), *cfg.windows}, set[int]()
    if assembly.model.hf_model is None:
        rope = {*_original(getattr(text, "rope_parameters", None) or {})}
        if cfg.rope_scaling is not None and cfg.rope_scaling.type == "llama3":
            rope.add(cfg.rope_scaling.original_max_seq_len)
    heads, parameters = getattr(text, "num_attention_heads", cfg.n_heads), sum(p.numel() for p in assembly.model.parameters())
    room = min(cfg.max_seq_len, int(COST / (2 * parameters)), math.isqrt(SCORES // heads))
    return ModelLimits(tuple(sorted(w for w in windows if w)), tuple(sorted(rope)), room)


def _original(rope: Mapping[str, Any]) -> Iterable[int]:
    """``original_max_position_embeddings`` of ``rope_parameters``, which some classes nest by kind of layer."""
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield from _original(value)
        elif key == "original_max_position_embeddings" and value:
            yield int(value)


def forms(assembly: Assembly, limits: ModelLimits) -> list[Form]:
    """Short rows; for a model with images one without; a long one, with two images where there is room; and,
    without windows, one whose positions are far apart, as distances are all that rotary positions are read
    by.
    """
    model, taken = assembly.model, assembly.data.layout.image_tokens
    if "words" not in model.gives:
        return [short_form(model), Form(limits.room, (0,), rows=2)]
    if (views := in_rows(assembly)) is not None:
        taken = max(len(block.ids) for block in views.blocks([_picture(views, 0, place).png for place in range(2)]))
    found, prefix = [short_form(model)], model.attention_mask == "prefix"
    far = min(TIMES * max(limits.rope, default=0), assembly.job.model.max_seq_len) - 1
    if not limits.windows and far >= LONG_WORDS:
        found.append(Form(LONG_WORDS, farthest=far))
    elif model.has_images:
        found.append(Form(WORDS))
    images = 0
    if model.has_images:
        images = 2 if 2 * (taken + 1) + WORDS <= limits.room else 1
    words = min(max(limits.length - images * taken, LONG_WORDS), limits.room - images * (taken + 1))
    if words > WORDS or images > 1:
        at = (0, 0) if prefix else (BEFORE, words // 2)
        found.append(Form(words, at[:images], answer=max(ANSWER, words // 2)))
    return found


def compare_models(assembly: Assembly, image_id: int | None, hf_model: Any) -> Agreement:
    """Both models on short and long rows, with and without images.

    Args:
        image_id: see ``make_probe``.
        hf_model: as from ``load_class``.
    """
    bounds, found, probes = limits(assembly, hf_model), list[Agreement](), list[ProbeBatch]()
    new = assembly.job.model.new_tokens
    shared = assembly.job.model.vocab_size + len(new) - (new[-1:] == [NEWLINE])  # that one is no token there
    for form in forms(assembly, bounds):
        probe = make_probe(assembly, image_id, assembly.tokenizer.base_vocab_size, form)
        logits, farthest = our_logits(assembly.model, probe.batch)[..., :shared], int(probe.batch.positions.max())
        found.append(agreement(logits, class_logits(hf_model, probe.inputs), farthest))
        probes.append(probe)
    worst = max(found, key=lambda one: one.excess)
    return replace(worst, kind=compared(assembly.model), covered=_covered(bounds, [probe.batch for probe in probes]))


def _covered(bounds: ModelLimits, batches: Sequence[Batch]) -> str:
    rows, longest = sum(len(batch.input_ids) for batch in batches), max(batch.input_ids.shape[1] for batch in batches)
    farthest = max(int(batch.positions.max()) for batch in batches)
    sentence = f"{rows} rows, the longest of {longest:,} positions, up to position {farthest:,}"
    if images := max(batch.row_images for batch in batches):
        sentence += f", 0 to {images} images in a row"
    short = [f"a window of {window:,}" for window in bounds.windows if longest <= window]
    short += [f"a rope scaling's original length of {length:,}" for length in bounds.rope if farthest < length]
    return sentence + (f"; NOT compared: what lies beyond {' and '.join(short)}" if short else "")
