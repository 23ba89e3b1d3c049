"""``kempnerforge.load_pretrained``: a model and its processor, from wherever it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from kempnerforge.checkpoint import CheckpointError
from kempnerforge.config import load_config
from kempnerforge.config.build import build_record
from kempnerforge.config.plugins import trusting
from kempnerforge.convert.commands import ASKED_FILE, JOB_FILE, TOKENIZER, load_external
from kempnerforge.data.text.asking import Asking
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.inference.processor import Inputs, Processor, processing
from kempnerforge.inference.restore import restore
from kempnerforge.model.hf_files import CONFIG, INDEX, WEIGHTS, read_tensors, tensor_files
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import place_of
from kempnerforge.util.reading import check_files, read_object
from kempnerforge.vlm.base import VLM

__all__ = ["Inputs", "Processor", "load_pretrained"]

log = logging.getLogger("kempnerforge")


def load_pretrained(
    path: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, plugins: Sequence[str | Path] = (),
    trust_plugins: bool = False, verify: bool = True,
) -> tuple[VLM, Processor]:  # fmt: skip
    """A model to use, and what makes its inputs.

    ::

        model, processor = kempnerforge.load_pretrained("runs/quickstart")
        inputs = processor(images=Image.open("a.png"), text="what shape is in the image?")
        print(processor.decode(model.generate(inputs, max_new_tokens=16)[0]))

    Args:
        path: a checkpoint or run directory; what ``kempnerforge import`` or ``export`` has made; or a directory of transformers (of a language
            model, PaliGemma, LLaVA, Idefics3, SmolVLM, Llama 3.2 Vision) or of nanoVLM.
        device: where to; None: a GPU if there is one.
        plugins: modules or files in place of the plugins that the run names, which may have moved; relative to the working directory.
        trust_plugins: run the plugins that the run or export names. They are code; see docs/security.md.
        dtype: of the weights, and what it computes in; None: fp32, whatever it was trained or stored in.
        verify: compare a model from elsewhere with its class in transformers, as ``kempnerforge import`` does; it takes the memory of both in
            fp32. False: a warning says that it is not compared. Runs and our own exports need no comparison.

    Raises:
        ValueError: nothing is there that can be loaded, or it is another model here than there.
    """
    path = place_of(path)
    given = ["--train.mixed_precision=fp32", *([f"--plugins={json.dumps([str(plugin) for plugin in plugins])}"] if plugins else [])]
    with trusting(trust_plugins):
        model, processor = _load(path, given, verify)
    target = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target, dtype).eval(), processor


def _load(path: Path, given: Sequence[str], verify: bool) -> tuple[VLM, Processor]:
    check_files(path)
    if (path / CONFIG).is_file():
        return _external(path, verify)
    if (path / JOB_FILE).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return _exported(path, given)
    try:
        restored = restore(path, given)
    except CheckpointError as error:
        raise InputError(f"{error}; models are loaded from checkpoints, run directories, exports and directories with a {CONFIG}") from None
    return restored.assembly.model, Processor(restored.assembly, **processing(restored.state.imported))


def _external(path: Path, verify: bool) -> tuple[VLM, Processor]:
    found = load_external(path, verify=verify)
    if found.agreement is not None:
        log.info("%s: %s", path, found.compared)
    else:
        log.warning("%s: the model here was not compared with the one there: %s", path, found.compared)
    for remark in found.remarks:
        log.warning("%s: %s", path, remark)
    return found.assembly.model, Processor(found.assembly, **processing(found.origin))


def _exported(path: Path, overrides: Sequence[str]) -> tuple[VLM, Processor]:
    assembly = assemble(load_config(path / JOB_FILE, overrides), Tokenizer.from_pretrained((path / TOKENIZER).resolve()), data=False)
    files = tensor_files(path)
    tensors = dict(read_tensors(files, files))
    own = dict(assembly.model.named_parameters())
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise InputError(f"{path}: the names of its weights are not those of {path / JOB_FILE}: {', '.join(different[:4])}")
    assembly.model.load_state_dict(tensors, strict=False)
    if (path / ASKED_FILE).is_file():
        assembly.asked = build_record(Asking, "asked", read_object(path / ASKED_FILE), str(path / ASKED_FILE))
    return assembly.model, Processor(assembly)
