"""A job put together, in one direction: sources, tokenizer, model, data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch

from kempnerforge.config import JobConfig, Stage
from kempnerforge.config.model import is_picture_token
from kempnerforge.data.sources.keys import refuse_unused
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.evaluate import Measured, evaluate
from kempnerforge.eval.exam import Exam, Ranks
from kempnerforge.training.data import JobData, row_layouts, training_source
from kempnerforge.training.freeze import FreezePlan
from kempnerforge.training.tokenizer import fit_vocabulary, inherited_tokenizer, new_tokenizer
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model


@dataclass
class Assembly:
    """A job put together.

    Attributes:
        job: with ``model.vocab_size`` and ``model.new_tokens`` resolved.
        freeze: what trains at which step.
        blank: the model's weights are those of a checkpoint, once they are loaded.
    """

    job: JobConfig
    tokenizer: Tokenizer
    model: VLM
    freeze: FreezePlan
    data: JobData
    blank: bool = False

    @property
    def stages(self) -> list[Stage]:
        return self.data.stages

    def warnings(self) -> list[str]:
        """What is allowed but may not be meant, of the config and of the names of the model's parameters."""
        return [*self.job.warnings(), *self.freeze.lora_remarks()]

    def exam(self, ranks: Ranks, device: torch.device, *, rows: int = 1, limit: int = 0) -> Exam:
        """The model as it is, with the held-out data.

        Args:
            rows: samples that a rank takes at once for a loss.
            limit: questions, samples and windows at most; 0: all.
        """
        data = self.data
        encoder = data.encoder(data.stages[-1])
        given = {"gives": data.gives, "shots": data.shots()}
        return Exam(self.model, encoder, data.eval, device, ranks, data.examined, data.plain_text, rows, limit, **given)

    def evaluate(self, ranks: Ranks, device: torch.device, *, rows: int, limit: int) -> Measured:
        """Measures the tasks of ``[eval]``. For the arguments see ``exam``.

        Raises:
            InputError: none of the held-out data can be read.
        """
        return evaluate(self.exam(ranks, device, rows=rows, limit=limit))


def assemble(
    job: JobConfig, tokenizer: Tokenizer | None = None, *, device: torch.device | str | None = None, data: bool = True, blank: bool = False
) -> Assembly:
    """Puts ``job`` together.

    Args:
        tokenizer: of an earlier part of this run; None takes the one of ``run.init_from`` or of the model, or
            resolves ``data.tokenizer``.
        device: where the model is built; "meta" for shapes alone.
        data: False builds no sources (generation from a checkpoint).
        blank: all weights are loaded afterwards, see ``build_model``.

    Raises:
        ValueError: data, tokenizer and model do not fit together.
    """
    stages = job.resolved_stages()
    # Stages that train.max_steps cuts off count for the tokenizer: a run that is cut short and allowed to go
    # on later is the same run.
    whole = replace(job, train=replace(job.train, max_steps=0)) if job.stages else job
    later_stages = whole.resolved_stages()[len(stages) :]
    sections = [section for stage in [*stages, *later_stages] for section in stage.data.sections()]

    if tokenizer is None and job.data.tokenizer == "train":  # a tokenizer that the config names comes first
        tokenizer = inherited_tokenizer(job.run.init_from, job.vlm.files if job.vlm is not None else "")
    sources = [training_source(stage.data) for stage in stages] if data else []
    if tokenizer is None:
        tokenizer = new_tokenizer(job.data, chain(sources, (training_source(stage.data) for stage in later_stages)))
    image_tokens = [name for section in sections for name in section.images.new_tokens()] if job.vlm is not None else []
    if data:
        for section in sections:
            section.check_tokens(job.model.new_tokens or tokenizer.appended, grows=True)
        image_tokens += [name for section in sections for name in section.tokens()]
    else:  # a trained model is read without its picture tokenizer
        image_tokens += [name for name in tokenizer.appended if is_picture_token(name)]
    job = replace(job, model=fit_vocabulary(job.model, tokenizer, image_tokens))

    model = build_model(job, device, blank=blank)
    if model.has_images:
        for section in sections:
            section.images.check(model.image_size, model.token_side if job.vlm and job.vlm.residual_stream_image_tokens(1) else 0)
    freeze = FreezePlan(job, [name for name, _ in model.named_parameters()])

    if data:
        sources = [source.tokenised(tokenizer, stage.train.seq_len) for source, stage in zip(sources, stages, strict=True)]
    layouts, facts = row_layouts(stages, job.vlm, model), {"gives": model.gives, "room": job.model.max_seq_len}
    facts["compares_images"] = "vision_encoder" in dict(model.named_children())
    found = JobData(stages, tokenizer, layouts, model.has_images, job.eval, job.train.seed, sources, **facts)
    if data:
        found.read_held_out()
    refuse_unused(chain.from_iterable(source.ignoring() for source in [*sources, found.held_out] if source is not None))
    return Assembly(job, tokenizer, model, freeze, found, blank)
