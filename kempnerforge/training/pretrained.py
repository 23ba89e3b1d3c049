"""``kempnerforge.load_pretrained``: a model and its processor, from wherever it is."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from kempnerforge.checkpoint import CheckpointError
from kempnerforge.config import load_config
from kempnerforge.data.batch import Batch, Kind
from kempnerforge.data.collate import prompt_batch
from kempnerforge.data.interleave import Prompt
from kempnerforge.data.sample import ImageSource
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.interop.foreign import open_foreign
from kempnerforge.interop.huggingface import CONFIG, WEIGHTS
from kempnerforge.training.convert import JOB_FILE, TOKENIZER, read_tokenizer
from kempnerforge.training.restore import restore
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.vlm.base import VLM

Picture = Image.Image | Path | str | bytes | np.ndarray
"""An image: opened, a file, encoded, or (H, W, 3) uint8 RGB."""

AS_IT_IS = ("PaliGemmaForConditionalGeneration", "LlavaForConditionalGeneration")
"""Classes with images whose processors are followed to the letter."""


@dataclass(frozen=True)
class Inputs(Mapping[str, Tensor]):
    """What a processor makes: the tensors that processors of transformers make, and the batch that our models take.

    Attributes:
        input_ids: (B, S) int64, left padded; positions of images hold the image token.
        attention_mask: (B, S) int64.
        pixel_values: (N, 3, H, W) fp32, normalised; None without images.
        batch: the same as a ``Batch``.
        end_id: the token that ends an answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    batch: Batch
    end_id: int

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return found if self.pixel_values is None else found | {"pixel_values": self.pixel_values}


class Processor:
    """From images and texts to what a model reads.

    A model that was trained here gets its texts as in training, by its template. One that comes from transformers gets the ids and the
    pixels that the processor of its class makes: PaliGemma's puts images, BOS and a line break around a prompt, LLaVA's takes the text as
    it is, with "<image>" where an image stands, and a language model's tokenizer takes it as it is, too.

    Args:
        assembly: of the model.
        architecture: its class in transformers, if it comes from there.
        image_id: the token at positions of images, if the source says.
    """

    def __init__(self, assembly: Assembly, architecture: str = "", image_id: int | None = None) -> None:
        self.assembly, self.architecture = assembly, architecture
        self.tokenizer, self.layout = assembly.tokenizer, assembly.layout
        self.encoder = assembly.encoder(assembly.stages[-1])
        self.placeholder = self.encoder.texts[0].cfg.image_placeholder
        self.image_token_id = self.tokenizer.token_id(self.placeholder) if image_id is None else image_id
        self.end_id = self.encoder.texts[0].end_id
        # NOTE: a copy that knows special tokens inside a text, as tokenizers of transformers do
        self._plain = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
        self._plain.encode_special_tokens = False

    def __call__(
        self, images: Picture | Sequence[Picture | Sequence[Picture]] | None = None, text: str | Sequence[str] = ""
    ) -> Inputs:  # fmt: skip
        """One prompt or several.

        Args:
            images: those of the prompt; of several prompts one image each, or a list of images each.
            text: the prompts.

        Raises:
            ValueError: images and prompts do not fit together, or an image cannot be used.
        """
        texts = [text] if isinstance(text, str) else list(text)
        sources = [[_encoded(image) for image in group] for group in _grouped(images, len(texts))]
        if any(sources) and not self.assembly.model.has_images:
            raise ValueError("this model was trained on text alone and takes no image")
        prompts = [self._prompt(words, group) for words, group in zip(texts, sources, strict=True)]
        views = [self._views(prompt, group) for prompt, group in zip(prompts, sources, strict=True)]
        pixels, numbers = None, None
        if self.assembly.model.has_images:
            size = self.layout.image_size
            flat = [view for row in views for view in row]
            stack = np.stack(flat) if flat else np.zeros((0, size, size, 3), np.uint8)  # (N, H, W, 3)
            pixels = torch.from_numpy(stack).permute(0, 3, 1, 2)
            ends = np.cumsum([len(row) for row in views])
            numbers = [range(end - len(row), end) for row, end in zip(views, ends.tolist(), strict=True)]
        batch = prompt_batch(prompts, pixels, numbers, self.layout, self.tokenizer.pad_id)
        ids = batch.input_ids
        if self.image_token_id is not None:
            ids = ids.masked_fill(batch.kinds == Kind.IMAGE, self.image_token_id)
        normalised = self._normalised(pixels) if pixels is not None and len(pixels) else None
        return Inputs(ids, (batch.kinds != Kind.PAD).long(), normalised, batch, self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens."""
        return self.tokenizer.decode(ids)

    def _prompt(self, text: str, images: Sequence[ImageSource]) -> Prompt:
        if not self.architecture.endswith("ForCausalLM") and self.architecture not in AS_IT_IS:
            return self.encoder.encode_question(text, images)
        if self.architecture.startswith("Pali"):
            if self.placeholder not in text:
                text = self.placeholder * len(images) + text
            behind = text.rfind(self.placeholder) + len(self.placeholder) if self.placeholder in text else 0
            text = f"{text[:behind]}{self.tokenizer.bos}{text[behind:]}\n"
        found = self._plain.encode(text, add_special_tokens=not self.architecture.startswith("Pali")).ids
        ids: list[int] = []
        at: list[int] = []
        for token in found:
            (at if token == self.image_token_id else ids).append(len(ids) if token == self.image_token_id else token)
        if len(at) != len(images):
            raise ValueError(f"{len(at)} of {self.placeholder!r} in the text and {len(images)} images: must be as many")
        return Prompt(ids, tuple(at), tuple(self.encoder.images[0].blocks(images)))

    def _views(self, prompt: Prompt, images: Sequence[ImageSource]) -> list[np.ndarray]:
        blocks = zip(images, prompt.blocks_of(self.layout.image_tokens), strict=True)
        return [view for image, block in blocks for view in self.encoder.images[0].load(image, len(block.starts))]

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.assembly.model.normalisation)
        return (pixels.float() / 255 - mean) / std


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
        raise ValueError(f"{len(groups)} images or lists of images for {texts} texts: must be as many")
    return groups


def _encoded(image: Picture) -> ImageSource:
    """As the data code takes it. What is opened already becomes a PNG, which loses nothing and is decoded at its full size."""
    if isinstance(image, bytes | Path):
        return image
    if isinstance(image, str):
        return Path(image)
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.convert("RGB").save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


# ---- loading --------------------------------------------------------------------------------------------------------


def load_pretrained(
    path: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """A model to use, and what makes its inputs.

    ::

        model, processor = kempnerforge.load_pretrained("runs/quickstart")
        inputs = processor(images=Image.open("a.png"), text="what shape is in the image?")
        print(processor.decode(model.generate(inputs, max_new_tokens=16)[0]))

    Args:
        path: a checkpoint or run directory; what ``kempnerforge import`` or ``export`` has made; or a directory of transformers (of a language
            model, PaliGemma, LLaVA, Idefics3, SmolVLM) or of nanoVLM.
        device: where to; None: a GPU if there is one.
        dtype: None: what the run computes in; fp32 for models from elsewhere.

    Raises:
        ValueError: nothing is there that can be loaded.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        model, processor = _foreign(path)
    elif (path / JOB_FILE).is_file() and (path / WEIGHTS).is_file():
        model, processor = _exported(path)
    else:
        try:
            restored = restore(path, ["--train.mixed_precision=fp32"] if dtype is not None else [], data=False)
        except CheckpointError as error:
            raise ValueError(
                f"{error}; models are loaded from checkpoints, run directories, exports and directories with a {CONFIG}"
            ) from None
        imported = restored.manifest.state.get("imported", {})
        model = restored.assembly.model
        processor = Processor(restored.assembly, imported.get("architecture", ""), imported.get("image_id"))
    target = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device=target, dtype=dtype)
    return model.eval(), processor


def _foreign(path: Path) -> tuple[VLM, Processor]:
    foreign = open_foreign(path)
    assembly = assemble(foreign.job, read_tokenizer(path, None), data=False)
    assembly.model.load_state_dict(foreign.read(), strict=True, assign=True)
    return assembly.model, Processor(assembly, foreign.architecture, foreign.image_id)


def _exported(path: Path) -> tuple[VLM, Processor]:
    assembly = assemble(load_config(path / JOB_FILE), Tokenizer.from_pretrained((path / TOKENIZER).resolve()), data=False)
    tensors = load_file(path / WEIGHTS)
    own = dict(assembly.model.named_parameters())
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"{path / WEIGHTS}: its names are not those of {path / JOB_FILE}: {', '.join(different[:4])}")
    assembly.model.load_state_dict(tensors, strict=False)
    return assembly.model, Processor(assembly)
