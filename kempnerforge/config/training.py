"""``[run] [train] [optimizer] [scheduler] [distributed] [checkpoint] [metrics] [eval]``. Steps are optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from kempnerforge.config.checks import at_least, fraction, more_than, one_of


@dataclass
class RunConfig:
    """``dir``: everything a run leaves behind lies there; an existing one is resumed."""

    dir: str = "runs/default"

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir = '': a run needs a directory")


@dataclass
class TrainConfig:
    """How long, how much at once, in which precision.

    Attributes:
        max_steps: optimizer steps of the whole run; 0 means as many as the stages have. With stages it caps them.
        batch_size: samples of one optimizer step, over all ranks and micro-batches; the same on any number of ranks.
        grad_accum_steps: micro-batches that one step is made of, on each rank.
        seq_len: positions of one row at most, image tokens included; windows of plain text are this long.
        seed: of weights, order and sampling.
        mixed_precision: compute dtype: "bf16", "fp32", or "auto": bf16 where the hardware has it. Master weights are always fp32.
        compile_model: torch.compile each shard unit.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        grad_clip_norm: of the global gradient norm; 0 is off.
        max_skipped_steps: steps in a row that may be skipped for a loss or gradient that is not finite before the run stops.
    """

    max_steps: int = 0
    batch_size: int = 32
    grad_accum_steps: int = 1
    seq_len: int = 1024
    seed: int = 0
    mixed_precision: str = "auto"
    compile_model: bool = False
    activation_checkpointing: bool = False
    grad_clip_norm: float = 1.0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "grad_accum_steps", "seq_len")
        at_least(self, 0, "max_steps", "seed", "grad_clip_norm", "max_skipped_steps")
        one_of(self, "mixed_precision", ("auto", "bf16", "fp32"))
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"batch_size = {self.batch_size}: must be a multiple of grad_accum_steps = {self.grad_accum_steps}")


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for hidden matrices with AdamW for the rest.

    Attributes:
        name: "adamw" or "muon".
        lr: peak learning rate of AdamW.
        muon_lr, muon_momentum: of the matrices that Muon takes.
        betas, eps: of AdamW.
        weight_decay: of matrices; vectors have none.
        lr_scale: alias or fnmatch pattern of parameter names -> factor on the learning rate; the last match counts.
    """

    name: str = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    lr_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(self, "name", ("adamw", "muon"))
        at_least(self, 0, "lr", "muon_lr", "weight_decay")
        more_than(self, 0, "eps")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            raise ValueError(f"betas = {list(self.betas)}, muon_momentum = {self.muon_momentum}: must lie in [0, 1)")
        for pattern, scale in self.lr_scale.items():
            if scale < 0:
                raise ValueError(f"lr_scale.{pattern} = {scale}: must be >= 0")


@dataclass
class SchedulerConfig:
    """Learning rate over a stage, as a factor on the peak.

    Attributes:
        name: "cosine", "linear", "wsd" (warm-up, stable, decay: Hu et al. 2024) or "constant".
        warmup_steps: linear warm-up.
        min_lr_ratio: the factor that decay ends at.
        decay_fraction: share of the stage that "wsd" decays in.
    """

    name: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        one_of(self, "name", ("cosine", "linear", "wsd", "constant"))
        at_least(self, 0, "warmup_steps")
        fraction(self, "min_lr_ratio", "decay_fraction")


@dataclass
class DistributedConfig:
    """FSDP2 over all ranks.

    Attributes:
        reshard_after_forward: free gathered weights between forward and backward (ZeRO-3) or keep them (ZeRO-2).
        timeout_s: seconds that a collective may take before the run stops with exit code 3.
    """

    reshard_after_forward: bool = True
    timeout_s: int = 600

    def __post_init__(self) -> None:
        at_least(self, 1, "timeout_s")


@dataclass
class CheckpointConfig:
    """``interval`` in steps (0: only at the end and when interrupted); ``keep_last_n`` of them stay."""

    interval: int = 500
    keep_last_n: int = 2

    def __post_init__(self) -> None:
        at_least(self, 0, "interval")
        at_least(self, 1, "keep_last_n")


@dataclass
class MetricsConfig:
    """``interval`` in steps between lines of metrics.jsonl; ``tensorboard`` writes the same to events/."""

    interval: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "interval")


@dataclass
class EvalConfig:
    """Exact match of generated answers on the held-out split.

    Attributes:
        interval: steps between evaluations during training; 0 means none.
        at_end: evaluate when training is done.
        samples: texts that are asked during training, spread over the split; at the end all are. 0 means all here, too.
        batch_size: texts generated together.
        max_new_tokens: of one answer.
        blind: repeat each evaluation with blank images.
    """

    interval: int = 0
    at_end: bool = True
    samples: int = 512
    batch_size: int = 512
    max_new_tokens: int = 16
    blind: bool = True

    def __post_init__(self) -> None:
        at_least(self, 0, "interval", "samples")
        at_least(self, 1, "batch_size", "max_new_tokens")
