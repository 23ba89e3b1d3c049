"""Checks between sections. Each is a function of the job that yields the table and what is wrong there; it
runs when a job is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from kempnerforge.config import registry
from kempnerforge.config.build import build
from kempnerforge.config.checks import not_default
from kempnerforge.config.data import DataConfig, TextConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.schedule import SchedulerConfig
from kempnerforge.config.sections import JobSections
from kempnerforge.config.stages import StageConfig
from kempnerforge.config.training import AUTO, CheckpointConfig, EvalConfig, HookConfig, MetricsConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.util.errors import InputError, Key, PluginError, Problems

TRIED_STEPS = 100
"""Steps of a stage, evenly spread, at which its schedule is tried."""

Found = Iterator[tuple[Key, str]]


class Job(JobSections, Protocol):
    """What the checks read of a ``JobConfig``."""

    vlm: VLMConfig | None
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    metrics: MetricsConfig
    hooks: list[HookConfig]
    stages: list[StageConfig]

    def image_tokens(self) -> int | None: ...

    def check_sequence(self, num_image_tokens: int) -> None: ...

    def staged_sections(self) -> list[dict[str, Any]]: ...


class CrossCheck(NamedTuple):
    """A check and the sections that it reads; it is left out when one of them could not be built."""

    run: Callable[[Job], Found]
    reads: frozenset[str]


CROSS_CHECKS: list[CrossCheck] = []


def _reads(*sections: str) -> Callable[[Callable[[Job], Found]], Callable[[Job], Found]]:
    def register(check: Callable[[Job], Found]) -> Callable[[Job], Found]:
        CROSS_CHECKS.append(CrossCheck(check, frozenset(sections)))
        return check

    return register


@_reads("train", "stages")
def some_steps(job: Job) -> Found:
    """There is something to train."""
    if not job.stages and not job.train.max_steps:
        yield ("train",), "max_steps = 0: there are no [[stages]] either, so nothing would be trained; set it, or add a stage"
    if job.stages and job.train.total_samples:
        yield ("train",), f"total_samples = {job.train.total_samples}: [[stages]] have their steps; leave it out"


@_reads("stages")
def stage_names(job: Job) -> Found:
    """No two stages have the same name."""
    names = [stage.name for stage in job.stages]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ("stages", index), f"name = {name!r}: stage #{names.index(name) + 1} has this name, too"


@_reads("train", "scheduler", "optimizer", "stages")
def warmup_and_decay_fit(job: Job) -> Found:
    """A run without stages has room for both, and a rate at its steps. (Of stages ``stage_fits`` says it.)"""
    if not job.stages and job.train.max_steps:
        for message in _no_rates(job.scheduler, job.optimizer, job.train.max_steps):
            yield ("scheduler",), message


def _no_rates(scheduler: SchedulerConfig, optimizer: OptimizerConfig, steps: int) -> Iterator[str]:
    """Why ``steps`` have no rates: the schedule gives none, or warm-up and decay do not fit."""
    tried = min(steps, TRIED_STEPS)
    try:
        for step in [k * (steps - 1) // max(1, tried - 1) for k in range(tried)]:
            scheduler.factor(step, steps)
    except PluginError as error:
        yield f"name = {scheduler.name!r}: {error}"
        return
    groups = [(f"optimizer.groups of {group.module!r}: ", group.warmup_steps) for group in optimizer.groups]
    for where, warmup in [("", scheduler.warmup_steps), *groups]:
        if warmup is not None and warmup > (start := scheduler.decay_start(steps, warmup)):
            decay = f"the {steps - start} steps that {scheduler.name!r} decays in"
            yield f"{where}warmup_steps = {warmup}: with {decay} that is more than the {steps} there are"


@_reads("model", "train")
def rows_fit(job: Job) -> Found:
    """A row is not longer than the model reads."""
    if job.train.seq_len > job.model.max_seq_len:
        yield ("train",), f"seq_len = {job.train.seq_len}: must be at most model.max_seq_len = {job.model.max_seq_len}"
    if job.eval.text_path and job.eval.text_window > job.model.max_seq_len:
        yield ("eval",), f"text_window = {job.eval.text_window}: must be at most model.max_seq_len = {job.model.max_seq_len}"


@_reads("distributed", "data", "vlm", "stages")
def images_can_be_balanced(job: Job) -> Found:
    """Images that are sent to other ranks are all of one shape, and ranks that compute a layer together need
    the same features to the last bit.
    """
    if not job.distributed.balance_images:
        return
    for key, sections in [(("data",), vars(job)), *((("stages", index), given) for index, given in enumerate(job.staged_sections()))]:
        data = sections.get("data")
        if data is not None and any(section.images.fit == "native" for section in data.sections()):
            yield key, "images.fit = 'native': not with distributed.balance_images"
    if job.vlm is None:
        yield ("distributed",), "balance_images = true: there are no images without [vlm]"
    if job.distributed.tensor_parallel > 1:
        yield ("distributed",), f"balance_images = true: not with tensor_parallel = {job.distributed.tensor_parallel}"


@_reads("vision_encoder", "adapter", "vlm", "model", "train")
def sequence_fits(job: Job) -> Found:
    """The adapter takes the encoder's features, and image and text fit into model and row, as far as is known
    without the encoder.
    """
    try:
        tokens = job.image_tokens()
    except ValueError as error:
        yield ("adapter",), str(error)
        return
    if tokens is None:
        return
    try:
        job.check_sequence(tokens)
    except ValueError as error:
        yield ("vlm",), str(error)


@_reads("model", "vlm", "distributed")
def arch_fits(job: Job) -> Found:
    """What the arch itself demands of the other sections."""
    if job.vlm is not None:
        try:
            job.vlm.check(job)
        except (ValueError, NotImplementedError) as error:
            yield ("vlm",), str(error)


@_reads("distributed", "model", "vlm")
def layers_can_be_shared(job: Job) -> Found:
    """``distributed.tensor_parallel`` divides heads and channels. (A whole model of transformers refuses it.)"""
    if job.vlm is None or not job.vlm.files:
        try:
            job.distributed.check_shared({"n_heads": job.model.n_heads, "n_kv_heads": job.model.kv_heads, "ffn_dim": job.model.ffn_width})
        except ValueError as error:
            yield ("model",), str(error)


@_reads("train", "distributed", "vlm")
def float8_fits(job: Job) -> Found:
    """Products in float8 are of whole layers of our text backbone, which compute in bf16; their memory is not counted."""
    if job.train.float8 == "off":
        return
    key = f"float8 = {job.train.float8!r}"
    if job.train.mixed_precision == "fp32":
        yield ("train",), f"{key}: not with mixed_precision = 'fp32'"
    if job.train.batch_size == AUTO:
        yield ("train",), f"{key}: not with batch_size = 'auto', which does not count what it needs; give a number"
    if job.distributed.tensor_parallel > 1:
        yield ("train",), f"{key}: not with distributed.tensor_parallel = {job.distributed.tensor_parallel}"
    if job.vlm is not None and job.vlm.files:
        yield ("train",), f"{key}: vlm.arch = {job.vlm.arch!r} has the layers of transformers, not those of our text backbone"


@_reads("model", "vlm", "vision_encoder")
def deepstack_fits(job: Job) -> Found:
    """Features of inner layers are added to image tokens in the stream, one each after a layer."""
    layers, vlm = job.vision_encoder.deepstack_layers, job.vlm
    if vlm is not None and layers and not vlm.residual_stream_image_tokens(1):
        yield ("vision_encoder",), f"deepstack_layers = {layers}: vlm.arch = {vlm.arch!r} has no image tokens in the stream to add them to"
    if vlm is not None and len(layers) > job.model.n_layers:
        yield ("vision_encoder",), f"deepstack_layers = {layers}: one each is added after a layer, model.n_layers = {job.model.n_layers}"


@_reads("train", "optimizer")
def one_average(job: Job) -> Found:
    """Only one average of the weights is kept."""
    if job.train.ema_decay and job.optimizer.keeps_average:
        name = f"optimizer.name = {job.optimizer.name!r}"
        yield ("train",), f"ema_decay = {job.train.ema_decay}: {name} keeps an average itself; use 0"


@_reads("vlm", "stages")
def one_way_to_freeze(job: Job) -> Found:
    """Freezing over time is said in one place."""
    frozen = [stage.name for stage in job.stages if stage.freeze is not None]
    if job.vlm is not None and job.vlm.freeze_schedule and frozen:
        yield ("vlm",), f"freeze_schedule: stage {frozen[0]!r} has its own freeze; use one of the two forms"


@_reads("vlm", "train", "stages")
def schedule_is_reached(job: Job) -> Found:
    """Every step of the freeze schedule exists, unless ``train.max_steps`` makes a short run of longer
    stages.
    """
    planned = sum(stage.steps for stage in job.stages) or job.train.max_steps
    for index, stage in enumerate(job.vlm.freeze_schedule if job.vlm is not None else ()):
        if stage.start_step >= planned > 0:
            yield ("vlm", "freeze_schedule", index), f"start_step = {stage.start_step}: the last step is {planned - 1}, counted from 0"


@_reads("vlm", "data", "stages", "model")
def images_fit(job: Job) -> Found:
    """An arch whose words see the latest image alone would see one view of it."""
    sections = image_sections(job)
    if job.vlm is not None and not job.vlm.residual_stream_image_tokens(1) and any(section.images.fit == "native" for section in sections):
        yield ("data",), f"images.fit = 'native': vlm.arch = {job.vlm.arch!r} has no image tokens in the stream"
    if job.vlm is not None and any(section.images.rows for section in sections):
        if job.vlm.attention_mask == "image_bidirectional":
            yield (
                ("vlm",),
                "attention_mask = 'image_bidirectional': not with data.images.rows, where views are in one another; take 'causal'",
            )
        if job.model.rope_sections:
            yield ("model",), f"rope_sections = {job.model.rope_sections}: not with data.images.rows"
    if job.vlm is not None and job.vlm.latest_image_alone and any(section.images.several for section in sections):
        yield (
            ("vlm",),
            f"{job.vlm.latest_image_alone}: with data.images.fit = 'tiles', or several frames, a word would see the last view alone",
        )


@_reads("train", "data", "stages")
def features_are_those_of_images(job: Job) -> Found:
    """Images that are changed at random are never seen twice, so there is nothing to keep."""
    if job.train.feature_cache and any(section.images.augment.enabled for section in image_sections(job)):
        yield ("train",), f"feature_cache = {job.train.feature_cache!r}: data.images.augment changes the images; use one of the two"


@_reads("eval")
def tasks_are_known(job: Job) -> Found:
    """Every task of ``eval.tasks`` is registered, and options are fields of one of them."""
    for name in job.eval.options.keys() - job.eval.tasks:
        yield ("eval",), f"options.{name}: eval.tasks = {job.eval.tasks} does not name this task"
    for name in job.eval.tasks:
        try:
            cls = registry.tasks.get(name)
        except InputError as error:
            yield ("eval",), str(error).removeprefix("eval.")
            continue
        build(cls, job.eval.options.get(name, {}), ("options", name), problems := Problems())
        yield from ((("eval",), line.replace(f"[options] {name}", f"options.{name}", 1)) for line in problems.lines)


@_reads("eval", "data", "stages")
def questions_are_asked(job: Job) -> Found:
    """Nothing is asked about running text, so no answer is searched for and no example is in front of it."""
    if all(isinstance(section, TextConfig) for section in image_sections(job)):
        for key in [key for key in ("shots", "beams") if key in not_default(job.eval)]:
            yield ("eval",), f"{key} = {getattr(job.eval, key)}: data.source = 'text' asks no questions; leave it out"


@_reads("optimizer", "metrics", "hooks")
def extensions_are_whole(job: Job) -> Found:
    """A plugin's config class alone does nothing: the class that it configures is registered under the same
    name, and can be made as it will be.
    """
    named: list[tuple[Key, str, Any, registry.Registry, str]] = [(("optimizer",), "name", job.optimizer, registry.optimizers, "")]
    named += [(("metrics", "trackers", index), "type", each, registry.trackers, "cfg") for index, each in enumerate(job.metrics.trackers)]
    named += [(("hooks", index), "type", each, registry.hooks, "cfg, run_dir") for index, each in enumerate(job.hooks)]
    for key, discriminator, cfg, classes, given in named:
        name, cls = getattr(cfg, discriminator), type(cfg)
        if cls.__module__.startswith("kempnerforge."):
            continue
        if name not in classes:
            advice = f"put @registry.register_{classes.kind}({name!r}) before the class of the {classes.kind}"
            yield key, f"{discriminator} = {name!r}: {cls.__name__} configures no {classes.kind}; {advice}; {classes.known(name)}"
            continue
        made = classes.get(name)
        try:
            inspect.signature(made).bind(*given.split(", ") if given else ())
        except TypeError as error:
            yield (
                key,
                f"{discriminator} = {name!r}: {made.__name__} is made as {made.__name__}({given}), and its __init__ takes others: {error}",
            )


@_reads("checkpoint", "eval")
def best_is_measured(job: Job) -> Found:
    """``checkpoint.keep_best`` names a score of a task that the job evaluates."""
    best = job.checkpoint.keep_best
    if best and not job.eval.measures(best):
        yield ("checkpoint",), f"keep_best = {best!r}: must begin with the name of a score: {', '.join(job.eval.scores)}"
    if best and not (job.eval.interval or job.eval.at_end):
        yield ("checkpoint",), f"keep_best = {best!r}: nothing is evaluated; set eval.interval"


def image_sections(job: Job) -> list[DataConfig]:
    """All sections that samples come from."""
    sections = [changed["data"] for changed in job.staged_sections() if "data" in changed] if job.stages else [job.data]
    return [part for section in sections for part in section.sections()]


@_reads("vlm", "data", "stages")
def source_fits(job: Job) -> Found:
    """A pure text run does not read a source that is about images. (Stages have their own data, see
    ``stage_fits``.)
    """
    if job.vlm is None and not job.stages and job.data.needs_images:
        yield ("data",), _needs_images(job.data.source)


@_reads("train", "data", "stages")
def phases_are_reached(job: Job) -> Found:
    """Every phase of a mixture exists. (Of stages ``stage_fits`` says it.)"""
    if not job.stages and job.train.max_steps and (late := job.data.never_reached(job.train.max_steps)):
        yield ("data",), f"{late}: the last step is {job.train.max_steps - 1}, counted from 0"


def stage_fits(job: Job, index: int, sections: Mapping[str, Any], text_only: bool) -> Found:
    """Stage ``index`` is long enough for its warm-up, its rows fit into the model, and a pure text run does
    not read images in it.

    Args:
        sections: the resolved ones of the stage, by name; some may be missing.
    """
    scheduler, data, steps = sections.get("scheduler"), sections.get("data"), job.stages[index].steps
    optimizer = sections.get("optimizer")
    for group in optimizer.groups if optimizer is not None else ():
        if (group.warmup_steps or 0) > steps:
            yield ("stages", index, "optimizer"), f"groups: {group.module!r} warms up for {group.warmup_steps} of {steps} steps"
    if scheduler is not None and scheduler.warmup_steps > steps:
        yield ("stages", index, "scheduler"), f"warmup_steps = {scheduler.warmup_steps}: the stage has only {steps} steps"
    if scheduler is not None and optimizer is not None and scheduler.warmup_steps <= steps:
        for message in _no_rates(scheduler, optimizer, steps):
            yield ("stages", index, "scheduler"), message
    train = sections.get("train")
    if train is not None and "seq_len" in job.stages[index].train and train.seq_len > job.model.max_seq_len:
        yield ("stages", index, "train"), f"seq_len = {train.seq_len}: must be at most model.max_seq_len = {job.model.max_seq_len}"
    if data is not None and (late := data.never_reached(steps)):
        yield ("stages", index, "data"), f"{late}: the stage's last step is {steps - 1}, counted from 0"
    if data is not None and text_only and data.needs_images:
        yield ("stages", index, "data"), _needs_images(data.source)


def _needs_images(source: str) -> str:
    return f"source = {source!r}: is about images, and without [vlm] this is a pure text run; add [vlm], or take source = 'text' or 'jsonl'"
