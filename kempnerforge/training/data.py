"""The data of a job, once its model and tokenizer are known: sources, layouts, held-out data, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kempnerforge.config import DataConfig, EvalConfig, Stage, VLMConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.loader import build_loader
from kempnerforge.data.fingerprint import pictures_fingerprint, shards_fingerprint
from kempnerforge.data.source import Source
from kempnerforge.data.sources import build_source
from kempnerforge.data.text.asking import Asking, ObservedLayouts, observe
from kempnerforge.data.text.encode import Encoder, Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.evaluate import require_tasks
from kempnerforge.eval.plain_text import PlainText
from kempnerforge.eval.questions import HeldOut, Question, examine
from kempnerforge.eval.shots import Shots, read_pool
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM

CHECKED = 64
"""Questions that are written with their examples before training, to see whether there is room for them."""
SPLIT_TURNS = (
    "the chat template writes earlier answers otherwise than the last one: each turn of a conversation is trained in a separate text,"
    " after the turns before"
)


@dataclass
class JobData:
    """What a job is trained and evaluated on.

    Attributes:
        stages: in order; a stage is without a source if the data are not read.
        layouts: of rows, by stage: what the data must know of the model.
        has_images: whether the model reads images.
        eval: the ``[eval]`` section.
        seed: ``train.seed``.
        sources: the training data of each stage.
        held_out: the last stage's held-out data, or None.
        plain_text: the text of ``eval.text_path``, or None.
        asking: how the data of a trained model place their images; None: as usual with the source.
        gives: what tasks may read of the model, see ``Task.needs``.
        room: positions that the model takes.
        compares_images: whether the model has a vision encoder whose features tell which images are alike.
    """

    stages: list[Stage]
    tokenizer: Tokenizer
    layouts: list[Layout]
    has_images: bool
    eval: EvalConfig
    seed: int
    sources: list[Source]
    held_out: Source | None = None
    plain_text: PlainText | None = None
    asking: Asking | None = None
    gives: frozenset[str] = frozenset({"words"})
    room: int = 0
    compares_images: bool = False

    @property
    def layout(self) -> Layout:
        """The layout of the last stage, which evaluation and generation use."""
        return self.layouts[-1]

    def read_held_out(self) -> None:
        """Opens what the last stage is evaluated on: held-out data and plain text."""
        cfg, last = self.eval, self.stages[-1]
        for section in last.data.sections():
            section.check_tokens(self.tokenizer.new_tokens, grows=False)
        self.plain_text = PlainText(cfg.text_path, cfg.text_window, self.tokenizer, self.seed) if cfg.text_path else None
        self.held_out = build_source(last.data, "test", self.tokenizer, last.train.seq_len)

    def encoder(self, stage: Stage) -> Encoder:
        asking = self.asking or Asking.usual(stage.data.sections()[0])
        return Encoder(self.tokenizer, stage.data, self.layouts[stage.index], self.seed, asking)

    def batches(self, stage: Stage, step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The micro-batches of ``rank`` from optimizer step ``step`` of the run on, without end."""
        loader = build_loader(
            self.sources[stage.index],
            self.encoder(stage),
            cfg=stage.data,
            layout=self.layouts[stage.index],
            train_cfg=stage.train,
            rank=rank,
            world=world,
            start_step=step - stage.start,
        )
        return iter(loader)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the data: of each stage under its name, of the held-out data, of shards and images."""
        named = {stage.name: self.sources[stage.index] for stage in self.stages}
        if self.held_out is not None:
            named["held-out data"] = self.held_out
        prints = {name: source.fingerprint() for name, source in named.items()}
        if self.plain_text is not None:  # under a name for each path: another path is a change of the config
            prints[f"eval.text_path = {self.eval.text_path!r}"] = self.plain_text.windows.fingerprint()
        prints |= {f"shards of {name}": shards_fingerprint(source.shards()) for name, source in named.items() if source.shards()}
        if self.has_images:
            prints |= {f"images of {name}": pictures_fingerprint(source) for name, source in named.items()}
        return prints | self.codecs

    @property
    def codecs(self) -> dict[str, str]:
        """Digests of the picture tokenizers of the stages, by names for messages."""
        prints = {stage.name: [section.codec_fingerprint() for section in stage.data.sections()] for stage in self.stages}
        return {f"picture tokenizer of {name}": digest(*found) for name, found in prints.items() if any(found)}

    @cached_property
    def examined(self) -> HeldOut | None:
        """The held-out data, read as far as possible without pixels; None where there are none."""
        if self.held_out is None:
            return None
        found = examine(self.held_out, self.encoder(self.stages[-1]), self.eval)
        return found if "words" in self.gives else replace(found, too_long=0)  # nothing is written that could be cut

    def check_held_out(self) -> None:
        """Raises InputError if this job evaluates and ``require_held_out`` raises it."""
        if self.eval.interval or self.eval.at_end:
            self.require_held_out()

    def require_held_out(self) -> None:
        """Raises InputError if more than ``data.max_bad_fraction`` of the held-out data, or all of it, cannot
        be read, or a task of ``eval.tasks`` has nothing to measure.
        """
        if self.examined is not None:
            self.examined.require(self.stages[-1].data.max_bad_fraction)
        require_tasks(self.eval, self.examined, self.gives)
        if self.eval.shots_by == "similarity" and not self.compares_images:
            raise InputError(
                'eval.shots_by = "similarity": this model has no vision encoder of its own to compare images with; take "random"'
            )
        if self.examined is not None and (shots := self.shots()) is not None:
            shots.require(self.examined.draw(CHECKED, self.seed).values())

    def shots(self) -> Shots | None:
        """What chooses the examples of questions; None: ``eval.shots`` is 0."""
        return Shots(self.eval, self.encoder(self.stages[-1]), self._examples, self.room) if self.eval.shots else None

    @cached_property
    def _examples(self) -> list[Question]:
        """What ``eval.shots`` are chosen from."""
        last, from_training = self.stages[-1], self.eval.shots_split == "training"
        source = self.held_out if not from_training else self.sources[last.index] if self.sources else None
        if source is None and from_training:
            source = training_source(last.data).tokenised(self.tokenizer, last.train.seq_len)
        return read_pool(source, self.encoder(last), self.eval) if source is not None else []

    @cached_property
    def observed(self) -> ObservedLayouts:
        """How the texts of the last stage place their images."""
        stage = self.stages[-1]
        return observe(self.sources[stage.index], stage.data.sections()[0])

    def notes(self, stage: Stage) -> list[str]:
        """How texts are trained and questions asked, as far as the config does not show it."""
        texts = self.encoder(stage).texts
        notes = [SPLIT_TURNS] if any(text.template.by_turn for text in texts) else []
        if stage is self.stages[-1] and self.has_images and (line := self.observed.line(texts[0].cfg.image_placeholder)):
            notes.append(line)
        return notes


def training_source(cfg: DataConfig) -> Source:
    """The training split of ``cfg``.

    Raises:
        InputError: it has no samples.
    """
    source = build_source(cfg, "train")
    if source is None or not len(source):
        raise InputError(f"data.source = {cfg.source!r}: has no training samples")
    return source


def row_layouts(stages: Sequence[Stage], vlm: VLMConfig | None, model: VLM) -> list[Layout]:
    """The layout of each stage's rows."""
    lengths = [stage.train.seq_len for stage in stages]
    if vlm is None:
        return [Layout(0, 0, max_text_len=length, seq_len=length, pad_to=length, codes=model.codes) for length in lengths]
    image_tokens = vlm.residual_stream_image_tokens(model.num_image_tokens)
    layouts = [Layout(image_tokens, 0, vlm.max_text_len, length, image_tokens + vlm.max_text_len, codes=model.codes) for length in lengths]
    if not model.has_images:
        return layouts
    mean, _ = model.normalisation
    facts: dict[str, Any] = {"token_side": model.token_side, "cell": model.cell} if image_tokens else {}
    if model.cell:
        facts["any_shape"] = model.vision_encoder.any_shape
    facts |= {"image_size": model.image_size, "image_mean": mean, "view_limits": model.job.adapter.view_limits}
    facts["reads_padding"] = model.job.adapter.reads_padding
    return [replace(layout, **facts) for layout in layouts]
