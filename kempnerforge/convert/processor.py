"""The processor of an exported model: candidates are written, loaded as others will load them, and compared
with what training reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from kempnerforge.config.data import DataConfig, TextConfig
from kempnerforge.data.sample import Text
from kempnerforge.data.text import rendering
from kempnerforge.data.text.interleave import INPUT_IDS
from kempnerforge.data.text.rendering import TemplateError
from kempnerforge.data.text.tokenizer import CHAT_TEMPLATE
from kempnerforge.inference.processor import Processor, other_pixels
from kempnerforge.interop.chat_template import chat_template, render_template
from kempnerforge.interop.processors import followed_processor, image_settings, processor_candidates
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.interop.write import write_config
from kempnerforge.model.image_processor import PREPROCESSOR, PROCESSOR, pil_processor, read_image_settings
from kempnerforge.model.quiet import quiet
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import reason
from kempnerforge.util.reading import read_object

FILES = (PREPROCESSOR, PROCESSOR, CHAT_TEMPLATE, "chat_template.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
CAPTION = "a cat"
QUESTIONS = ("what is in the picture?", " Name two things,\nplease: a and é. ", "\nand this?")
TOLERANCE = 1e-5
"""Of pixels, which are about 1 in size: both are fp32, computed in another order."""


@dataclass(frozen=True)
class Attempt:
    """One processor to try.

    Attributes:
        name: the processor's class; empty: the tokenizer alone.
        files: of the processor, by name; empty: files that exist already, or none.
        keeps: the tokenizer keeps the tokens that it puts around every text.
        space: see ``chat_template``.
    """

    name: str
    files: dict[str, dict[str, Any]]
    keeps: bool
    space: str

    def write(self, out: Path, tokenizer: bytes) -> None:
        """Writes its files and its ``tokenizer``."""
        for name, content in self.files.items():
            write_config(out, content, name)
        if not self.keeps:
            tokenizer = json.dumps(json.loads(tokenizer) | {"post_processor": None}, ensure_ascii=False).encode()
        (out / "tokenizer.json").write_bytes(tokenizer)


_ENDS = {True: ((True, ""), (False, ""), (False, " ")), False: ((True, ""), (True, " "))}
"""Whether the tokenizer adds BOS -> pairs of ``keeps`` and ``space`` to try."""


class Different(Exception):
    """Ids or pixels differ from the ones that training reads."""


def write_processor(out: Path, assembly: Assembly, kind: str, image_id: int | None = None, *, given: bool = False) -> list[str]:
    """Writes processor and chat template beside the tokenizer, if some class of transformers makes of images
    and questions what ours does.

    Args:
        out: has config and tokenizer of the model, and nothing of a processor unless ``given``.
        kind: its ``model_type`` if it takes images; empty: a language model.
        image_id: the token of an image; None: the one that the tokenizer has.
        given: a processor's files are there already. They are tried first, and stay if nothing does what ours
            does.

    Returns:
        Lines that say what is there, and how a prompt reads.
    """
    encoder = assembly.data.encoder(assembly.stages[-1])
    cfg, words = encoder.texts[0].cfg, assembly.tokenizer
    if isinstance(cfg, TextConfig):
        return []  # running text has no template
    before = {name: (out / name).read_bytes() for name in ("tokenizer.json", *(FILES if given else ())) if (out / name).is_file()}
    adds_bos = words.bos_id is not None and words.bos_id in words.backend.encode("").ids
    lines, reasons = [_prompt_line(cfg, assembly, words.special_names[encoder.end_id()])], []
    ways = [*_ways(out, assembly, cfg, kind, given)]
    reasons += [] if ways else [f"a {kind} has none that does what data.images.fit = {cfg.images.fit!r} does"]
    for attempt in [Attempt(*way, *ends) for way in ways for ends in _ENDS[adds_bos]]:
        attempt.write(out, before["tokenizer.json"])
        adds = {"adds_bos": bool(kind) and adds_bos and attempt.keeps, "space": attempt.space}
        template = chat_template(cfg, words, encoder.asking, processor=attempt.name, **adds)
        (out / CHAT_TEMPLATE).write_text(template, encoding="utf-8", newline="")
        try:
            fine = compare_processors(out, assembly, bool(kind), image_id)
        except Different as error:
            reasons.append(f"{attempt.name or 'the tokenizer'} {error}")
            continue
        others = "".join(f"; {reason}" for reason in dict.fromkeys(reasons) if not reason.startswith(attempt.name))
        origin = "copied from the source" if given and not attempt.files else "written here"
        what = f"processor: {attempt.name} ({origin}), with a chat template" if kind else "chat template"
        lines.append(f"{what}; {fine}{others}")
        return lines if attempt.keeps else [*lines, f"the tokenizer no longer adds `{words.bos}`: the chat template writes it"]
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for name, content in before.items():
        (out / name).write_bytes(content)
    what = "no files of a processor are written" if kind else "no chat template is written"
    if given:
        what = "the processor is copied from the source, which does otherwise than training"
    return [*lines, f"{what}: {'; '.join(dict.fromkeys(reasons))}. The processor of kempnerforge.load_pretrained does what training does"]


def write_embedder(out: Path, assembly: Assembly, kind: str) -> list[str]:
    """Writes tokenizer and image processor of a class that gives embeddings: it encloses a text as "caption"
    does, and makes the pixels that training reads, or is not there.

    Returns:
        Lines that say which, for people.
    """
    encoder, family, words = assembly.data.encoder(assembly.stages[-1]), VLM_FAMILIES[kind], assembly.tokenizer.enclosing()
    words.save(out)
    write_config(out, read_object(out / TOKENIZER_CONFIG) | {"model_max_length": assembly.job.model.max_seq_len}, TOKENIZER_CONFIG)
    made, ids = words.backend.encode(CAPTION).ids, encoder.texts[0].encode(Text("", CAPTION)).table[INPUT_IDS].tolist()
    padding = [words.pad_id] * (len(ids) - len(made))
    how = " with padding = 'max_length'" if encoder.texts[0].template.fills else ""
    lines = [f"the tokenizer{how} writes captions as in training"]
    if made + padding != ids:
        lines = [f"the tokenizer writes {made} of {CAPTION!r}, and training reads {ids}"]
    name, fit = f"{family.architecture.removesuffix('Model')}Processor", encoder.texts[0].cfg.images
    size, norm = assembly.data.layout.image_size, assembly.model.normalisation
    write_config(out, image_settings(family, name, size, norm, fit), PREPROCESSOR)
    other = other_pixels(Processor(assembly), read_image_settings(out))
    if not other:
        return [*lines, f"processor: {name} (written here); pixels are those of training"]
    (out / PREPROCESSOR).unlink()
    return [*lines, f"no image processor is written, as it does otherwise than training: {'; '.join(other)}"]


def _ways(out: Path, assembly: Assembly, cfg: DataConfig, kind: str, given: bool) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Names of processors, and their files."""
    layout = assembly.data.layout
    if not kind:
        yield "", {}
        return
    if given:
        yield followed_processor(out, kind) or "a processor", {}
    norm = assembly.model.normalisation
    yield from processor_candidates(kind, layout.image_size, norm, cfg.images, layout.image_tokens, cfg.image_placeholder).items()


def _prompt_line(cfg: DataConfig, assembly: Assembly, end: str) -> str:
    """How a prompt reads."""
    template = chat_template(cfg, assembly.tokenizer, assembly.data.encoder(assembly.stages[-1]).asking)
    for count in (1, 0, 2) if assembly.model.has_images else (0,):
        try:
            prompt = render_template(template, _messages([None] * count, "{prompt}"), assembly.tokenizer)
        except ValueError:
            continue
        images = f" with {count} image{'s' * (count > 1)}" if count else ""
        return f"a prompt{images} reads `{prompt!r}`, and an answer ends with `{end}`"
    return f"an answer ends with `{end}`"


def compare_processors(out: Path, assembly: Assembly, images: bool, image_id: int | None = None) -> str:
    """Ids and pixels of questions about none, one and two images of several modes and shapes, ours and
    through the chat template in ``out``.

    Returns:
        A line that says what is equal.

    Raises:
        Different: something is not, or cannot be loaded.
    """
    from transformers import AutoTokenizer

    training = Processor(assembly, image_id=image_id)
    equal, refused = set[int](), dict[int, str]()
    try:
        with quiet():
            processor: Any = (
                pil_processor(out) if images else AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
            )
    except Exception as error:  # its class may fail in any way
        raise Different(f"cannot be loaded ({reason(error)})") from None
    for count, question in ((count, question) for count in range(3 if images else 1) for question in QUESTIONS):
        pictures = _pictures(count)
        try:
            want = training(images=[pictures], text=[question])
        except ValueError:
            continue  # training has no such prompt either
        bounded(processor, count, question)
        try:
            with quiet():
                found = [*_found(processor, pictures, question, images)]
        except Exception as error:  # a refusal is not another answer; it is told
            refused[count] = reason(error)
            continue
        for ids, pixels in found:
            if ids != want.input_ids[0].tolist():
                raise Different(f"makes other ids of a question with {count} images")
            if pixels is not None and not _same(pixels, want.pixel_values):
                raise Different("makes other pixels")
        equal.add(count)
    if not equal - ({0} if images else set()):
        raise Different(f"refuses every question ({next(iter(refused.values()), 'training has none')})")
    what = "ids and pixels" if images else "ids"
    counts = f" with {', '.join(map(str, sorted(equal)))} images" if images else ""
    rest = f"; it refuses {', '.join(map(str, sorted(refused)))} images" if refused else ""
    return f"{what} of {len(QUESTIONS)} questions{counts} are written as in training{rest}"


def bounded(processor: Any, count: int, question: str) -> None:
    """Raises InputError if the chat template of a tokenizer or processor takes more than it may, before the
    class renders it itself.
    """
    tokens = {name: getattr(processor, name, None) for name in ("bos_token", "eos_token", "pad_token")}
    messages = _messages([None] * count, question)
    if isinstance(processor.chat_template, str):
        with suppress(TemplateError):
            rendering.render(processor.chat_template, messages, True, **{k: v for k, v in tokens.items() if v is not None})


def _found(processor: Any, pictures: list[Image.Image], question: str, images: bool) -> Iterator[tuple[list[int], Tensor | None]]:
    """Ids and pixels as people get them: of the chat template at once, and of the text that it renders."""
    messages = _messages(pictures, question)
    if not images:
        yield processor.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), None
        return
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for made in (
        processor.apply_chat_template(messages, tokenize=True, **how),
        processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt"),
    ):
        yield made["input_ids"][0].tolist(), made.get("pixel_values")


def _messages(pictures: Sequence[Image.Image | None], question: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _same(pixels: Tensor, wanted: Tensor | None) -> bool:
    flat = pixels.reshape(-1, *pixels.shape[-3:])  # (N, 3, H, W)
    if pixels.dim() == 5:  # of images with fewer views the rest is 0
        flat = flat[flat.flatten(1).any(1)]
    return wanted is not None and flat.shape == wanted.shape and bool((flat - wanted).abs().max() <= TOLERANCE)


def _pictures(count: int) -> list[Image.Image]:
    """Of odd shapes, with and without transparency."""
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((37, 61, 3), (90, 23, 4))[:count]]
