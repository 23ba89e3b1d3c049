"""The image processor's files beside a model of transformers: read in its order, with the defaults of the class that they name.

That class does it itself, on its PIL backend, so that nothing depends on what else is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.model.quiet import quiet
from kempnerforge.util.errors import InputError, reason
from kempnerforge.util.reading import check_files, read_object

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
Normalisation = tuple[list[float], list[float]]
"""Mean and std of RGB values in [0, 1]."""


@dataclass(frozen=True)
class ImageFiles:
    """What the files say.

    Attributes:
        settings: every one, defaults included as far as the class is known.
        normalisation: that makes ours their pixels, rescaling folded in; None: nothing is said of it, and no class is named.
        processor: their class with these settings; None: it cannot be built, because of ``problem``.
    """

    settings: dict[str, Any]
    normalisation: Normalisation | None
    processor: Any
    problem: str = ""

    @property
    def fit(self) -> str:
        """How an image becomes a square, as ``data.images.fit``."""
        size = self.settings.get("size")
        by_short_side = "shortest_edge" in size if isinstance(size, dict) else True
        return "crop" if self.settings.get("do_center_crop") and by_short_side else "squash"


def read_image_files(path: Path | str) -> ImageFiles | None:
    """The image processor's files of a directory, or of a model on the hub; None: there are none.

    Raises:
        ValueError: they cannot be read, or normalise in a way that is none.
    """
    said = _said(Path(path))
    if said is None:
        return None
    from transformers import AutoImageProcessor

    processor, problem, settings = None, "", said
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(str(path), backend="pil", trust_remote_code=False)
            settings = said | processor.to_dict()
    except Exception as error:  # a class of somebody's own, or values that theirs does not take
        problem = reason(error)
    named = said.get("image_processor_type", said.get("feature_extractor_type"))
    if processor is None and named and (said.get("image_mean") is None or said.get("image_std") is None):
        raise InputError(f"{path}: its image processor {named!r} cannot be built, and its file leaves mean and std to it; {problem}")
    return ImageFiles(settings, _normalisation(path, settings), processor, problem)


def pil_processor(path: Path | str) -> Any:
    """The whole processor of a directory, as transformers makes it, with its images on the PIL backend. Where torchvision is installed, transformers
    itself takes classes that use it, which resize a little otherwise than training does.
    """
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if (files := read_image_files(path)) and files.processor is not None:
        processor.image_processor = files.processor
    return processor


def _said(path: Path) -> dict[str, Any] | None:
    """The settings as they are written: nested ones come first, as in transformers. Files of video processors are others."""
    if not path.is_dir():
        return _said_on_the_hub(str(path))
    check_files(path)
    for name, nested in ((PROCESSOR, True), (PREPROCESSOR, False)):
        if not (path / name).is_file():
            continue
        found = read_object(path / name)
        found = found.get("image_processor") if nested else found
        if isinstance(found, dict):
            return found
        if found is not None:
            raise InputError(f"{path / name}: image_processor holds no JSON object")
    return None


def _said_on_the_hub(name: str) -> dict[str, Any] | None:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:  # the model has none
        return None


def _normalisation(path: Path | str, settings: dict[str, Any]) -> Normalisation | None:
    """Theirs is (x * factor - mean) / std of x from 0 to 255; ours (x / 255 - mean) / std."""
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if settings.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        return None
    values = [list(value) if isinstance(value, list | tuple) else [] for value in (mean, std)]
    fine = all(len(v) == 3 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in v) for v in values)
    if not fine or min(values[1]) <= 0:
        raise InputError(f"{path}: its image processor has image_mean = {mean}, image_std = {std}; three numbers each, std above 0")
    factor = 1.0 if settings.get("do_rescale") is False else settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or factor <= 0:
        raise InputError(f"{path}: its image processor has rescale_factor = {factor!r}: must be more than 0")
    scale = factor * 255
    if abs(scale - 1) > 1e-6:
        values = [[x / scale for x in v] for v in values]
    return [float(x) for x in values[0]], [float(x) for x in values[1]]
