"""Opens a model of another project: language models and vision-language models of transformers, nanoVLM, LLaVA
under its own names, GGUF files.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from kempnerforge.config.job import JobConfig
from kempnerforge.interop import llava_original, nanovlm
from kempnerforge.interop.external import (
    ExternalModel,
    FileTensor,
    backbone_parameters,
    image_job,
    match_tensors,
    text_job,
    text_prefix,
    tied_head,
)
from kempnerforge.interop.families import FAMILIES, HF_EMBEDDING, HF_HEAD, text_names
from kempnerforge.interop.gguf_file import open_gguf
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.model.hf_files import CONFIG, num_rows, read_config, tensor_files
from kempnerforge.model.image_processor import Normalisation, read_image_settings
from kempnerforge.model.memory import within_memory
from kempnerforge.util.errors import InputError, cut


def open_external(path: Path | str) -> ExternalModel:
    """A directory, or a GGUF file. Reads config and names, not the weights.

    Raises:
        InputError: it cannot be read, or holds a model that ours cannot be, or tensors are missing or
            unknown.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    config, files = read_config(path), tensor_files(path)
    kind = config.get("model_type")
    try:
        with within_memory(config, meta=True):
            if nanovlm.is_one(config):
                return nanovlm.open_nanovlm(path, config, files)
            if llava_original.is_one(config):
                return llava_original.open_llava(path, config, files)
            if kind in FAMILIES:
                return _open_text(path, config, files)
            if kind in VLM_FAMILIES:
                return _open_vlm(path, config, files)
            near = difflib.get_close_matches(str(kind), [*FAMILIES, *VLM_FAMILIES], n=1)
            raise InputError(
                f"model_type = {cut(repr(kind))}: is not read; language models are read of {', '.join(FAMILIES)}, vision-language models of "
                f"{', '.join(VLM_FAMILIES)} and nanoVLM" + (f"; the nearest is {near[0]!r}" if near else "")
            )
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path / CONFIG}: {error}") from None


def _open_text(path: Path, config: dict[str, Any], files: dict[str, Path]) -> ExternalModel:
    config = complete(config)
    family, prefix = config["model_type"], text_prefix(path, files)
    model = model_config(config, num_rows(files, prefix + HF_EMBEDDING))
    parameters = backbone_parameters(model)
    names = {name: FileTensor(source) for name, source in text_names(parameters, family, prefix).items()}
    tensors = match_tensors(path, names, files, lambda name: name == HF_HEAD)
    tied = tied_head(tensors, files, HF_HEAD)
    return ExternalModel(path, FAMILIES[family].architecture, text_job(model), parameters, tensors, files, tied=tied)


def _open_vlm(path: Path, config: dict[str, Any], files: dict[str, Path]) -> ExternalModel:
    family, images = VLM_FAMILIES[config["model_type"]], read_image_settings(path)
    normalisation = (images.normalisation if images else None) or Normalisation([], [])
    embeddings = [name for name in files if name.endswith(HF_EMBEDDING)]
    sections = family.sections(config, num_rows(files, embeddings[0]) if embeddings else 0, normalisation)
    shown = family.images(config, images.fit if images else "squash")
    views = 1 + max(rows * columns for rows, columns in shown.pinpoints) if shown.tiled else 1
    job = image_job(JobConfig(**vars(sections)), {"images": shown, **family.data}, views=views)
    parameters, text_family = family.parameters(job), complete(config)["text_config"]["model_type"]
    choices = [{name: FileTensor(family.tensor_name(name, job, text_family, layout)) for name in parameters} for layout in family.layouts]
    names = max(choices, key=lambda found: sum(source.name in files for source in found.values()))
    layout, used = family.layouts[choices.index(names)], {source.name for source in names.values()}
    image_id = family.image_id(config)
    tensors = match_tensors(path, names, files, lambda name: family.is_unread(name, layout, used))
    tied = tied_head(tensors, files, layout.head)
    known = image_id, tied, family.image_is_word
    more = {"notes": family.notes, "end_id": family.end_id(config)}
    return ExternalModel(path, family.architecture, job, parameters, tensors, files, *known, **more)
