"""``[data]``: where samples come from and how they become batches. One dataclass per source, selected by
``source``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, fraction, one_of, only_if
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.template import TurnsConfig, check_template
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText
from kempnerforge.util.plugin_returns import check_returns, sequence_of

JOB_KEYS = (
    "tokenizer",
    "tokenizer_vocab_size",
    "batching",
    "group_by",
    "max_images_per_row",
    "num_workers",
    "max_bad_fraction",
    "image_cache_mib",
    "validation",
)
"""Keys that hold for a whole job and not for one part of a mixture."""


@dataclass
class DataConfig:
    """The keys of every source. Subclasses register with ``@registry.register_data_config``.

    Attributes:
        source: which source.
        tokenizer: "train" makes a small byte-level BPE from the training text (of 200,000 samples, where a
            source has more); otherwise a local directory or a hub id.
        tokenizer_vocab_size: size of the trained one at most.
        template: how texts are written. "prompt": by ``prompt_template`` and ``answer_template``, turn by
            turn, EOS after each answer. "chat": by the tokenizer's own chat template. "plain": image, answer,
            line break; prompts are left out (LLaVA's first stage). "paligemma": BOS, prompt, line break,
            answer, EOS; one turn. "turns": by ``turns``. "caption": the answer and EOS alone, for embeddings
            (CLIP); "padded_caption": and then padding up to ``vlm.max_text_len``, which is read (SigLIP). The
            loss is on answers and their ends alone.
        prompt_template, answer_template: what the model reads and what it is trained to write; "{prompt}" and
            "{answer}" are replaced by the sample's. BOS goes before the first prompt.
        system: the system prompt of conversations that have none, for templates that have a place for it.
        turns: settings of template "turns".
        truncate: a text that is longer than ``vlm.max_text_len`` is skipped; true cuts it: the last turns are
            left out, then the end of the answer, but never an image or the end token.
        image_placeholder: marks the place of an image in prompts, answers and templates: the k-th of a text
            is the sample's image k. A sample whose texts have none has its images in front; else each of its
            texts needs as many as there are images. Images that lead all texts are in front, once. In a job
            without images placeholders are left out.
        batching: "group" puts samples of like length together and pads to the longest of a batch; "pad" pads
            to the full length; "pack" puts several samples into rows of ``train.seq_len`` positions, and
            ``train.batch_size`` counts rows then.
        group_by: of "group": "characters" estimates how long a row is from its texts, in steps of 16
            positions, so that texts that are alike do not fill whole batches; "positions" measures every row
            and sorts by that, with more samples at a time: least padding.
        max_images_per_row: of "pack"; a tile of an image counts as one. Samples with more are skipped. 0: as
            many as there is room for.
        num_workers: loader processes; 0 loads in the training process.
        max_bad_fraction: unreadable samples are skipped and counted; more than this share of those seen stops
            the run, and of those held out it keeps the run from starting.
        image_cache_mib: decoded images kept in memory, per process.
        validation: share of the training samples that is held out in place of the held-out split, which is
            not read then: for choosing a learning rate, say. 0: none.
        images: what an image becomes: one square or several, and how it is changed in training.
        needs_images: no key, but a fact about the class: its samples make no sense to a job without
            ``[vlm]``.
        unread: no key either: the keys above that samples of this class have no use for.
    """

    needs_images: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()

    source: str = "easy_vqa"
    tokenizer: PathText = "train"
    tokenizer_vocab_size: int = 512
    template: str = "prompt"
    prompt_template: str = "{prompt}\n"
    answer_template: str = "{answer}"
    system: str = ""
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    truncate: bool = False
    image_placeholder: str = "<image>"
    batching: str = "group"
    group_by: str = "characters"
    max_images_per_row: int = 0
    num_workers: int = 0
    max_bad_fraction: float = 0.01
    image_cache_mib: int = 256
    validation: float = 0.0
    images: ImagesConfig = field(default_factory=ImagesConfig)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, tokens=sequence_of(str, "a list of strings"))

    def sections(self) -> list[DataConfig]:
        """The sections whose samples this one mixes, ``Sample.part`` counts them; a section that mixes
        nothing is its own only one.
        """
        return [self]

    def loss_weights_by_section(self) -> list[float]:
        """How much a trained token of each of ``sections()`` counts in the loss; empty: all alike."""
        return []

    def tokens(self) -> list[str]:
        """Names of tokens that its texts need; a tokenizer that does not have them gets them."""
        return []

    def check_tokens(self, names: Sequence[str], grows: bool) -> None:
        """
        Args:
            names: the new tokens of the model.
            grows: further ones may follow them.

        Raises:
            InputError: ``tokens`` cannot all be among them.
        """

    def codec_fingerprint(self) -> str:
        """A digest of what, besides the tokenizer, decides which tokens an answer is; empty: nothing."""
        return ""

    def never_reached(self, steps: int) -> str:
        """What of this section would come into force only after ``steps`` optimizer steps, with key and
        value; nothing if all does.
        """
        return ""

    def __post_init__(self) -> None:
        one_of(self, "batching", ("group", "pad", "pack"))
        one_of(self, "group_by", ("characters", "positions"))
        only_if(self, self.batching == "group", "batching = 'group'", "group_by")
        at_least(self, 0, "max_images_per_row", "num_workers", "image_cache_mib")
        only_if(self, self.batching == "pack", "batching = 'pack'", "max_images_per_row")
        at_least(self, 300, "tokenizer_vocab_size")
        at_most(self, 1 << 22, "tokenizer_vocab_size")
        at_most(self, 1024, "num_workers")
        fraction(self, "max_bad_fraction", "validation")
        if not self.image_placeholder.strip() or set(self.image_placeholder) & set("{}"):
            raise InputError(f"image_placeholder = {self.image_placeholder!r}: must not be blank or hold a brace")
        only_if(self, False, "a source of prompts, answers and images", *self.unread)
        check_template(self)


@registry.register_data_config
@dataclass
class EasyVQAConfig(DataConfig):
    """easy-VQA (the PyPI package ``easy-vqa``): questions about one coloured shape, with the official
    train/test split.

    Attributes:
        form: "questions", all of an image together; or "captions", what the training answers say of an image
            ("circle red").
        with_captions: with "questions", the caption is trained as one more text of its image.
    """

    needs_images: ClassVar[bool] = True

    source: str = "easy_vqa"
    form: str = "questions"
    with_captions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", ("captions", "questions"))
        only_if(self, self.form == "questions", "form = 'questions'", "with_captions")


@dataclass
class FileConfig(DataConfig):
    """Rows of a file (or directory).

    Attributes:
        path: the training rows.
        eval_path: the held-out rows; empty means there are none and nothing is evaluated.
        root: images given by relative paths lie below it; empty means the directory of the rows. No path may
            leave it.
        follow_links: links below ``root`` may lead out of it.
        ignore_columns: keys of rows that nothing shall read ("meta", "texts.note", "*_score"); any other key
            that nothing reads is an error. Patterns leave the keys alone that the source knows.
    """

    path: PathText = ""
    eval_path: PathText = ""
    root: PathText = ""
    follow_links: bool = False
    ignore_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise InputError(f"path = '': source {self.source!r} needs one")


@dataclass
class Splits(FileConfig):
    """For data that may have splits, such as a Hugging Face dataset.

    Attributes:
        split, eval_split: of a dataset that has some; ``eval_split`` empty means ``eval_path`` alone says
            what is held out.
    """

    split: str = "train"
    eval_split: str = ""


def is_csv(path: str) -> bool:
    """Whether ``path`` names a CSV or TSV file."""
    return path.lower().endswith((".csv", ".tsv")) and not os.path.isdir(path)


def is_file_of_rows(path: str) -> bool:
    """Whether ``path`` names a JSON, CSV or TSV file, which has no splits."""
    return is_csv(path) or (path.lower().endswith((".json", ".jsonl")) and not os.path.isdir(path))


@dataclass
class RowsConfig(Splits):
    """Rows of a JSON, CSV or TSV file, or of a dataset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dataset, held_out = not is_file_of_rows(self.path), not is_file_of_rows(self.eval_path or self.path)
        only_if(self, dataset or (held_out and not self.eval_split), "a dataset, which no JSON, CSV or TSV file is,", "split")
        only_if(self, held_out, "a dataset, which no JSON, CSV or TSV file is,", "eval_split")


@dataclass
class TableConfig(FileConfig):
    """Rows with an image and texts, by column name.

    Attributes:
        image_column: a path, bytes or base64, or a list of these; empty for text-only rows. "image" finds
            "images" as well.
        prompt_column: empty takes the usual one that is there (prompt, question, instruction, input), or no
            prompt (captions).
        answer_column: the text that is trained; empty takes the usual one (answer, answers, response, output,
            caption, text).
        texts_column: instead of prompt and answer: a list of ``{prompt, answer}`` objects, several texts of
            one image. Empty takes "texts" where no column is named.
    """

    image_column: str = "image"
    prompt_column: str = ""
    answer_column: str = ""
    texts_column: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("image_column", "prompt_column", "answer_column", "texts_column"):
            name = getattr(self, key)
            if name and name in self.ignore_columns:
                raise InputError(f"{key} = {name!r}: is in ignore_columns, too")
        only_if(
            self, not self.texts_column, "texts_column = ''", *(key for key in ("prompt_column", "answer_column") if getattr(self, key))
        )


@registry.register_data_config
@dataclass
class JsonlConfig(TableConfig):
    """A JSONL file, one object a line."""

    source: str = "jsonl"


@registry.register_data_config
@dataclass
class HFDatasetConfig(Splits, TableConfig):
    """A Hugging Face dataset: a directory of ``save_to_disk``, a Parquet/CSV/JSON file, or a hub id where
    there is a network.
    """

    source: str = "hf_dataset"


@registry.register_data_config
@dataclass
class TextConfig(DataConfig):
    """Plain text: a file, cut into windows of ``train.seq_len`` tokens, all of them trained. It is written
    without a template; ``template`` and what belongs to it say how the model is asked something afterwards.

    Attributes:
        path: the training text, UTF-8.
        eval_path: held-out text; empty means nothing is evaluated.
    """

    unread: ClassVar[tuple[str, ...]] = ("answer_template", "truncate", "image_placeholder", "images")

    source: str = "text"
    path: PathText = ""
    eval_path: PathText = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise InputError("path = '': source 'text' needs one")
