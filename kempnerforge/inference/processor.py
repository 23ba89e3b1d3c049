"""From images and texts to the inputs of a model: the processor that ``load_pretrained`` returns.

Shapes: B rows, S positions, N views, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.batching.collate import prompt_batch, stack_views
from kempnerforge.data.images.decode import image_size, opened
from kempnerforge.data.sample import ImageSource, Sample
from kempnerforge.data.text.encode import Encoded
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.interop.external import ExternalModel
from kempnerforge.interop.processors import differing_settings, followed_processor
from kempnerforge.interop.vlm_family import FAKE, FRAME, FRAMED, LLAVA, PALIGEMMA, VLMFamily
from kempnerforge.interop.vlms import VLM_FAMILIES
from kempnerforge.model.image_processor import ImageSettings, read_image_settings
from kempnerforge.model.quiet import quiet
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError, reason

Picture = Image.Image | Path | str | bytes | np.ndarray
"""An image: opened, a file, encoded, or (H, W, 3) uint8 RGB."""
SAME_PIXELS = 1e-3
"""Of normalised pixels; the smallest step of an 8-bit pixel is at least four times as large."""
AS_IT_IS = "tokenizer"
"""What ``Processor`` follows for a language model: the text is the prompt."""


@dataclass(frozen=True)
class Inputs(Mapping[str, Tensor]):
    """What a processor makes: the tensors that processors of transformers make, and the batch that our models
    take.

    Attributes:
        input_ids: (B, S) int64, left padded; positions of images hold the image token.
        attention_mask: (B, S) int64.
        pixel_values: (N, 3, H, W) fp32, normalised; (B, images of a row, 3, H, W), filled up with zeros,
            where the class takes it so; None without images.
        image_sizes: (N, 2) heights and widths of the images, where the class reads them (LLaVA-NeXT).
        batch: the same as a ``Batch``.
        end_id: the token that ends an answer, or several.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    batch: Batch
    end_id: int | frozenset[int]
    image_sizes: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        images = {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}
        return found | {name: tensor for name, tensor in images.items() if tensor is not None}


class Processor:
    """From images and texts to what a model reads.

    A model that was trained here gets its texts as in training, by its template. One that comes from
    transformers gets the ids and the pixels that its processor there makes: PaliGemma's puts images, BOS and
    a line break around a prompt; LLaVA's takes the text as it is, with "<image>" where an image is; Idefics
    3's also puts tokens around each image; and a language model's tokenizer takes the text as it is, too. Of
    images it follows those that make one square view; ``load_pretrained`` says where a directory has another.

    Images are upright and transparency is laid on white, as in training. Only where a processor of
    transformers is followed, an image that is opened already is not turned by its EXIF orientation, as there.

    Args:
        assembly: of the model.
        follows: the class of the processor in transformers that is followed, or ``AS_IT_IS``; empty: the
            template.
        image_id: the token at positions of images, if the source says.
        by_row: ``pixel_values`` have an axis for the images of a row.

    Raises:
        ValueError: the tokenizer does not have the tokens that such a processor writes.
    """

    def __init__(self, assembly: Assembly, follows: str = "", image_id: int | None = None, *, by_row: bool = False) -> None:
        self.assembly, self.follows, self.by_row = assembly, follows, by_row
        self.tokenizer, self.layout = assembly.tokenizer, assembly.data.layout
        self.encoder = assembly.data.encoder(assembly.stages[-1])
        self.placeholder = self.encoder.texts[0].cfg.image_placeholder
        self.image_token_id = self.tokenizer.token_id(self.placeholder) if image_id is None else image_id
        stops = self.encoder.texts[0].stops
        self.end_id = stops if len(stops) > 1 else min(stops)
        # NOTE: a copy that knows special tokens inside a text, as tokenizers of transformers do
        self._plain = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
        self._plain.encode_special_tokens = False
        if follows in FRAMED and self.tokenizer.token_id(FAKE) is None:
            raise InputError(f"the tokenizer has no {FAKE!r}, which a {follows} puts around images")

    def __call__(
        self, images: Picture | Sequence[Picture | Sequence[Picture]] | None = None, text: str | Sequence[str] = ""
    ) -> Inputs:  # fmt: skip
        """One prompt or several.

        Args:
            images: of the prompt; for several prompts one image each, or a list of images each.
            text: the prompts.

        Raises:
            ValueError: images and prompts do not fit together, or an image cannot be used.
        """
        texts = [text] if isinstance(text, str) else list(text)
        literally = self.follows not in ("", AS_IT_IS)
        sources = [self._sources(group, literally) for group in _grouped(images, len(texts))]
        prompts = [self.prompt(words, group) for words, group in zip(texts, sources, strict=True)]
        batch = self.batch(prompts, sources)
        ids = batch.input_ids
        if self.image_token_id is not None:
            ids = self.assembly.model.with_image_ids(batch, self.image_token_id)
        normalised = shapes = None
        if batch.images is not None and len(batch.images):
            normalised = self._normalised(batch.images, batch.image_rows.bincount(minlength=len(texts)).tolist())
            if self.encoder.images[0].cfg.rows:
                shapes = torch.tensor([image_size(source)[::-1] for group in sources for source in group])  # (N, 2)
        return Inputs(ids, (batch.kinds != Kind.PAD).long(), normalised, batch, self.end_id, shapes)

    def answered(self, images: Sequence[Picture], text: str, answer: str) -> Encoded:
        """One row of a prompt and its answer, by the template: its labels are the answer and the token that
        ends it.

        Raises:
            ValueError: images and prompt do not fit together, an image cannot be used, or it is too long.
        """
        sources = self._sources(images, literally=False)
        row = replace(self.encoder.asked(text, len(sources)), answer=answer)
        return self.encoder.encode(Sample(repr(text), tuple(sources), (row,)), seed=0)

    def batch(self, prompts: Sequence[Prompt], images: Sequence[Sequence[ImageSource]]) -> Batch:
        """Rows to generate from: each prompt with its own images."""
        views = [self.views(prompt, group) for prompt, group in zip(prompts, images, strict=True)]
        pixels, numbers = None, None
        if self.assembly.model.has_images:
            pixels = stack_views([view for row in views for view in row], self.layout.image_size)
            ends = np.cumsum([len(row) for row in views])
            numbers = [range(end - len(row), end) for row, end in zip(views, ends.tolist(), strict=True)]
        return prompt_batch(prompts, pixels, numbers, self.layout, self.tokenizer.pad_id)

    def normalised_views(self, image: Picture) -> Tensor:
        """(V, 3, H, W) normalised pixels of the views of an image."""
        pixels = stack_views(self.encoder.images[0].load(_encoded(image, literally=True)), self.encoder.layout.image_size)
        return self._normalised(pixels, [len(pixels)]).reshape(pixels.shape)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens."""
        return self.tokenizer.decode(ids)

    def prompt(self, text: str, images: Sequence[ImageSource], history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """The row of a question about ``images``, without them.

        Args:
            history: (prompt, answer) of the turns before, which are written by the template.

        Raises:
            ValueError: it cannot be asked.
        """
        if not self.follows or history:
            return self.encoder.ask(text, images, history)
        if self.follows == PALIGEMMA:
            if self.placeholder not in text:
                text = self.placeholder * len(images) + text
            after = text.rfind(self.placeholder) + len(self.placeholder) if self.placeholder in text else 0
            text = f"{text[:after]}{self.tokenizer.bos}{text[after:]}\n"
        elif self.follows in FRAMED:
            text = text.replace(self.placeholder, FRAME)
        literal = self.follows in (PALIGEMMA, AS_IT_IS)
        found = self._plain.encode(text, add_special_tokens=not literal).ids
        if self.follows == AS_IT_IS and self.tokenizer.start_id is not None:  # what a tokenizer puts after a text would end a prompt
            found = [self.tokenizer.start_id, *found]
        ids: list[int] = []
        at: list[int] = []
        for token in found:
            (at if token == self.image_token_id else ids).append(len(ids) if token == self.image_token_id else token)
        if len(at) != len(images):
            raise InputError(f"{len(at)} of {self.placeholder!r} in the text and {len(images)} images: must be as many")
        if not ids and not at:
            raise InputError("text = '': a prompt without an image needs at least one token")
        return Prompt(ids, tuple(at), tuple(self.encoder.images[0].blocks(images)))

    def views(self, prompt: Prompt, images: Sequence[ImageSource]) -> list[np.ndarray]:
        """The views of ``images``, (H, W, 3) uint8 each."""
        blocks = zip(images, prompt.blocks_of(self.layout.image_tokens), strict=True)
        return [view for image, block in blocks for view in self.encoder.images[0].load(image, block.views)]

    def _sources(self, images: Sequence[Picture], literally: bool) -> list[ImageSource]:
        if images and not self.assembly.model.has_images:
            raise InputError("this model was trained on text alone and takes no image")
        return [_encoded(image, literally) for image in images]

    def _normalised(self, pixels: Tensor, counts: Sequence[int]) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.assembly.model.normalisation)
        normalised = (pixels.float() / 255 - mean) / std  # (N, 3, H, W)
        if not self.by_row:
            return normalised
        return pad_sequence([*normalised.split(list(counts))], batch_first=True)  # (B, images of a row, 3, H, W)


def _grouped(images: Picture | Sequence[Picture | Sequence[Picture]] | None, texts: int) -> list[list[Picture]]:
    """The images of each text."""
    if images is None:
        return [[] for _ in range(texts)]
    if isinstance(images, Image.Image | Path | str | bytes | np.ndarray):
        return [[images] for _ in range(texts)]
    groups: list[list[Any]] = [list(group) if isinstance(group, list | tuple) else [group] for group in images]
    if texts == 1 and not any(isinstance(group, list | tuple) for group in images):
        return [[image for group in groups for image in group]]
    if len(groups) != texts:
        raise InputError(f"{len(groups)} images or lists of images for {texts} texts: must be as many")
    return groups


def _encoded(image: Picture, literally: bool) -> ImageSource:
    """As the data code takes it. What is opened already becomes a PNG, which loses nothing and is decoded at
    its full size.

    Args:
        literally: as processors of transformers do it: files are decoded at full size, opened images are not
            turned, 16 bits become 8 by clipping.
    """
    if isinstance(image, str):
        image = Path(image)
    if isinstance(image, bytes | Path):
        if not literally:
            return image
        with opened(image) as picture:
            picture.allow(0)
            image = picture.pixels(picture.size)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if not literally:
        image = ImageOps.exif_transpose(image)
    if literally or not image.mode.startswith("I"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


# ---- models of transformers ----------------------------------------------------------------------


def origin(assembly: Assembly, external: ExternalModel) -> tuple[dict[str, Any], str]:
    """The origin of a model, as it is kept in a run that is made of it; and what a person should know of
    its processor, or nothing.
    """
    kept: dict[str, Any] = {"source": str(external.path), "architecture": external.architecture, "image_id": external.image_id}
    if not assembly.model.has_images or not external.can_be_compared or external.notes:  # which say it
        return kept, ""
    files, side, family = read_image_settings(external.path), assembly.data.layout.image_size, _family(external.architecture)
    name, other = followed_processor(external.path, family.kind if family else ""), other_pixels(Processor(assembly), files)
    tiled = assembly.job.data.images.tiled
    if other and files is not None and not tiled:
        other += differing_settings(files, side)
    called = name or "image processor"
    if name in FRAMED and assembly.tokenizer.token_id(FAKE) is None:
        name = LLAVA
        other.append(f"{FAKE!r} around images, which the tokenizer does not have")
    here = "its views are made as data.images says" if tiled else f"an image is one square of {side} pixels, bicubic"
    line = f"its {called} does otherwise with images ({'; '.join(other)}): here {here}, so ids and pixels are not the same"
    return kept | ({"processor": name} if name else {}), line if other else ""


def other_pixels(ours: Processor, files: ImageSettings | None) -> list[str]:
    """What the source's own image processor makes of images that ours does not; empty: the same pixels."""
    if files is None:
        return ["it has no files of an image processor; mean and std are the family's"]
    if files.processor is None:
        return [f"it cannot be run: {files.problem}"]
    furthest, side = 0.0, ours.layout.image_size
    for width, height in ((side, side), (2 * side, side), (61, 37), (23, 90)):
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            with quiet():
                made = files.processor(images=Image.fromarray(noise), return_tensors="pt")["pixel_values"]
        except Exception as error:  # values that its class does not take
            return [f"it refuses an image of {width} x {height} pixels: {reason(error)}"]
        views = made.reshape(-1, *made.shape[-3:])  # (views, 3, H, W)
        views = torch.stack([view for number, view in enumerate(views) if not number or view.any()])  # without empty tiles
        want = ours.normalised_views(noise)
        if views.shape != want.shape:
            return [
                f"an image of {width} x {height} pixels becomes {len(views)} x {tuple(views.shape[1:])}, here {len(want)} x {tuple(want.shape[1:])}"
            ]
        furthest = max(furthest, (views - want).abs().max().item())
    return [f"pixels up to {furthest:.2g} apart"] if furthest > SAME_PIXELS else []


def processing(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Processor`` for a model with this ``origin``; of one that was trained here it is empty."""
    architecture = kept.get("architecture", "")
    family = _family(architecture)
    default = family.processors[0] if family and family.processors and family.processors[0] not in FRAMED else ""
    follows = AS_IT_IS if architecture.endswith("ForCausalLM") else kept.get("processor", default)
    return {"follows": follows, "image_id": kept.get("image_id"), "by_row": bool(family and follows and family.images_by_row)}


def _family(architecture: str) -> VLMFamily | None:
    """The vision-language family with a class of this name."""
    return next((family for family in VLM_FAMILIES.values() if family.architecture == architecture), None)
