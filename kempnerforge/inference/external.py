"""A model from elsewhere as a model to use here, compared with its class in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.convert.verify import TOLERANCE, Agreement, compare_models, load_class
from kempnerforge.inference.processor import origin
from kempnerforge.interop.external import ExternalModel
from kempnerforge.interop.external_tokenizer import tokenizer_of
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.write import Progress, nothing
from kempnerforge.training.setup import Assembly, assemble


@dataclass(frozen=True)
class LoadedExternal:
    """A model from elsewhere, ready to run here.

    Attributes:
        external: its files.
        assembly: the model with its weights, and its tokenizer.
        agreement: with its class in transformers; None: not compared.
        compared: what was compared, or why nothing was, for people.
        origin: the source, as a run that is made of it keeps it.
        remarks: differences in the processing of images and texts, for people.
    """

    external: ExternalModel
    assembly: Assembly
    agreement: Agreement | None
    compared: str
    origin: dict[str, Any]
    remarks: list[str]


def load_external(
    source: Path, tokenizer: Path | None = None, *, verify: bool = True, tolerance: float = TOLERANCE, progress: Progress = nothing
) -> LoadedExternal:
    """Reads a model as ``import_model`` and ``load_pretrained`` do. Arguments and errors: see
    ``import_model`` (convert/commands.py).
    """
    external = open_external(source)
    assembly = assemble(external.job, tokenizer_of(external, tokenizer), data=False, blank=True)
    assembly.model.load_state_dict(external.read(progress), strict=True, assign=True)
    assembly.model.eval()
    agreed, compared = None, "verify = False"
    if not external.can_be_compared:
        compared = "transformers does not load it: nothing to compare with"
    elif verify:
        progress(f"running {external.architecture}", 0, 1)
        agreed = compare_models(assembly, external.image_id, load_class(source, external.architecture))
        compared = agreed.require(f"{external.architecture} and ours", tolerance)
    kept, line = origin(assembly, external)
    remarks = [*([line] if line else []), *(f"otherwise than there: {note}" for note in external.notes)]
    return LoadedExternal(external, assembly, agreed, compared, kept, remarks)
