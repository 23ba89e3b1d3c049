"""What ``check`` and ``--dry-run`` show of a job before it trains: modules, what trains, what it costs, and
one batch through the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kempnerforge.checkpoint.store import newest_step
from kempnerforge.config import JobConfig, Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.model.float8 import float8_layers
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.training.accounting import Cost, GenerationCost, cost, generation_cost
from kempnerforge.training.batch_size import Choice, decide
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.optimizer import check_groups, rules_of, settings, state_copies
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import why_not_writable
from kempnerforge.util.paths import place_of
from kempnerforge.vlm.parts import part_of


@dataclass(frozen=True)
class StagePlan:
    """One stage, as it will run.

    Attributes:
        lr: part -> the peak learning rates in it, smallest first.
        row_length: positions in a row of the first batch.
        useful: share of its positions that are no padding.
        generation: of an answer to the stage's first prompt, or why there is none.
    """

    stage: Stage
    cost: Cost
    lr: dict[str, list[float]]
    row_length: int
    useful: float
    generation: GenerationCost | str


@dataclass(frozen=True)
class Plan:
    """A whole job.

    Attributes:
        choices: of ``train.batch_size = "auto"`` for one process here, by index of the stage.
    """

    assembly: Assembly
    dtype: torch.dtype
    stages: list[StagePlan]
    choices: dict[int, Choice]


def plan(job: JobConfig) -> Plan:
    """Builds the job on the meta device, takes the first batch of every stage and counts.

    Raises:
        ValueError: something does not fit; as training would say.
    """
    _check_places(job)
    assembly = assemble(job, device="meta")
    assembly.data.check_held_out()
    check_start(assembly)
    if job.train.float8 != "off":
        float8_layers(assembly.model, job.train.float8)
    dtype = compute_dtype(job.train.mixed_precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    choices = decide(assembly)
    return Plan(assembly, dtype, [_plan_stage(assembly, stage, dtype) for stage in assembly.stages], choices)


def _check_places(job: JobConfig) -> None:
    """Raises InputError for a directory in which the run could not write."""
    for key, path in {"run.dir": job.run.dir, "train.feature_cache": job.train.feature_cache}.items():
        if path and (why := why_not_writable(place_of(path))):
            raise InputError(f"{key} = {path!r}: {why}")


def check_start(assembly: Assembly) -> None:
    """Refuses what training would refuse before its first step: patterns that match nothing, a stage in which
    nothing would train, weights to begin with that do not fit, and random ones that would stay frozen.

    Of a model on the meta device only names and shapes of weights are compared. A run that would be continued
    takes the weights of its checkpoint, and no others are looked for.

    Raises:
        ValueError: as training would say.
    """
    job, freeze, model = assembly.job, assembly.freeze, assembly.model
    freeze.check()
    check_groups(job, assembly.stages, freeze.names, freeze.patterns)
    encoder = dict(model.named_children()).get("vision_encoder")
    if isinstance(encoder, VisionEncoder):
        encoder.check_files(job.vision_encoder)
    if newest_step(place_of(job.run.dir) / "checkpoints") is None:
        initialise(model, assembly.tokenizer)
        freeze.refuse_random(model)


def _plan_stage(assembly: Assembly, stage: Stage, dtype: torch.dtype) -> StagePlan:
    job, model, freeze = assembly.job, assembly.model, assembly.freeze
    trainable = freeze.trainable(stage.start)
    settings_of = settings(freeze.names, stage.optimizer, freeze.patterns)
    rules = rules_of(model, stage.optimizer)
    batch = next(assembly.data.batches(stage, stage.start))
    counted = cost(model, batch, trainable, state_copies(model, stage.optimizer, job.train.ema_decay > 0), dtype)
    by_part: dict[str, set[float]] = {}
    for name in freeze.names:
        by_part.setdefault(part_of(name), set()).add(getattr(settings_of[name], rules[name].lr_key))
    return StagePlan(
        stage,
        counted,
        {k: sorted(v) for k, v in by_part.items()},
        batch.input_ids.shape[1],
        batch.useful_tokens / batch.input_ids.numel(),
        _generation(assembly, stage),
    )


def _generation(assembly: Assembly, stage: Stage) -> GenerationCost | str:
    try:
        return generation_cost(assembly.model, _first_prompt(assembly, stage))
    except NotImplementedError as error:
        return str(error) or "not possible with this arch"


def _first_prompt(assembly: Assembly, stage: Stage) -> Batch:
    """The first prompt of the stage's training data that can be read, alone; a window of running text where
    the data are that. Images have no memory, only shapes.
    """
    encoder, layout = assembly.data.encoder(stage), assembly.data.layout
    source = assembly.data.sources[stage.index]
    for index in range(len(source)):
        try:
            sample = source[index]
            if not sample.texts:
                continue
            text = sample.texts[0]
            if isinstance(text.answer, tuple):
                prompt = Prompt(list(text.answer[:-1]))
            else:
                prompt = encoder.encode_question(text.prompt, sample.images, sample.part)
        except InputError:
            continue
        size, count = layout.image_size, sum(block.views for block in prompt.blocks)
        images = torch.empty(count, 3, size, size, dtype=torch.uint8, device="meta") if size else None
        return prompt_batch([prompt], images, [list(range(count))], layout, encoder.tokenizer.pad_id)
    raise InputError(f"data.source = {stage.data.source!r}: no sample of stage {stage.name!r} can be read")


def dry_run(job: JobConfig) -> list[str]:
    """Builds everything for real and takes the first batch of every stage through model and loss, writing
    nothing. Returns lines.
    """
    _check_places(job)
    assembly = assemble(job)
    for section in (section for stage in assembly.stages for section in stage.data.sections()):
        section.images.cache_dir = ""  # nor into a cache
    assembly.data.check_held_out()
    check_start(assembly)
    weights = "initial weights" if assembly.model.loaded else "fresh weights"
    lines = [f"warning: {line}" for line in assembly.warnings()]
    for choice in decide(assembly).values():
        choice.require()
        lines.append(str(choice))
    for stage in assembly.stages:
        batch = next(assembly.data.batches(stage, stage.start))
        with torch.no_grad():
            loss = float(assembly.model(batch)._replace(aux_loss=None).mean(batch.num_targets, batch.num_pairs))
        rows, length = batch.input_ids.shape
        lines.append(
            f"stage {stage.name}: first batch {rows} x {length}, {batch.num_targets} trained tokens, loss {loss:.4f} (fp32, {weights})"
        )
    return [*lines, "nothing was written"]
