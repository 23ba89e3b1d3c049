"""The reader of ``preprocessor_config.json`` and ``processor_config.json``: an image processor of
transformers as image settings of ours.

The class that the files name fills in its defaults, on its PIL backend, so that nothing depends on what else
is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kempnerforge.model.quiet import quiet
from kempnerforge.util.errors import InputError, reason
from kempnerforge.util.reading import check_files, read_object

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


class Normalisation(NamedTuple):
    """Mean and std of RGB values in [0, 1]; empty: not said."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ImageSettings:
    """The settings of an image processor.

    Attributes:
        settings: all keys, with the defaults of the class if it is known.
        normalisation: mean and std that give the same pixels as the processor, with its rescaling folded in;
            None: the files do not say.
        processor: the class of transformers with these settings; None: it cannot be built, because of
            ``problem``.
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


def read_image_settings(path: Path | str) -> ImageSettings | None:
    """The image processor of a directory, or of a model on the hub; None: there is none.

    Raises:
        ValueError: they cannot be read, or normalise in a way that is none.
    """
    written = _written(Path(path))
    if written is None:
        return None
    from transformers import AutoImageProcessor

    processor, problem, settings = None, "", written
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(str(path), backend="pil", trust_remote_code=False)
            settings = written | processor.to_dict()
    except Exception as error:  # a class that is not in transformers, or values that it does not take
        problem = reason(error)
    named = written.get("image_processor_type", written.get("feature_extractor_type"))
    if processor is None and named and (written.get("image_mean") is None or written.get("image_std") is None):
        raise InputError(f"{path}: its image processor {named!r} cannot be built, and its file leaves mean and std to it; {problem}")
    return ImageSettings(settings, _normalisation(path, settings), processor, problem)


def processor_classes(path: Path) -> list[str]:
    """The classes of processors that the files in a directory name, the one that transformers takes first."""
    files = [read_object(path / name) for name in (PROCESSOR, PREPROCESSOR) if (path / name).is_file()]
    return [file["processor_class"] for file in files if isinstance(file.get("processor_class"), str)]


def pil_processor(path: Path | str) -> Any:
    """The whole processor of a directory, as transformers makes it, with its images on the PIL backend. Where
    torchvision is installed, transformers takes classes that use it, which resize slightly differently from
    training.
    """
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if (files := read_image_settings(path)) and files.processor is not None:
        processor.image_processor = files.processor
    return processor


def _written(path: Path) -> dict[str, Any] | None:
    """The settings as they are written, nested ones first, as in transformers. Files of video processors are
    not read.
    """
    if not path.is_dir():
        return _written_on_the_hub(str(path))
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


def _written_on_the_hub(name: str) -> dict[str, Any] | None:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:  # the model has none
        return None


def _normalisation(path: Path | str, settings: dict[str, Any]) -> Normalisation | None:
    """The processor computes (x * factor - mean) / std of x from 0 to 255; our encoders compute (x / 255 -
    mean) / std.
    """
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
    return Normalisation(*([float(x) for x in v] for v in values))
