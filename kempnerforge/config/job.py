"""A whole job: every section, the stages, and the checks that no section can do alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.adapter import AdapterConfig, MLPAdapterConfig
from kempnerforge.config.build import SECTIONS, fields_of
from kempnerforge.config.checks import NO_KEY, defaults
from kempnerforge.config.cross import CROSS_CHECKS, stage_fits
from kempnerforge.config.data import DataConfig, EasyVQAConfig
from kempnerforge.config.lora import LORA_ALIAS, LoRAConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.optimizer import AdamWConfig, OptimizerConfig
from kempnerforge.config.schedule import SchedulerConfig
from kempnerforge.config.stages import STAGED, Stage, StageConfig, override
from kempnerforge.config.training import (
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    HookConfig,
    MetricsConfig,
    RunConfig,
    TrainConfig,
)
from kempnerforge.config.vision import VisionEncoderConfig, ViTConfig
from kempnerforge.config.vlm import FreezeSpec, VLMConfig
from kempnerforge.util.errors import InputError, Key, Problems, is_stage, key_path, show
from kempnerforge.util.paths import PathText


@dataclass
class JobConfig:
    """A resolved job. ``vision_encoder`` and ``adapter`` are read only when ``vlm`` is there; without it this
    is a pure text run. ``origins`` is no section: where the keys come from, see ``place``.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vision_encoder: VisionEncoderConfig = field(default_factory=ViTConfig)
    adapter: AdapterConfig = field(default_factory=MLPAdapterConfig)
    vlm: VLMConfig | None = None
    data: DataConfig = field(default_factory=EasyVQAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=lambda: registry.schedules.get("cosine")())
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: list[StageConfig] = field(default_factory=list)
    lora: list[LoRAConfig] = field(default_factory=list)
    hooks: list[HookConfig] = field(default_factory=list)
    plugins: list[PathText] = field(default_factory=list)
    origins: Problems = field(default_factory=Problems, compare=False, repr=False, metadata=NO_KEY)

    def place(self, key: Key) -> str:
        """``key`` for a message about its value: the file that sets it, if one is known, and a stage's name."""
        path, origin = key_path(key), self.origins.origin_of(key)
        if is_stage(key):
            path = f"[[stages]] {show(self.stages[int(key[1])].name)}: {key_path(('', *key[2:])).removeprefix('[] ')}"
        return f"{origin}: {path}" if origin else path

    def total_steps(self) -> int:
        """Optimizer steps of the run: the sum over the stages, capped by ``train.max_steps``."""
        planned, cap = sum(stage.steps for stage in self.stages), self.train.max_steps
        return min(planned, cap or planned) if self.stages else cap

    def resolved_stages(self) -> list[Stage]:
        """The stages that will run, in order, without gaps, from step 0 to ``total_steps()``. Without
        ``[[stages]]`` there is one, "train".

        Raises:
            ConfigError: an override of a stage is wrong.
        """
        total, base = self.total_steps(), tuple(self.vlm.freeze) if self.vlm else ()
        if not self.stages:
            return [Stage("train", 0, 0, total, total, self.data, self.train, self.optimizer, self.scheduler, base)] if total else []
        problems, found, start = Problems(), [], 0
        for index, stage in enumerate(self.stages):
            sections = self._override(index, problems)
            freeze = base if stage.freeze is None else tuple(stage.freeze)
            end = min(start + stage.steps, total)
            if end > start:
                found.append(Stage(stage.name, index, start, end, stage.steps, freeze=freeze, **sections))
            start = end
        problems.raise_if_any()
        return found

    def module_patterns(self) -> dict[str, list[str]]:
        """Aliases over parameter names: the ones of ``[vlm]``, and ``lora`` if there are LoRA adapters."""
        return {**(LORA_ALIAS if self.lora else {}), **(self.vlm.module_patterns if self.vlm is not None else {})}

    def freeze_at(self, step: int) -> tuple[FreezeSpec, ...]:
        """The freeze specs that apply at optimizer step ``step``. Of specs that match a
        parameter the last one counts.

        The ``freeze`` of a stage replaces ``[vlm].freeze``; ``[vlm].freeze_schedule`` adds to it (see
        ``VLMConfig.freeze_at``). Past the end of the run the last stage goes on.
        """
        index = self._stage_at(step)
        if index is not None and (freeze := self.stages[index].freeze) is not None:
            return tuple(freeze)
        return tuple(self.vlm.freeze_at(step)) if self.vlm else ()

    def freeze_keys(self, step: int) -> list[Key]:
        """The key of each spec of ``freeze_at(step)``."""
        index = self._stage_at(step)
        if index is not None and (freeze := self.stages[index].freeze) is not None:
            return [("stages", index, "freeze", number) for number in range(len(freeze))]
        if self.vlm is None:
            return []
        added = [
            ("vlm", "freeze_schedule", change, "specs", number)
            for change, entry in enumerate(self.vlm.freeze_schedule)
            if entry.start_step <= step
            for number in range(len(entry.specs))
        ]
        return [*(("vlm", "freeze", number) for number in range(len(self.vlm.freeze))), *added]

    def _stage_at(self, step: int) -> int | None:
        """The index of the stage that has ``step``; past the end the last one, None: there are no stages."""
        found, end = None, 0
        for index, stage in enumerate(self.stages):
            if step < end:
                break
            found = index
            end += stage.steps
        return found

    def image_tokens(self) -> int | None:
        """Tokens of one image after the adapter: 0 without ``[vlm]``, None when only the built encoder knows.

        Raises:
            ValueError: the adapter cannot take as many features as the encoder gives.
        """
        return 0 if self.vlm is None else self.vlm.image_tokens(self)

    def check_sequence(self, num_image_tokens: int) -> None:
        """The stream of a sample, one image and a text of full length, fits into the model and into a row.

        Args:
            num_image_tokens: of one image, after the adapter; ``image_tokens()``, or what the built encoder
                says.

        Raises:
            ValueError: it does not fit; the message names every number.
        """
        if self.vlm is None:
            return
        image, text = self.vlm.residual_stream_image_tokens(num_image_tokens), self.vlm.max_text_len
        if self.model.rope_sections and image and not (self.adapter.keeps_grid and math.isqrt(image) ** 2 == image):
            given = f"adapter.type = {self.adapter.type!r} gives {image}"
            raise InputError(
                f"model.rope_sections = {self.model.rope_sections}: needs a square grid of image tokens (no CLS token), {given}"
            )
        rows = [stage.train.get("seq_len", self.train.seq_len) for stage in self.stages] or [self.train.seq_len]
        row = min(length for length in rows if isinstance(length, int))
        model = self.model.max_seq_len
        if image + text > min(model, row):
            raise InputError(
                f"max_text_len = {text}: with {image} image tokens in the stream that is {image + text} positions, but "
                f"model.max_seq_len = {model} and train.seq_len = {row}; both must be at least {image + text}"
                + (f"; no [adapter] is given, and {self.adapter.type!r} keeps every feature" if self.adapter == MLPAdapterConfig() else "")
            )

    def warnings(self) -> list[str]:
        """What is allowed but may not be meant: parts of the config that never come into force."""
        total, lines = self.total_steps(), []
        planned = sum(stage.steps for stage in self.stages)
        if self.stages and total < self.train.max_steps:
            lines.append(f"train.max_steps = {self.train.max_steps}: the stages end at step {planned}")
        cap, start = f"train.max_steps = {self.train.max_steps}", 0
        for stage in self.stages:
            if start >= total:
                lines.append(f"stage {stage.name!r} starts at step {start} and never runs, {cap}")
            start += stage.steps
        for stage in self.resolved_stages():
            warmup = max([stage.scheduler.warmup_steps, *(group.warmup_steps or 0 for group in stage.optimizer.groups)])
            if warmup > stage.steps:
                lines.append(f"stage {stage.name!r} ends after {stage.steps} of its {warmup} warm-up steps, {cap}")
            changed = self.stages[stage.index].optimizer if self.stages else {}
            lines += [f"stage {stage.name!r}: {line}" for line in stage.optimizer.warnings(stage.scheduler.name, changed)]
        if self.vlm is not None:
            known = {**(LORA_ALIAS if self.lora else {}), **defaults(type(self.vlm))["module_patterns"]}
            lines += [
                f"vlm.module_patterns: {name} = {show(patterns)} takes the place of {show(known[name])}: all that names"
                f" {name!r} means these parameters"
                for name, patterns in self.vlm.own_patterns().items()
                if name in known
            ]
            lines += self.vlm.warnings(self)
        for change in self.vlm.freeze_schedule if self.vlm else ():
            if change.start_step >= total:
                lines.append(f"the freeze schedule's start_step = {change.start_step} is never reached, {cap}")
        return lines

    def validate(self) -> None:
        """Runs every check between sections. ``load_config`` has done it; for jobs made by a program.

        Raises:
            ConfigError: with one line for each thing that is wrong.
        """
        self.check(problems := Problems())
        problems.raise_if_any()

    def check(self, problems: Problems, broken: Collection[str] = ()) -> None:
        """Collects what is wrong between sections.

        Args:
            problems: where to.
            broken: sections that could not be built; checks that read one of them are left out.
        """
        for check in CROSS_CHECKS:
            if not check.reads & set(broken):
                for table, message in check.run(self):
                    problems.add_message(table, message)
        for index in range(len(self.stages)):
            sections = self._override(index, problems, broken)
            for table, message in stage_fits(self, index, sections, self.vlm is None and "vlm" not in broken):
                problems.add_message(table, message)

    def staged_sections(self) -> list[dict[str, Any]]:
        """The sections of each stage by name, those with a problem left out."""
        return [self._override(index, Problems()) for index in range(len(self.stages))]

    def _override(self, index: int, problems: Problems, broken: Collection[str] = ()) -> dict[str, Any]:
        """The sections of stage ``index`` by name, those with a problem left out."""
        sections = {name: getattr(self, name) for name in STAGED}
        return override(self.stages[index], sections, ("stages", index), problems, broken)


SECTIONS.update(
    {name: kind for name, kind in fields_of(JobConfig).items() if name not in ("vlm", "stages", "lora", "hooks", "plugins")}
    | {"vlm": VLMConfig}
)
