"""From a job to everything that a run, a check or an evaluation needs: tokenizer, data, model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from kempnerforge.config import DataConfig, JobConfig, Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.loader import build_loader
from kempnerforge.data.fingerprint import pictures_fingerprint, shards_fingerprint
from kempnerforge.data.source import Source
from kempnerforge.data.sources import build_source
from kempnerforge.data.sources.keys import refuse_unused
from kempnerforge.data.text.asking import Asking, ObservedLayouts, observe
from kempnerforge.data.text.encode import Encoder, Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.evaluate import Measured, evaluate, require_tasks
from kempnerforge.eval.exam import Exam, Ranks
from kempnerforge.eval.plain_text import PlainText
from kempnerforge.eval.questions import HeldOut, examine
from kempnerforge.interop import read_weights, take_weights
from kempnerforge.model.lora import fitting_magnitudes
from kempnerforge.training.freeze import refuse_random, remarks_on_lora
from kempnerforge.training.vocabulary import rows_by_token, tokenizer_beside, vocab_size
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model

TOKENIZER = "tokenizer"
"""The folder that a run and its checkpoints have it in."""


@dataclass
class Assembly:
    """A job put together.

    Attributes:
        job: with ``model.vocab_size`` resolved.
        layouts: what the data must know of the model, stage by stage.
        sources: the training data of each stage.
        held_out: what is evaluated (the last stage's), or None.
        plain_text: what it is evaluated on besides, or None.
        asked: what the record of a run keeps of how its data place their images.
    """

    job: JobConfig
    stages: list[Stage]
    tokenizer: Tokenizer
    model: VLM
    layouts: list[Layout]
    sources: list[Source]
    held_out: Source | None
    plain_text: PlainText | None = None
    asked: Asking | None = None

    @property
    def layout(self) -> Layout:
        """That of the last stage, which evaluation and generation go by."""
        return self.layouts[-1]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells the data of a run from others, by what they are for: those of each stage under its name, then their images, and the same of
        what is evaluated on.
        """
        found = {stage.name: self.sources[stage.index] for stage in self.stages}
        if self.held_out is not None:
            found["held-out data"] = self.held_out
        prints = {name: source.fingerprint() for name, source in found.items()}
        if self.plain_text is not None:  # under a name for each path: another path is a change of the config
            prints[f"eval.text_path = {self.job.eval.text_path!r}"] = self.plain_text.windows.fingerprint()
        prints |= {f"shards of {name}": shards_fingerprint(source.shards()) for name, source in found.items() if source.shards()}
        if self.model.has_images:
            prints |= {f"images of {name}": pictures_fingerprint(source) for name, source in found.items()}
        return prints

    def warnings(self) -> list[str]:
        """What is allowed but may not be meant, of the config and of the names of the model's parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        return [*self.job.warnings(), *remarks_on_lora(self.stages, self.job, names)]

    @cached_property
    def examined(self) -> HeldOut | None:
        """What is held out, read as far as it can be without pixels; None where there is nothing."""
        return examine(self.held_out, self.encoder(self.stages[-1]), self.job.eval) if self.held_out is not None else None

    def check_held_out(self) -> None:
        """Raises InputError if this job evaluates and ``require_held_out`` raises it."""
        if self.job.eval.interval or self.job.eval.at_end:
            self.require_held_out()

    def require_held_out(self) -> None:
        """Raises InputError if more than ``data.max_bad_fraction`` of the held-out data, or all, cannot be read, or a task
        of ``eval.tasks`` has nothing to measure.
        """
        if self.examined is not None:
            self.examined.require(self.stages[-1].data.max_bad_fraction)
        require_tasks(self.job.eval, self.examined)

    def evaluate(self, ranks: Ranks, device: torch.device, *, rows: int, limit: int) -> Measured:
        """What ``[eval]`` asks for, of the model as it is.

        Args:
            rows: samples that a rank takes at once for a loss.
            limit: questions, samples and windows at most; 0: all.

        Raises:
            InputError: none of the held-out data can be read.
        """
        encoder = self.encoder(self.stages[-1])
        return evaluate(Exam(self.model, encoder, self.job.eval, device, ranks, self.examined, self.plain_text, rows, limit))

    @cached_property
    def seen(self) -> ObservedLayouts:
        """How the texts of the last stage place their images."""
        stage = self.stages[-1]
        return observe(self.sources[stage.index], stage.data.sections()[0])

    def notes(self, stage: Stage) -> list[str]:
        """What is not to be seen in the config of how texts are trained and questions asked."""
        texts = self.encoder(stage).texts
        split = (
            "the chat template writes earlier answers otherwise than the last one: each turn of a conversation is trained in a text of its own,"
            " after what it is asked with"
        )
        asked = self.seen.line(texts[0].cfg.image_placeholder) if stage is self.stages[-1] and self.model.has_images else ""
        return [*([split] if any(each.template.by_turn for each in texts) else []), *([asked] if asked else [])]

    def encoder(self, stage: Stage) -> Encoder:
        asking = self.asked or Asking.usual(stage.data.sections()[0])
        return Encoder(self.tokenizer, stage.data, self.layouts[stage.index], self.job.train.seed, asking)

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


def assemble(
    job: JobConfig, tokenizer: Tokenizer | None = None, *, device: torch.device | str | None = None, data: bool = True
) -> Assembly:
    """Puts ``job`` together.

    Args:
        tokenizer: of an earlier part of this run; None takes that of ``run.init_from`` or of the model, or resolves ``data.tokenizer``.
        device: where the model is built; "meta" for shapes alone.
        data: False builds no sources (generation from a checkpoint).

    Raises:
        ValueError: data, tokenizer and model do not fit together.
    """
    stages = job.resolved_stages()
    tokenizer = tokenizer or _inherited_tokenizer(job)
    sources = [_source(stage.data) for stage in stages] if data else []
    if tokenizer is None:
        tokenizer = resolve_tokenizer(job.data, chain(sources, (_source(stage.data) for stage in _cut_off(job, stages))))
    sections = [section for stage in [*stages, *_cut_off(job, stages)] for section in stage.data.sections()]
    job = replace(job, model=replace(job.model, new_tokens=_new_tokens(job, tokenizer, sections)))
    if job.model.new_tokens:
        tokenizer.add_tokens(job.model.new_tokens)
    job = replace(job, model=replace(job.model, vocab_size=vocab_size(job.model.vocab_size, bool(job.model.new_tokens), tokenizer)))
    model = build_model(job, device)
    if model.has_images:
        for section in sections:
            section.images.check(model.image_size)
    if data:
        sources = [source.tokenised(tokenizer, stage.train.seq_len) for source, stage in zip(sources, stages, strict=True)]
    held_out, plain_text = read_held_out(job, stages[-1], tokenizer) if data else (None, None)
    refuse_unused(chain.from_iterable(source.ignoring() for source in [*sources, held_out] if source is not None))
    layouts = [_layout(job, model, stage.train.seq_len) for stage in stages]
    return Assembly(job, stages, tokenizer, model, layouts, sources, held_out, plain_text)


def read_held_out(job: JobConfig, last: Stage, tokenizer: Tokenizer) -> tuple[Source | None, PlainText | None]:
    """What there is to evaluate on: the held-out data of the ``last`` stage, and plain text."""
    plain_text = PlainText(job.eval.text_path, job.eval.text_window, tokenizer, job.train.seed) if job.eval.text_path else None
    return build_source(last.data, "test", tokenizer, last.train.seq_len), plain_text


def _layout(job: JobConfig, model: VLM, seq_len: int) -> Layout:
    """Of rows of at most ``seq_len`` positions."""
    if job.vlm is None:
        return Layout(image_tokens=0, image_size=0, max_text_len=seq_len, seq_len=seq_len, pad_to=seq_len)
    image_tokens = job.vlm.residual_stream_image_tokens(model.num_image_tokens)
    layout = Layout(image_tokens, 0, job.vlm.max_text_len, seq_len, pad_to=image_tokens + job.vlm.max_text_len)
    if not model.has_images:
        return layout
    mean, _ = model.normalisation
    return replace(layout, image_size=model.image_size, image_mean=mean)


def _new_tokens(job: JobConfig, tokenizer: Tokenizer, sections: Iterable[DataConfig]) -> list[str]:
    """``model.new_tokens``, then what the images of the data need and the tokenizer does not have."""
    needed = chain.from_iterable(section.images.new_tokens() for section in sections) if job.vlm is not None else ()
    there = set(tokenizer.appended)
    missing = [name for name in dict.fromkeys(needed) if name in there or tokenizer.token_id(name) is None]
    return list(dict.fromkeys([*job.model.new_tokens, *missing]))


def _cut_off(job: JobConfig, stages: list[Stage]) -> list[Stage]:
    """The stages that ``train.max_steps`` keeps from running. The tokenizer is trained on their text, too: a run that is cut short and then
    allowed to go on is the same as one that never was.
    """
    return replace(job, train=replace(job.train, max_steps=0)).resolved_stages()[len(stages) :] if job.stages else []


def _source(cfg: DataConfig) -> Source:
    source = build_source(cfg, "train")
    if source is None or not len(source):
        raise InputError(f"data.source = {cfg.source!r}: has no training samples")
    return source


def resolve_tokenizer(cfg: DataConfig, sources: Iterable[Source]) -> Tokenizer:
    """``data.tokenizer``: trained on the text of all stages, or loaded."""
    if cfg.tokenizer == "train":
        return Tokenizer.train(chain.from_iterable(source.corpus() for source in sources), cfg.tokenizer_vocab_size)
    return Tokenizer.from_pretrained(cfg.tokenizer)


def _inherited_tokenizer(job: JobConfig) -> Tokenizer | None:
    """That of the run whose weights this one begins with, or that which belongs to the model, unless the config names another."""
    if job.data.tokenizer != "train":
        return None
    found = None
    if job.run.init_from:
        path = Path(job.run.init_from)
        found = saved_tokenizer(path) or saved_tokenizer(path.parent.parent)  # a run directory, or one of its checkpoints
    named = job.vlm.files if job.vlm is not None else ""
    return found or (Tokenizer.from_pretrained(named) if named else None)


def initialise(job: JobConfig, model: VLM, tokenizer: Tokenizer | None = None) -> None:
    """The weights that a fresh run begins with, beyond random ones. Call it before the model is sharded, on all ranks.

    Args:
        tokenizer: of the model: rows of embedding and head are taken token by token.

    Raises:
        ValueError: ``run.init_from`` cannot be used, its names are not those of the model up to ``run.init_allow``, or random weights would
            stay frozen.
    """
    with fitting_magnitudes(model):
        if job.run.init_from:
            weights = read_weights(job.run.init_from, job.model)
            if tokenizer is not None:
                weights = rows_by_token(weights, model, tokenizer, tokenizer_beside(Path(job.run.init_from)))
            allowed = lambda name: any(fnmatchcase(name, pattern) for pattern in job.run.init_allow)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            other_shape = {name for name in shapes.keys() & weights.keys() if shapes[name] != weights[name].shape}
            kinds = {
                "lacks": shapes.keys() - weights.keys(),
                "has in excess": weights.keys() - shapes.keys(),
                "has in another shape": other_shape,
            }
            problems = [
                f"{kind} {len(found)}: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
                for kind, names in kinds.items()
                if (found := sorted(name for name in names if not allowed(name)))
            ]
            if problems:
                raise InputError(
                    f"run.init_from = {job.run.init_from!r}: of the model's parameters it {'; it '.join(problems)}."
                    " List patterns of what may differ in run.init_allow"
                )
            model.loaded |= take_weights(model, {name: weights[name] for name in weights.keys() - other_shape}, job.run.init_from)
        model.warm_start()
    refuse_random(job, model)


def saved_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that a run or a checkpoint keeps, or None."""
    path = directory / TOKENIZER
    return Tokenizer.from_pretrained(str(path)) if path.is_dir() else None
