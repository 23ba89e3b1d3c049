"""A study: a TOML file that is a job with a ``[study]`` table. The job is what all cells have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge.config.build import INVALID, build
from kempnerforge.config.checks import at_least, one_of
from kempnerforge.config.files import Layer, assign, parse_overrides, read_layers
from kempnerforge.util.errors import ConfigError, InputError, Problems
from kempnerforge.util.paths import PathText, place_of

QUANTITIES = ("samples", "trained_tokens", "train_flops", "params", "wall_clock")
"""What can be matched."""
TABLE = "study"
OWN_KEYS = {"train.seed": "seeds", "run.dir": "dir"}
"""Keys that a study sets in each cell, and the key of ``[study]`` that says how."""
SET_OPTIONS = (
    *("account", "cpus-per-task", "gpus-per-node", "mem", "partition", "time"),
    *("array", "chdir", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "signal"),
)
"""Options of sbatch that are not free."""


def check_free(what: str, key: str) -> None:
    """Raises:
    InputError: ``key`` is one that the study itself sets in each cell.
    """
    if key in OWN_KEYS:
        raise InputError(f"{what}: {key} is set in each cell by [{TABLE}] {OWN_KEYS[key]}")


@dataclass
class MatchConfig:
    """Which budget all cells get, and what is moved so that they do.

    Attributes:
        quantity: "samples", "trained_tokens", "train_flops" (forward and backward, vision tower included),
            "params" or "wall_clock" (seconds of training on this machine, without evaluation and saving).
        by: what is moved in each row: "steps", "batch_size", or a whole-number key that makes the model
            wider, as "model.dim".
        amount: the budget; 0: what the first row costs as it is written.
        multiple_of: of a key in ``by``: its values are multiples of this number.
    """

    quantity: str = "samples"
    by: str = "steps"
    amount: float = 0.0
    multiple_of: int = 16

    def __post_init__(self) -> None:
        one_of(self, "quantity", QUANTITIES)
        at_least(self, 0, "amount")
        at_least(self, 1, "multiple_of")
        if self.quantity == "params" and self.by in ("steps", "batch_size"):
            raise InputError(f"by = {self.by!r}: does not change quantity = 'params'; name a key such as model.dim")
        if self.by not in ("steps", "batch_size") and "." not in self.by:
            raise InputError(f"by = {self.by!r}: allowed are 'steps', 'batch_size', or a key such as 'model.dim'")
        check_free(f"by = {self.by!r}", self.by)
        if self.quantity == "wall_clock" and self.by != "steps":
            raise InputError(f"by = {self.by!r}: quantity = 'wall_clock' is matched by 'steps'")
        if self.quantity in ("samples", "trained_tokens") and "." in self.by:
            raise InputError(f"by = {self.by!r}: does not change quantity = {self.quantity!r}; use 'steps' or 'batch_size'")


@dataclass
class ScoreConfig:
    """What is compared.

    Attributes:
        key: a key of ``metrics.jsonl`` that the evaluation at the end writes.
        better: "higher" or "lower".
    """

    key: str = "eval/exact_match"
    better: str = "higher"

    def __post_init__(self) -> None:
        one_of(self, "better", ("higher", "lower"))
        if not self.key.removeprefix("eval/") or not self.key.startswith("eval/"):
            raise InputError(f"key = {self.key!r}: must be eval/ and the name of a score, such as 'eval/exact_match'")


@dataclass
class RangeConfig:
    """Where a value is looked for.

    Attributes:
        low, high: the ends, both included; two whole numbers mean that all values are.
        log: spread evenly in the logarithm.
    """

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"low = {self.low}: must be less than high = {self.high}")
        if self.log and self.low <= 0:
            raise InputError(f"low = {self.low}: must be > 0 with log = true")


@dataclass
class TuneConfig:
    """The same number of trials for each row, before its cells are run with what was found.

    A trial trains with a part of the training data held out and is scored on that part; the test split is not
    read. Its seed is one that no cell has.

    Attributes:
        trials: of each row.
        keys: the keys that are tuned, as "optimizer.lr" = { low = 1e-4, high = 1e-2, log = true }.
        validation: share of the training samples that is held out in trials.
        seed: of all trials and of the sampler.
        sampler: "qmc" spreads the trials evenly, the same points for each row; "tpe" proposes the next from
            those before it.
    """

    trials: int = 8
    keys: dict[str, RangeConfig] = field(default_factory=dict)
    validation: float = 0.1
    seed: int = 1000
    sampler: str = "qmc"

    def __post_init__(self) -> None:
        at_least(self, 1, "trials")
        at_least(self, 0, "seed")
        one_of(self, "sampler", ("qmc", "tpe"))
        if not 0 < self.validation < 1:
            raise InputError(f"validation = {self.validation}: must lie between 0 and 1")
        if not self.keys:
            raise InputError("keys = {}: name at least one key to tune")
        if wrong := next((key for key in self.keys if "." not in key), None):
            raise InputError(f'keys: {wrong!r}: must be a whole key, in quotes, such as "optimizer.lr"')
        for key in self.keys:
            check_free(f"keys: {key!r}", key)


@dataclass
class SlurmConfig:
    """Each trial and each cell is a job of SLURM. Keys are called as the options of ``sbatch``; empty or 0:
    what the cluster sets.

    Attributes:
        executor: "slurm"; or "local": the jobs run on this machine, to try a study. They get ``time`` and
            ``gpus_per_node`` alone.
        partition, account: see sbatch.
        time: minutes of a job. A cell that has more to do saves, and its job is queued again, three times at
            most.
        gpus_per_node: of a job; 0: none.
        cpus_per_task: of a job.
        mem_gb: of a job.
        setup: lines of shell that a job runs first, such as "module load cuda".
        options: further ones of sbatch, as { qos = "long", constraint = "a100" }.
    """

    executor: str = "slurm"
    partition: str = ""
    account: str = ""
    time: int = 60
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    mem_gb: float = 0.0
    setup: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(self, "executor", ("slurm", "local"))
        at_least(self, 1, "time")
        at_least(self, 0, "gpus_per_node", "cpus_per_task", "mem_gb")
        for key, value in self.options.items():
            if (key := key.replace("_", "-")) in SET_OPTIONS:
                raise InputError(f"options: {key!r}: has its own key in [{TABLE}.slurm], or is set by the study")
            if value is False or not isinstance(value, str | int | float):
                raise InputError(f"options: {key} = {value!r}: must be a text, a number, or true for an option without a value")


@dataclass
class StudyConfig:
    """``[study]``.

    Attributes:
        name: of the study.
        dir: everything that it leaves is there.
        seeds: one cell of each row for each: ``train.seed``.
        axes: rows are all combinations. An axis is ``"key.path" = [values]``, or a table of named pieces of a
            config: ``[study.axes.NAME.LEVEL]``.
        pairs: of rows, [["A", "B"], ...], whose differences the study asks about; empty: all. The fewer, the
            smaller a difference it can show.
        match, scores, tune, slurm: see their tables. Of several scores the first one is what rows are
            compared by.
        keep: of the checkpoints of a finished cell: "last" or "none".
        ranks: processes of each cell.
        threads: of each process; 0: torch's own choice. The last bits of a result depend on it.
        jobs: cells that are run at the same time.
    """

    name: str
    axes: dict[str, Any]
    dir: PathText = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    pairs: list[list[str]] = field(default_factory=list)
    match: MatchConfig | None = None
    scores: list[ScoreConfig] = field(default_factory=lambda: [ScoreConfig()])
    tune: TuneConfig | None = None
    slurm: SlurmConfig | None = None
    keep: str = "last"
    ranks: int = 1
    threads: int = 0
    jobs: int = 1

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name or self.name.startswith("."):
            raise InputError(f"name = {self.name!r}: must be a plain name, it is part of a path")
        self.dir = self.dir or f"runs/studies/{self.name}"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds = {self.seeds}: must be whole numbers from 0 on, each once, and at least one")
        if not self.axes:
            raise InputError("axes = {}: name at least one axis")
        if not self.scores or len({score.key for score in self.scores}) < len(self.scores):
            raise InputError("scores: name at least one, each once")
        if wrong := next((pair for pair in self.pairs if len(set(pair)) != 2 or len(pair) != 2), None):
            raise InputError(f"pairs: {wrong}: must be the names of two rows")
        if len({frozenset(pair) for pair in self.pairs}) < len(self.pairs):
            raise InputError(f"pairs = {self.pairs}: must have each pair once")
        one_of(self, "keep", ("last", "none"))
        at_least(self, 1, "ranks", "jobs")
        at_least(self, 0, "threads")
        if self.tune is not None and self.tune.seed in self.seeds:
            raise InputError(f"tune.seed = {self.tune.seed}: is one of seeds; trials need a seed that no cell has")


@dataclass(frozen=True)
class Study:
    """A study that was read.

    Attributes:
        layers: the common part of all cells, the most basic file first.
        overrides: of the command line, for all cells.
    """

    path: Path
    cfg: StudyConfig
    layers: list[Layer]
    overrides: list[str]

    @property
    def dir(self) -> Path:
        return place_of(self.cfg.dir)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads ``path``; the job in it is checked when cells are made of it.

    Args:
        overrides: ``--study.key=value`` changes the study, any other key all cells.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    layers = read_layers(place_of(path))
    table = layers[-1].table.pop(TABLE, None)
    if table is None:
        raise ConfigError([f"{path}: has no [study] table; it says which cells there are, see docs/studies.md"])
    problems = Problems(str(path))
    own = [word for word in overrides if word.startswith(f"--{TABLE}.")]
    if wrong := next((word for word in own if "=" not in word), None):
        raise InputError(f"{wrong}: must be written as {wrong}=VALUE")
    for key, value in parse_overrides(own, problems):
        assign(table, key[1:], value, problems)
    common = [word for word in overrides if word not in own]
    for word in common:
        check_free(word, word.removeprefix("--").partition("=")[0])
    cfg = build(StudyConfig, table, (TABLE,), problems)
    problems.raise_if_any()
    assert cfg is not INVALID
    return Study(place_of(path), cfg, list(layers), common)
