"""``kempnerforge import`` and ``export``: models between their files and ours, compared on the spot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kempnerforge.checkpoint import CheckpointError, save_training
from kempnerforge.config import JobConfig, to_toml
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.interop.foreign import open_foreign
from kempnerforge.interop.huggingface import CONFIG
from kempnerforge.interop.settings import hf_config
from kempnerforge.interop.vlms import FITS, NORM_OF_CLS, WRAPPERS, fitting, processor_files, text_family, write_parts
from kempnerforge.interop.write import Progress, nothing, plain_embedding, save_tensors, text_names, write_config, write_text
from kempnerforge.model.hf_towers import HFTower, quiet
from kempnerforge.training.card import model_card
from kempnerforge.training.restore import Restored, restore
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.training.verify import TOLERANCE, agreement, load_class, make_probe, our_logits, their_logits

JOB_FILE, TOKENIZER = "config.toml", "tokenizer"
FORMATS = ("hf", "kempnerforge")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Converted:
    """What became of a model.

    Attributes:
        path: the directory.
        lines: what a person should know of it.
        difference: the largest one of two logits, theirs and ours; None: there was nothing to compare with.
    """

    path: Path
    lines: list[str]
    difference: float | None


def empty_directory(path: Path) -> Path:
    """``path``, if nothing is there yet.

    Raises:
        ValueError: something is.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: already there; give a directory that is new or empty")
    return path


# ---- theirs to ours -------------------------------------------------------------------------------------------------


def import_model(
    source: Path, out: Path, tokenizer: Path | None = None, *, verify: bool = True, tolerance: float = TOLERANCE, progress: Progress = nothing
) -> Converted:  # fmt: skip
    """Makes ``out`` a run directory of ours at step 0, with a config that trains on from it.

    Args:
        source: a directory of transformers (a language model or a whole vision-language model) or of nanoVLM, or a GGUF file.
        tokenizer: a directory; None: ``source``.
        verify: run the class of ``source`` on a batch and compare its logits with ours.
        tolerance: see ``Agreement.require``.

    Raises:
        ValueError: it cannot be read, or is not the same model afterwards; nothing is written then.
    """
    empty_directory(out)
    foreign = open_foreign(source)
    words = read_tokenizer(source, tokenizer)
    assembly = assemble(foreign.job, words, data=False)
    weights = foreign.read(progress)
    assembly.model.load_state_dict(weights, strict=True, assign=True)
    assembly.model.eval()
    lines = [_described(assembly, foreign.architecture or source.name)]
    if foreign.image_id is not None:
        lines.append(
            f"image token: id {foreign.image_id}, from {source / CONFIG}; texts mark the place of an image by {_mark(assembly.job)!r}"
        )
    difference = None
    if verify and foreign.can_be_compared:
        progress(f"running {foreign.architecture}", 0, 1)
        probe = make_probe(assembly, foreign.image_id, words.base_vocab_size)
        found = agreement(our_logits(assembly.model, probe.batch), their_logits(load_class(source, foreign.architecture), probe.inputs))
        lines.append(found.require(f"{foreign.architecture} and ours", tolerance))
        difference = found.difference
    elif not foreign.can_be_compared:
        lines.append("transformers does not load it: nothing to compare with")
    _write_run(out, assembly, {"source": str(source), "architecture": foreign.architecture, "image_id": foreign.image_id})
    lines.append(f"train on: kempnerforge train {out / JOB_FILE} (with data.path and data.root set to your data)")
    return Converted(out, lines, difference)


def read_tokenizer(source: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of a directory, or of another one that is ``given``.

    Raises:
        ValueError: there is none.
    """
    path = given or source
    if path.suffix == ".gguf":
        from kempnerforge.interop.gguf_file import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{path}: has no tokenizer (tokenizer.json); name a directory that has one with --tokenizer")
    return Tokenizer.from_pretrained(path if path.is_absolute() else Path.cwd() / path)


def _mark(job: JobConfig) -> str:
    return job.data.image_placeholder


def _described(assembly: Assembly, name: str) -> str:
    count = sum(p.numel() for p in assembly.model.parameters())
    images = f", {assembly.layout.image_tokens} positions an image" if assembly.model.has_images else ""
    return f"{name}: {count:,} parameters, {assembly.job.model.vocab_size:,} tokens{images}"


def _write_run(out: Path, assembly: Assembly, imported: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    assembly.tokenizer.save(out / TOKENIZER)
    job = replace(assembly.job, run=replace(assembly.job.run, dir=f"runs/{out.name}", init_from=str(out)))
    (out / JOB_FILE).write_text(to_toml(job), encoding="utf-8")
    files = {f"{TOKENIZER}/{file.name}": file.read_bytes() for file in sorted((out / TOKENIZER).iterdir())}
    files[JOB_FILE] = to_toml(replace(job, run=replace(job.run, init_from=""))).encode()
    state = {"step": 0, "seconds": 0.0, "samples_seen": 0, "samples_bad": 0, "frozen": [], "imported": imported}
    save_training(out / "checkpoints", 0, assembly.model, [], state, files, 1)


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def export_model(
    checkpoint: Path, out: Path, form: str = "hf", family: str | None = None, *, verify: bool = True, tolerance: float = TOLERANCE,
    progress: Progress = nothing,
) -> Converted:  # fmt: skip
    """Writes a trained model: averaged weights where there are any, LoRA adapters folded in, fp32.

    Args:
        checkpoint: a checkpoint or run directory.
        form: "hf": what a class of transformers loads; "kempnerforge": safetensors and our config, which ``load_pretrained`` reads.
        family: of a language model in transformers; None takes the first that can be it.
        verify: load what was written and compare its logits with ours.

    Raises:
        ValueError: no class of transformers is this model, or what it loads is another model; nothing is left behind then.
    """
    if form not in FORMATS:
        raise ValueError(f"--format = {form!r}: allowed are {', '.join(FORMATS)}")
    empty_directory(out)
    try:
        restored = restore(checkpoint, ["--train.mixed_precision=fp32"], data=False)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    restored.assembly.model.cpu()
    try:
        converted = (_export_hf if form == "hf" else _export_own)(restored, out, family, verify, tolerance, progress)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    (out / "README.md").write_text(model_card(restored, out.name, form, converted.lines), encoding="utf-8")
    return converted


def _export_own(restored: Restored, out: Path, family: str | None, verify: bool, tolerance: float, progress: Progress) -> Converted:
    assembly = restored.assembly
    save_tensors(out, dict(assembly.model.named_parameters()), progress=progress)
    assembly.tokenizer.save(out / TOKENIZER)
    (out / JOB_FILE).write_text(to_toml(replace(assembly.job, lora=[])), encoding="utf-8")
    return Converted(out, [_described(assembly, "kempnerforge")], None)


def _export_hf(restored: Restored, out: Path, family: str | None, verify: bool, tolerance: float, progress: Progress) -> Converted:
    assembly = restored.assembly
    if assembly.model.hf_model is not None:
        return _export_as_it_is(assembly, out, verify, tolerance, progress)
    job, tokenizer = assembly.job, assembly.tokenizer
    try:
        kind = fitting(job) if job.vlm is not None else ""
        chosen: str = text_family(job, kind) if kind else hf_config(job.model, family)["model_type"]
    except ValueError as error:
        raise ValueError(f"{restored.path}: {error}; --format kempnerforge writes safetensors with our config") from None
    lines, image_id, rows = [], None, 0
    if kind:
        image_id, rows, line = _image_token(assembly)
        lines.append(line)
        if (fit := job.data.images.fit) not in FITS or not WRAPPERS[kind].processor:
            lines.append(
                f"no files for the image processor are written: a {kind} with data.images.fit = {fit!r} has none that does the same"
            )
    cfg, tensors = plain_embedding(job.model, dict(assembly.model.named_parameters()), rows)
    plain = replace(job, model=cfg)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if kind:
        assert image_id is not None
        architecture = WRAPPERS[kind].architecture
        _write_vlm(out, replace(assembly, job=plain), kind, chosen, tensors, image_id, ids, progress)
    else:
        architecture = write_text(out, cfg, tensors, ids, chosen, progress=progress)["architectures"][0]
    tokenizer.save(out)
    lines.insert(0, _described(assembly, architecture))
    return _verified(assembly, out, architecture, image_id, lines, tolerance, progress) if verify else Converted(out, lines, None)


def _verified(
    assembly: Assembly, out: Path, architecture: str, image_id: int | None, lines: list[str], tolerance: float, progress: Progress
) -> Converted:  # fmt: skip
    """Loads what was written and compares."""
    progress(f"running {architecture}", 0, 1)
    probe = make_probe(assembly, image_id, assembly.tokenizer.base_vocab_size)
    found = agreement(our_logits(assembly.model, probe.batch), their_logits(load_class(out, architecture), probe.inputs))
    return Converted(out, [*lines, found.require(f"ours and {architecture}", tolerance)], found.difference)


def _export_as_it_is(assembly: Assembly, out: Path, verify: bool, tolerance: float, progress: Progress) -> Converted:
    """A model of transformers as it writes itself, with the files of its processor from where it came from."""
    model, source = assembly.model.hf_model, Path(assembly.job.vlm.files if assembly.job.vlm is not None else "")
    architecture = type(model).__name__
    with quiet():
        model.save_pretrained(out)
    assembly.tokenizer.save(out)
    copied = [name for name in PROCESSOR_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    lines = [_described(assembly, architecture), f"files of the processor, from {source}: {', '.join(copied) or 'none'}"]
    image_id = model.config.image_token_id
    return _verified(assembly, out, architecture, image_id, lines, tolerance, progress) if verify else Converted(out, lines, None)


def _image_token(assembly: Assembly) -> tuple[int, int, str]:
    """The token that stands at the positions of an image, how many rows the embedding needs besides, and a line that says so. A tokenizer
    without one gets it, behind its vocabulary.
    """
    tokenizer, name, rows = assembly.tokenizer, _mark(assembly.job), assembly.job.model
    found = tokenizer.token_id(name)
    origin = "the tokenizer"
    if found is None:
        tokenizer.add_tokens([*tokenizer.appended, name])
        found = tokenizer.token_id(name)
        origin = "added to the tokenizer, its embedding the mean of all"
    assert found is not None
    return found, max(0, found + 1 - rows.vocab_size - len(rows.new_tokens)), f"image token: {name!r}, id {found} ({origin})"


def _write_vlm(
    out: Path, assembly: Assembly, kind: str, family: str, tensors: dict[str, Tensor], image_id: int, ids: dict[str, Any], progress: Progress
) -> None:  # fmt: skip
    """Config, weights and the files of the processor."""
    job, wrapper, encoder = assembly.job, WRAPPERS[kind], assembly.model.vision_encoder
    assert isinstance(encoder, HFTower), "the class has a vision tower of transformers"
    tower, layout = encoder.tower.config, wrapper.layouts[0]
    names = text_names(job.model, family, layout.text, layout.head)
    names |= {f"adapter.{ours}": layout.projector + theirs for ours, theirs in wrapper.adapter_names.items()}
    written = {names.get(ours) or layout.vision + ours.removeprefix("vision_encoder."): tensor for ours, tensor in tensors.items()}
    for name, fill in zip(NORM_OF_CLS, (torch.ones, torch.zeros), strict=True):
        written.setdefault(layout.vision + name, fill(tower.hidden_size))
    write_config(out, write_parts(job, kind, tower, assembly.layout.image_tokens, image_id, ids))
    save_tensors(out, written, progress=progress)
    for name, content in processor_files(kind, encoder, job.data.images.fit, assembly.layout.image_tokens).items():
        write_config(out, content, name)
