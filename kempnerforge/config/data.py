"""``[data]``: where samples come from and how they become batches. One dataclass per source, selected by ``source``."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, fraction, one_of


@dataclass
class DataConfig:
    """What every source has. Subclasses register with ``@registry.register_data_config``.

    Attributes:
        source: which source.
        tokenizer: "train" makes a small byte-level BPE from the training text; otherwise a local directory or a hub id.
        tokenizer_vocab_size: size of the trained one at most.
        prompt_template, answer_template: what the model reads and what it is trained to write; "{prompt}" and "{answer}" stand for the
            sample's. BOS goes before the prompt, EOS behind the answer; the loss is on answer and EOS.
        image_placeholder: marks the place of an image in prompts, answers and templates: the k-th of a text is the sample's image k. A
            sample whose texts have none has its images in front; else each of its texts needs as many as there are images. Images that
            lead all texts stand in front, once. In a job without images placeholders are left out.
        batching: "group" puts samples of like length together and pads to the longest of a batch; "pad" pads to the full length.
        num_workers: loader processes; 0 loads in the training process.
        max_bad_fraction: unreadable samples are skipped and counted; more than this share of those seen stops the run.
        image_cache_mib: decoded images kept in memory, per process.
        needs_images: no key, but a fact about the class: its samples make no sense to a job without ``[vlm]``.
    """

    needs_images: ClassVar[bool] = False

    source: str = "easy_vqa"
    tokenizer: str = "train"
    tokenizer_vocab_size: int = 512
    prompt_template: str = "{prompt}\n"
    answer_template: str = "{answer}"
    image_placeholder: str = "<image>"
    batching: str = "group"
    num_workers: int = 0
    max_bad_fraction: float = 0.01
    image_cache_mib: int = 256

    def sections(self) -> list[DataConfig]:
        """The sections whose samples this one mixes, ``Sample.part`` counts them; a section that mixes nothing is its own only one."""
        return [self]

    def __post_init__(self) -> None:
        one_of(self, "batching", ("group", "pad"))
        at_least(self, 0, "num_workers", "image_cache_mib")
        at_least(self, 300, "tokenizer_vocab_size")
        fraction(self, "max_bad_fraction")
        if not self.image_placeholder.strip() or set(self.image_placeholder) & set("{}"):
            raise ValueError(f"image_placeholder = {self.image_placeholder!r}: must not be blank or hold a brace")
        for key, name in (("prompt_template", "prompt"), ("answer_template", "answer")):
            try:
                found = [part for _, part, _, _ in Formatter().parse(getattr(self, key)) if part is not None]
            except ValueError as error:
                raise ValueError(f"{key} = {getattr(self, key)!r}: {error}") from None
            if found != [name]:
                raise ValueError(f"{key} = {getattr(self, key)!r}: must contain {{{name}}} once and no other field")


@registry.register_data_config
@dataclass
class EasyVQAConfig(DataConfig):
    """easy-VQA (the PyPI package ``easy-vqa``): questions about one coloured shape, with the official train/test split.

    Attributes:
        form: "questions", all of an image together; or "captions", what the training answers say of an image ("circle red").
        with_captions: with "questions", the caption rides along in training as one more text of its image.
    """

    needs_images: ClassVar[bool] = True

    source: str = "easy_vqa"
    form: str = "questions"
    with_captions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", ("captions", "questions"))
        if self.with_captions and self.form == "captions":
            raise ValueError("with_captions = true: only form = 'questions' reads it")


@dataclass
class TableConfig(DataConfig):
    """Rows with an image and texts, by column name.

    Attributes:
        path: the training rows.
        eval_path: the held-out rows; empty means there are none and nothing is evaluated.
        root: images given by relative paths lie below it; empty means the directory of the rows. No path may leave it.
        image_column: a path, or bytes, or a list of either; empty for text-only rows.
        prompt_column: empty means no prompt (captions).
        answer_column: the text that is trained.
        texts_column: instead of prompt and answer: a list of ``{prompt, answer}`` objects, several texts of one image.
    """

    path: str = ""
    eval_path: str = ""
    root: str = ""
    image_column: str = "image"
    prompt_column: str = ""
    answer_column: str = "answer"
    texts_column: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError(f"path = '': source {self.source!r} needs one")
        if not self.answer_column and not self.texts_column:
            raise ValueError("answer_column = '': name the column of the trained text, or set texts_column")


@registry.register_data_config
@dataclass
class JsonlConfig(TableConfig):
    """A JSONL file, one object a line."""

    source: str = "jsonl"


@registry.register_data_config
@dataclass
class HFDatasetConfig(TableConfig):
    """A Hugging Face dataset: a directory of ``save_to_disk``, a Parquet/CSV/JSON file, or a hub id where there is a network.

    Attributes:
        split, eval_split: of a dataset that has splits; ``eval_split`` empty means ``eval_path`` alone says what is held out.
    """

    source: str = "hf_dataset"
    split: str = "train"
    eval_split: str = ""


@registry.register_data_config
@dataclass
class TextConfig(DataConfig):
    """Plain text: a file, cut into windows of ``train.seq_len`` tokens, all of them trained.

    Attributes:
        path: the training text, UTF-8.
        eval_path: held-out text; empty means nothing is evaluated.
    """

    source: str = "text"
    path: str = ""
    eval_path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("path = '': source 'text' needs one")
