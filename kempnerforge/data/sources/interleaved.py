"""Documents in which images are among the text, all of it trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, one_of, only_if
from kempnerforge.config.data import RowsConfig
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Text
from kempnerforge.data.sources.hf_rows import open_rows
from kempnerforge.data.sources.pictures import count_images
from kempnerforge.data.sources.row_text import as_text, nested_size
from kempnerforge.data.sources.table import RowSource, require_columns
from kempnerforge.util.errors import InputError, show

FORMS = {"text": ("text", "images"), "lists": ("texts", "images"), "mmc4": ("text_list", "image_info")}
"""Columns of texts and images, by ``data.form``."""
INFO = ("image_name", "matched_text_index", "matched_sim", "raw_url", "face_detections", "is_new")
METADATA = ("id", "url", "metadata", "general_metadata", "similarity_matrix", "could_have_url_duplicate")
"""What OBELICS and MMC4 have beside texts and images."""
Part = str | tuple[ImageSource, ...]
"""A stretch of text, or an image (in a tuple of one)."""


@registry.register_data_config
@dataclass
class InterleavedConfig(RowsConfig):
    """JSON lines or a JSON list, Parquet, or a directory of ``save_to_disk``. A document is written without a
    template, BOS in front and EOS after it.

    Attributes:
        form: "text": ``text`` with ``image_token`` at the places of ``images``. "lists": ``texts`` and
            ``images``, lists of the same length, of which at each place one is null (OBELICS, Laurençon et
            al. 2023). "mmc4": sentences in ``text_list``, and ``image_info`` with ``image_name``,
            ``matched_text_index`` and ``matched_sim`` (Zhu et al. 2023); an image is before the sentence it
            matches.
        image_token: of form "text".
        joiner: between the texts of "lists" and the sentences of "mmc4" that no image parts.
        before_image: written in front of every image but the first, such as "<|endofchunk|>" (OpenFlamingo).
        max_images: further images of a document are left out; 0 takes all.
        min_similarity: of form "mmc4": images that match their sentence less are left out.
    """

    source: str = "interleaved"
    prompt_template: str = "{prompt}"
    form: str = "text"
    image_token: str = "<image>"
    joiner: str = " "
    before_image: str = ""
    max_images: int = 0
    min_similarity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", FORMS)
        at_least(self, 0, "max_images")
        if self.template != "prompt":
            raise InputError(f"template = {self.template!r}: a document has no turns; only 'prompt' is allowed")
        only_if(self, self.form == "text", "form = 'text'", "image_token")
        only_if(self, self.form != "text", "form = 'lists' or 'mmc4'", "joiner")
        only_if(self, self.form == "mmc4", "form = 'mmc4'", "min_similarity")
        only_if(self, self.max_images != 1, "max_images = 0 or 2 and more", "before_image")
        if not self.image_token.strip():
            raise InputError(f"image_token = {self.image_token!r}: must not be blank")


@registry.register_source("interleaved")
class Interleaved(RowSource):
    """One sample per document, with one text."""

    captions = True
    cfg: InterleavedConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: InterleavedConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._texts, self._images = FORMS[cfg.form]
        self.known = dict.fromkeys(METADATA) | {self._texts: None, self._images: dict.fromkeys(INFO) if cfg.form == "mmc4" else None}
        self.rows = open_rows(self, self._measure, [self._texts], [self._images])
        require_columns(self.path, self.rows.columns, dict.fromkeys(FORMS[cfg.form], f"data.form = {cfg.form!r}"))
        self.rows.judge(self)

    def _measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        images = count_images(row.get(self._images))
        return nested_size(row.get(self._texts)), min(images, self.cfg.max_images or images)

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        texts, images = row.get(self._texts), row.get(self._images)
        parts = {"text": self._of_text, "lists": self._of_lists, "mmc4": self._of_mmc4}[self.cfg.form](texts, images)
        written, kept = "", []
        for part in parts:
            if isinstance(part, str):
                written += part
            elif not self.cfg.max_images or len(kept) < self.cfg.max_images:
                written += (self.cfg.before_image if kept else "") + self.cfg.image_placeholder
                kept += part
        if not written.replace(self.cfg.image_placeholder, "").strip():
            raise SampleError("no text")
        return Sample(name, tuple(kept), (Text("", written),))

    def _of_text(self, text: Any, images: Any) -> list[Part]:
        text = as_text(text, f"column {self._texts!r}")
        listed = images if isinstance(images, list) else [] if images is None else [images]
        first, *pieces = text.split(self.cfg.image_token)
        if len(pieces) != len(listed):
            raise SampleError(f"{len(pieces):,} of {self.cfg.image_token!r} and {len(listed)} images")
        parts: list[Part] = [first]
        for image, piece in zip(listed, pieces, strict=True):
            parts += [self._image(image), piece]
        return parts

    def _of_lists(self, texts: Any, images: Any) -> list[Part]:
        if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
            raise SampleError("'texts' and 'images': must be lists of the same length")
        parts: list[Part] = []
        for text, image in zip(texts, images, strict=True):
            if (text is None) == (image is None):
                raise SampleError("'texts' and 'images': at each place there must be a string or an image")
            if text is not None:
                text = as_text(text, f"column {self._texts!r}")
                parts += [self.cfg.joiner, text] if parts and isinstance(parts[-1], str) else [text]
            else:
                parts.append(self._image(image))
        return parts

    def _of_mmc4(self, texts: Any, images: Any) -> list[Part]:
        if not isinstance(texts, list):
            raise SampleError("'text_list': must be a list of strings")
        texts = [as_text(text, f"column {self._texts!r}") for text in texts]
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise SampleError("'image_info': must be a list of objects")
        matched: dict[int, list[Any]] = {}
        for image in images:
            where, similarity = image.get("matched_text_index"), image.get("matched_sim", 1.0)
            if not isinstance(where, int) or not 0 <= where < len(texts) or not isinstance(similarity, int | float):
                raise SampleError(f"'image_info': matched_text_index = {show(where)}, there are {len(texts)} sentences")
            if similarity >= self.cfg.min_similarity:
                matched.setdefault(where, []).append(image.get("image_name"))
        parts: list[Part] = []
        for k, text in enumerate(texts):
            parts += [self.cfg.joiner] if k else []
            parts += [*(self._image(image) for image in matched.get(k, ())), text]
        return parts

    def _image(self, value: Any) -> tuple[ImageSource, ...]:
        found = self.images_of(value, self._images)
        if len(found) != 1:
            raise SampleError(f"column {self._images!r}: an image is missing")
        return found
