"""What a checkpoint records of its run: the "state" of its manifest, checked when it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.manifest import NAME, CheckpointError, Manifest
from kempnerforge.config.build import build_record
from kempnerforge.config.files import read_toml
from kempnerforge.config.freeze import named
from kempnerforge.data.text.asking import Asking
from kempnerforge.training.history import Span
from kempnerforge.util.errors import InputError


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far.

    Attributes:
        key: of the score, as in ``metrics.jsonl``.
        best_is: "highest" or "lowest".
        step: of the checkpoint.
        score: its own.
    """

    key: str
    best_is: str
    step: int
    score: float


@dataclass(frozen=True)
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        seconds: wall-clock time of these steps.
        samples_seen, samples_bad: over all ranks, so far.
        samples_of: samples so far from each part of a mixture.
        frozen: names of the parameters that do not train at ``step``.
        unevaluated: the evaluation of this step was interrupted.
        metrics: digest of ``metrics.jsonl`` so far; empty where an older version saved.
        best: with ``checkpoint.keep_best``, the checkpoint that is kept; None where nothing was evaluated
            yet.
        data: fingerprints of the data at the start, by what the data are for.
        asked: how the data place their images; None in an imported model.
        history: what each span of steps was trained with.
        imported: where an imported model comes from.
    """

    step: int
    seconds: float = 0.0
    samples_seen: int = 0
    samples_bad: int = 0
    samples_of: dict[str, int] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    unevaluated: bool = False
    metrics: str = ""
    best: Best | None = None
    data: dict[str, str] = field(default_factory=dict)
    asked: Asking | None = None
    history: list[Span] = field(default_factory=list)
    imported: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("step", "seconds", "samples_seen", "samples_bad"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if self.samples_bad > self.samples_seen:
            raise ValueError(f"samples_bad = {self.samples_bad}: of {self.samples_seen} samples")
        if any(count < 0 for count in self.samples_of.values()):
            raise ValueError(f"samples_of = {self.samples_of}: must be at least 0")
        starts = [span.start for span in self.history]
        if starts != sorted(set(starts)) or any(start > self.step for start in starts):
            raise ValueError(f"history: spans that start at {starts} in a run of {self.step} steps")

    def to_json(self) -> dict[str, Any]:
        """The JSON object for a manifest."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, manifest: Manifest, origin: str = "") -> RunState:
        """The state in ``manifest``.

        Args:
            origin: the checkpoint, for messages.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of its range, or the step is
                another than the checkpoint's.
        """
        table = {key: value for key, value in manifest.state.items() if value is not None}
        where = f"{origin}/{NAME}" if origin else NAME
        try:
            state = build_record(cls, "state", table, where)
        except InputError as error:
            raise CheckpointError(str(error)) from None
        if state.step != manifest.step:
            raise CheckpointError(f"{where}: [state] step = {state.step} in a checkpoint of step {manifest.step}")
        return state


@dataclass(frozen=True)
class SavedRun:
    """The checkpoint from which a run is continued.

    Attributes:
        path: its directory.
    """

    path: Path
    manifest: Manifest
    state: RunState

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> SavedRun:
        """Raises CheckpointError as ``RunState.of``."""
        return cls(path, manifest, RunState.of(manifest, str(path)))

    @property
    def world_size(self) -> int:
        """Processes of the run's last steps; 0: not recorded."""
        history = self.state.history
        return history[-1].world_size if history else 0

    def config(self) -> dict[str, Any]:
        """The config of the run's last steps, as a table: plugins of the run are not imported."""
        history = self.state.history
        return history[-1].config if history else with_own_names(read_toml(self.path / "config.toml"))


def with_own_names(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` from before checkpoints had a history: then an alias matched what is in a module, but not a
    parameter with its own name.
    """
    vlm = config.get("vlm")
    aliases = vlm.get("module_patterns") if isinstance(vlm, dict) else None
    if not isinstance(aliases, dict):
        return config
    for alias, patterns in aliases.items():
        if isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns):
            expanded = (named(pattern.removesuffix(".*")) if pattern.endswith(".*") else [pattern] for pattern in patterns)
            aliases[alias] = list(dict.fromkeys(chain.from_iterable(expanded)))
    return config
