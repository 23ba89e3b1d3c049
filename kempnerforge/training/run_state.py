"""What a checkpoint says of the run besides its tensors: the "state" of its manifest. It is believed only as far as it has been checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kempnerforge.checkpoint.manifest import NAME, CheckpointError, Manifest
from kempnerforge.config.build import build_record
from kempnerforge.data.text.asking import Asking
from kempnerforge.training.history import Span
from kempnerforge.util.errors import InputError


@dataclass(frozen=True)
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps that are done.
        seconds: that they took.
        samples_seen, samples_bad: over all ranks, so far.
        samples_of: how many came from each part of a mixture.
        frozen: names of the parameters that did not train in the last step.
        unevaluated: the evaluation of this step was broken off.
        metrics: digest of ``metrics.jsonl`` so far; empty where an older version saved.
        data: fingerprints of what it was begun with, by what the data are for.
        asked: how its data place their images; None in what was imported.
        history: what each span of steps was trained with.
        imported: where a model from elsewhere comes from.
    """

    step: int
    seconds: float = 0.0
    samples_seen: int = 0
    samples_bad: int = 0
    samples_of: dict[str, int] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    unevaluated: bool = False
    metrics: str = ""
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
        """As a manifest keeps it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, manifest: Manifest, origin: str = "") -> RunState:
        """That of ``manifest``.

        Args:
            origin: the checkpoint, for messages.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of its range, or the step is not that of the checkpoint.
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
