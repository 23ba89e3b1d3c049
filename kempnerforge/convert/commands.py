"""``kempnerforge import`` and ``export``: models from other projects and to transformers, with a comparison
of logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kempnerforge.checkpoint import CheckpointError, save_training
from kempnerforge.config import ModelConfig, to_toml
from kempnerforge.convert.card import model_card
from kempnerforge.convert.processor import FILES, write_embedder, write_processor
from kempnerforge.convert.verify import TOLERANCE, agreement, compare_models, compared, load_class, make_probe, our_logits
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.inference.external import load_external
from kempnerforge.inference.model import ASKED_FILE, JOB_FILE, TOKENIZER, TrainedModel
from kempnerforge.interop.settings import hf_config
from kempnerforge.interop.vlms import VLM_FAMILIES, fitting
from kempnerforge.interop.write import (
    DTYPES,
    NEW_EMBEDDING,
    Progress,
    cast_files,
    fresh,
    nothing,
    plain_embedding,
    save_tensors,
    without_last_token,
    write_config,
    write_language_model,
)
from kempnerforge.model.hf_files import CONFIG, GENERATION
from kempnerforge.model.quiet import quiet
from kempnerforge.training.history import changed_on_the_way
from kempnerforge.training.run_state import RunState
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import place_of
from kempnerforge.util.reading import read_object

FORMATS = ("hf", "kempnerforge")


@dataclass(frozen=True)
class Converted:
    """The outcome of an import or export.

    Attributes:
        path: the directory.
        lines: facts about it, for people.
        difference: the largest difference of two logits, of the class in transformers and of our model; None:
            nothing was compared.
    """

    path: Path
    lines: list[str]
    difference: float | None


class HFClass(NamedTuple):
    """A class of transformers that a model of ours is written as.

    Attributes:
        name: its name in transformers.
        kind: ``model_type`` of the whole model; empty: a language model.
        text_family: ``model_type`` of its text model; empty: the model is an unchanged one of transformers.
    """

    name: str
    kind: str
    text_family: str


class How(NamedTuple):
    """How a model is written: as ``export_model`` takes it."""

    family: str | None
    dtype: torch.dtype
    verify: bool
    tolerance: float
    progress: Progress


# ---- import --------------------------------------------------------------------------------------


def import_model(
    source: Path, out: Path, tokenizer: Path | None = None, *, verify: bool = True, tolerance: float = TOLERANCE, progress: Progress = nothing
) -> Converted:  # fmt: skip
    """Makes ``out`` a run directory of ours at step 0, with a config that trains on from it.

    Args:
        source: a directory of transformers (a language model or a whole vision-language model) or of nanoVLM,
            or a GGUF file.
        tokenizer: a directory; None: ``source``.
        verify: run the class of ``source`` on some rows and compare its logits with ours.
        tolerance: see ``Agreement.require``.

    Raises:
        InputError: it cannot be read, or is not the same model afterwards; then no directory is left.
    """
    source, out, tokenizer = place_of(source), place_of(out), None if tokenizer is None else place_of(tokenizer)
    with fresh(out) as part:
        found = load_external(source, tokenizer, verify=verify, tolerance=tolerance, progress=progress)
        write_run(part, out, found.assembly, found.origin)
    external, agreed = found.external, found.agreement
    lines = [_described(found.assembly, external.architecture or source.name)]
    if external.image_id is not None:
        placeholder = external.job.data.image_placeholder
        lines.append(f"image token: id {external.image_id}, from {source / CONFIG}; texts mark the place of an image by {placeholder!r}")
    lines += [found.compared] if agreed or not external.can_be_compared else []
    lines += [*found.remarks, f"train on: kempnerforge train {out / JOB_FILE} (with data.path and data.root set to your data)"]
    return Converted(out, lines, agreed.difference if agreed else None)


def _described(assembly: Assembly, name: str) -> str:
    count = sum(p.numel() for p in assembly.model.parameters())
    images = f", {assembly.data.layout.image_tokens} positions an image" if assembly.model.has_images else ""
    return f"{name}: {count:,} parameters, {assembly.job.model.vocab_size:,} tokens{images}"


def write_run(part: Path, out: Path, assembly: Assembly, imported: dict[str, Any]) -> None:
    """NOTE: ``run.dir`` is another directory than ``out``, which is already a run; training begins from
    ``out``.
    """
    assembly.tokenizer.save(part / TOKENIZER)
    home = out.resolve()
    job = replace(assembly.job, run=replace(assembly.job.run, dir=f"runs/{home.name}-trained", init_from=str(home)))
    (part / JOB_FILE).write_text(to_toml(job), encoding="utf-8")
    files = {f"{TOKENIZER}/{file.name}": file.read_bytes() for file in sorted((part / TOKENIZER).iterdir())}
    files[JOB_FILE] = to_toml(replace(job, run=replace(job.run, init_from=""))).encode()
    save_training(part / "checkpoints", 0, assembly.model, [], RunState(step=0, imported=imported).to_json(), files, 1)


# ---- export --------------------------------------------------------------------------------------


def export_model(
    checkpoint: Path, out: Path, form: str = "hf", family: str | None = None, *, dtype: str = "fp32", verify: bool = True,
    tolerance: float = TOLERANCE, progress: Progress = nothing, moved: Sequence[str] = (),
) -> Converted:  # fmt: skip
    """Writes a trained model: averaged weights where there are any, LoRA adapters folded in.

    Args:
        checkpoint: a checkpoint or run directory.
        form: "hf": what a class of transformers loads; "kempnerforge": safetensors and our config, which
            ``load_pretrained`` reads.
        family: of a language model in transformers; None takes the first that can be it.
        dtype: of the weights: "fp32", "bf16" or "fp16".
        verify: load the files that were written and compare logits, both of the rounded weights, computed in
            fp32; and say how far the rounding moves them.
        moved: "--plugins=FILE", where a plugin is no longer where the run says.

    Raises:
        InputError: no class of transformers is this model, the class loads another model, or a weight does
            not fit ``dtype``; then no directory is left.
    """
    if form not in FORMATS:
        raise InputError(f"--format = {form!r}: allowed are {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype = {dtype!r}: allowed are {', '.join(DTYPES)}")
    how, checkpoint, out = How(family, DTYPES[dtype], verify, tolerance, progress), place_of(checkpoint), place_of(out)
    with fresh(out) as part:
        try:
            restored = TrainedModel.restore(checkpoint, ["--train.mixed_precision=fp32", *moved])
        except CheckpointError as error:
            raise InputError(str(error)) from None
        assembly = restored.assembly
        if family is not None and (form != "hf" or assembly.job.vlm is not None):
            raise InputError(f"--family = {family!r}: only a language model that goes out with --format hf has one")
        if form != "hf" and assembly.model.hf_model is not None:
            raise InputError(f"{checkpoint}: is a model of transformers; it goes out with --format hf")
        assembly.model.cpu()
        rounding = _rounded(assembly, how)
        converted = (_export_hf if form == "hf" else _export_own)(restored, part, how)
        spans = changed_on_the_way(restored.state.history, restored.state.step)
        changed = ["not all of its steps were trained with one config: README.md there says what changed"] if spans else []
        converted = replace(converted, path=out, lines=[*converted.lines, rounding, *changed])
        (part / "README.md").write_text(model_card(restored, out.resolve().name, form, converted.lines), encoding="utf-8")
    return converted


def _rounded(assembly: Assembly, how: How) -> str:
    """Rounds the weights, which stay in fp32, to values of ``how.dtype``; returns a line that says so.

    Raises:
        ValueError: one of them is too large.
    """
    name, model = str(how.dtype).removeprefix("torch."), assembly.model
    if how.dtype == torch.float32:
        return f"weights in {name}"
    batch = make_probe(assembly, None, assembly.tokenizer.base_vocab_size).batch if how.verify else None
    before = our_logits(model, batch) if batch is not None else None
    for key, p in model.named_parameters():
        rounded = p.detach().to(how.dtype)
        if rounded.isinf().any():
            raise InputError(f"--dtype = {name}: {key} has a value of {p.abs().max().item():.3g}, which does not fit")
        p.data.copy_(rounded)
    if before is None or batch is None:
        return f"weights in {name}, rounded from float32"
    found, kind = agreement(before, our_logits(model, batch)), compared(model)
    return (
        f"weights in {name}, rounded from float32: {kind}s before and after, max|difference| {found.difference:.2g}, "
        f"max|{kind}| {found.scale:.3g}"
    )


def _export_own(restored: TrainedModel, out: Path, how: How) -> Converted:
    assembly = restored.assembly
    save_tensors(out, dict(assembly.model.named_parameters()), progress=how.progress)
    cast_files(out, how.dtype)
    assembly.tokenizer.save(out / TOKENIZER)
    write_config(out, asdict(assembly.data.encoder(assembly.stages[-1]).asking), ASKED_FILE)
    job = replace(assembly.job, lora=[])
    if assembly.model.has_images:
        job = replace(job, vision_encoder=assembly.model.vision_encoder.standing_alone(job.vision_encoder))
    (out / JOB_FILE).write_text(to_toml(job), encoding="utf-8")
    return Converted(out, [_described(assembly, "kempnerforge")], None)


def _export_hf(restored: TrainedModel, out: Path, how: How) -> Converted:
    assembly = restored.assembly
    try:
        architecture, kind, chosen = class_of(assembly, how.family)
    except InputError as error:
        raise InputError(f"{restored.path}: {error}; --format kempnerforge writes safetensors with our config") from None
    if assembly.model.hf_model is not None:
        return _export_as_it_is(assembly, out, architecture, how)
    job, tokenizer = assembly.job, assembly.tokenizer
    lines, image_id, rows, newline = [], None, 0, {}
    cfg, tensors = job.model, dict(assembly.model.named_parameters())
    if kind and VLM_FAMILIES[kind].newline:
        cfg, tensors, vector = without_last_token(cfg, tensors)
        tokenizer, newline = tokenizer.without_last(), {f"transformer.{NEW_EMBEDDING}": vector}
    if kind and VLM_FAMILIES[kind].image_key:
        image_id, rows, line = _image_token(tokenizer, job.data.image_placeholder, cfg)
        lines.append(line)
    cfg, tensors = plain_embedding(cfg, tensors, rows)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if kind:
        vlm, encoder, plain = VLM_FAMILIES[kind], assembly.model.vision_encoder, replace(job, model=cfg)
        write_config(out, vlm.config(plain, encoder, assembly.data.layout.image_tokens, image_id, ids))
        save_tensors(out, vlm.tensors(plain, encoder, tensors | newline), progress=how.progress)
    else:
        write_language_model(out, cfg, tensors, ids, chosen, progress=how.progress)
    cast_files(out, how.dtype)
    lines.insert(0, _described(assembly, architecture))
    if "words" not in assembly.model.gives:
        return _verified(assembly, out, architecture, None, [*lines, *write_embedder(out, assembly, kind)], how)
    (tokenizer if kind else tokenizer.starting()).save(out)
    _write_ends(out, assembly)
    lines += write_processor(out, assembly, kind, image_id)
    return _verified(assembly, out, architecture, image_id, lines, how)


def _write_ends(out: Path, assembly: Assembly) -> None:
    """Writes the class's padding token and the tokens that it stops at: the one that ends an answer here, and
    the tokenizer's.
    """
    tokenizer, encoder = assembly.tokenizer, assembly.data.encoder(assembly.stages[-1])
    end, others = encoder.end_id(), sorted(encoder.stops() - {encoder.end_id(), assembly.tokenizer.eos_id})
    written = read_object(out / GENERATION) if (out / GENERATION).is_file() else {}
    stop = [*dict.fromkeys((end, tokenizer.eos_id, *others))]
    stop = stop if len(stop) > 1 else end
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop, "pad_token_id": tokenizer.pad_id}
    write_config(out, written | ids, GENERATION)


def class_of(assembly: Assembly, text_family: str | None = None) -> HFClass:
    """The class that ``export_model`` writes the model as. Only shapes are read: it may be on the meta
    device.

    Args:
        text_family: of a language model; None takes the first that can be it.

    Raises:
        InputError: no class of transformers is this model.
    """
    job, model = assembly.job, assembly.model
    if model.hf_model is not None:
        return HFClass(type(model.hf_model).__name__, model.hf_model.config.model_type, "")
    if job.vlm is None:
        config = hf_config(job.model, text_family)
        return HFClass(config["architectures"][0], "", config["model_type"])
    family, text_family = fitting(job)
    family.check_built(job, model.vision_encoder, assembly.tokenizer)
    return HFClass(family.architecture, family.kind, text_family)


def _verified(assembly: Assembly, out: Path, architecture: str, image_id: int | None, lines: list[str], how: How) -> Converted:
    """Loads the written files and compares the models, unless ``how.verify`` is false."""
    if not how.verify:
        return Converted(out, lines, None)
    how.progress(f"running {architecture}", 0, 1)
    found = compare_models(assembly, image_id, load_class(out, architecture))
    return Converted(out, [*lines, found.require(f"ours and {architecture}", how.tolerance)], found.difference)


def _export_as_it_is(assembly: Assembly, out: Path, architecture: str, how: How) -> Converted:
    """A model of transformers as it writes itself, with the files of its processor from where it came from."""
    model, source = assembly.model.hf_model, Path(assembly.job.vlm.files if assembly.job.vlm is not None else "")
    with quiet():
        model.save_pretrained(out)
    cast_files(out, how.dtype)
    assembly.tokenizer.save(out)
    _write_ends(out, assembly)
    copied = [name for name in FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    processor = write_processor(out, assembly, model.config.model_type, given=bool(copied))
    lines = [_described(assembly, architecture), *processor]
    return _verified(assembly, out, architecture, model.config.image_token_id, lines, how)


class ImageToken(NamedTuple):
    """The token at the positions of an image, how many rows the embedding lacks for it, and a line that
    describes it.
    """

    id: int
    missing_rows: int
    line: str


def _image_token(tokenizer: Tokenizer, name: str, rows: ModelConfig) -> ImageToken:
    """A tokenizer without such a token gets it, after its vocabulary."""
    found = tokenizer.token_id(name)
    origin = "the tokenizer"
    if found is None:
        tokenizer.add_tokens([*tokenizer.appended, name])
        found = tokenizer.token_id(name)
        origin = "added to the tokenizer, its embedding the mean of all"
    assert found is not None
    missing = max(0, found + 1 - rows.vocab_size - len(rows.new_tokens))
    return ImageToken(found, missing, f"image token: `{name}`, id {found} ({origin})")
