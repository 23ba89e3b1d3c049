"""``[run] [train] [distributed] [checkpoint] [metrics] [eval]``. Steps are optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, one_of, only_if
from kempnerforge.util.errors import InputError, UnreadError
from kempnerforge.util.paths import PathText

MOST_ROWS = 1 << 20
"""At once."""
MOST_NEW_TOKENS = 1 << 16
"""Of one answer."""
AUTO: Final = "auto"
"""``train.batch_size`` that the memory decides."""
MOST_LENGTH_PENALTY = 10
"""Either way: scores of long texts stay within fp32."""


@dataclass
class RunConfig:
    """Where a run lives, and what its weights begin with.

    Attributes:
        dir: everything that a run writes is there; an existing run is resumed.
        init_from: weights (no optimizer state) that a fresh run starts with: a checkpoint, a run directory,
            or a Hugging Face directory with a text model. With ``data.tokenizer = "train"`` the tokenizer
            that lies beside them is taken, too.
        init_allow: fnmatch patterns of parameter names that may be missing there, be there in excess, or have
            another shape there: such ones stay fresh. All others must match.
        init_parts: a part of the model, such as ``vision_encoder`` -> the checkpoint or run directory whose
            part of that name a fresh run starts with. It may be of another model; the section of the part
            must be the same there. The text model comes from ``init_from``, with its tokenizer.
    """

    dir: PathText = "runs/default"
    init_from: PathText = ""
    init_allow: list[str] = field(default_factory=list)
    init_parts: dict[str, PathText] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.dir:
            raise InputError("dir = '': a run needs a directory")
        if self.init_allow and not self.begins_with_weights:
            raise InputError(f"init_allow = {self.init_allow}: is only read with init_from or init_parts")
        if "transformer" in self.init_parts:
            raise InputError("init_parts: transformer: the text model comes from init_from, with its tokenizer")

    @property
    def begins_with_weights(self) -> bool:
        """Whether a fresh run reads weights."""
        return bool(self.init_from or self.init_parts)


@dataclass
class TrainConfig:
    """How long, how much at once, in which precision.

    Attributes:
        max_steps: optimizer steps of the whole run; 0 means as many as the stages have. With stages it caps
            them.
        total_samples: instead of ``max_steps``, without stages: as many steps as these samples make whole
            batches (VLA Foundry's ``total_train_samples``).
        batch_size: samples of one optimizer step, over all ranks and micro-batches; the same on any number of
            ranks. "auto": as many as ``rows_per_step`` says, in the largest micro-batches that fit into the
            memory of each rank. The run's config.toml keeps the numbers that were chosen.
        rows_per_step: of ``batch_size = "auto"``: what ``batch_size`` is otherwise, so that the machine
            decides how a step is cut, and not what is computed.
        grad_accum_steps: micro-batches that one step is made of, on each rank; "auto" chooses it.
        seq_len: positions of one row at most, image tokens included; windows of plain text are this long.
        seed: of weights, order and sampling.
        mixed_precision: compute dtype: "bf16", "fp32", or "auto": bf16 where the hardware has it. Master
            weights are always fp32.
        compile_model: torch.compile each shard unit.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its
            activations.
        activation_checkpointing_keeps: "inputs": of each layer its inputs alone; "products": also what its
            matrix products and its attention give, so that no product is computed twice. It needs more memory
            and less time.
        float8: products of linear layers in the layers of the text backbone, in training (extra ``float8``;
            docs/runs.md): "off"; "tensorwise" is the fastest, "rowwise" and "rowwise_with_gw_hp" more accurate.
        logits_at_once: trained tokens whose logits are in memory at once, on each process; 0: those of the
            whole micro-batch. It saves memory where the vocabulary is large, and changes results by rounding
            alone. The smaller, the slower: 1,000 cost the head up to a fifth of its time, 256 half.
        grad_clip_norm: of the global gradient norm; 0 is off.
        on_nonfinite: what a loss or gradient that is not finite does: "skip" the step, on all ranks; or
            "stop" the run, to be continued from its last checkpoint.
        max_skipped_steps: steps in a row that may be skipped before the run stops all the same.
        ema_decay: of an exponential moving average of the weights, which evaluation and generation then use;
            0 is off. In step t it is at most (1 + t) / (10 + t), so that the first weights soon count little.
        feature_cache: a directory where the features of a frozen encoder are kept, so that each image is
            encoded once; it may be shared by runs, and a resumed run needs it as it was. Empty keeps none. It
            pays where the encoder is a large part of a step.
    """

    max_steps: int = 0
    total_samples: int = 0
    batch_size: int | Literal["auto"] = 32
    rows_per_step: int = 0
    grad_accum_steps: int = 1
    seq_len: int = 1024
    seed: int = 0
    mixed_precision: str = "auto"
    compile_model: bool = False
    activation_checkpointing: bool = False
    activation_checkpointing_keeps: str = "inputs"
    float8: str = "off"
    logits_at_once: int = 0
    grad_clip_norm: float = 1.0
    on_nonfinite: str = "skip"
    max_skipped_steps: int = 10
    ema_decay: float = 0.0
    feature_cache: PathText = ""

    def __post_init__(self) -> None:
        rows = ["rows_per_step"] if self.batch_size == AUTO else ["batch_size", "rows_per_step"]  # the word has no size
        at_least(self, 1, *rows[:-1], "grad_accum_steps", "seq_len")
        at_least(self, 0, "rows_per_step", "max_steps", "total_samples", "seed", "logits_at_once", "grad_clip_norm", "max_skipped_steps")
        one_of(self, "activation_checkpointing_keeps", ("inputs", "products"))
        only_if(self, self.activation_checkpointing, "activation_checkpointing = true", "activation_checkpointing_keeps")
        one_of(self, "float8", ("off", "tensorwise", "rowwise", "rowwise_with_gw_hp"))
        at_most(self, MOST_ROWS, *rows)
        self._check_auto()
        one_of(self, "mixed_precision", ("auto", "bf16", "fp32"))
        one_of(self, "on_nonfinite", ("skip", "stop"))
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay = {self.ema_decay}: must lie in [0, 1)")
        if self.step_rows % self.grad_accum_steps:
            raise InputError(f"batch_size = {self.batch_size}: must be a multiple of grad_accum_steps = {self.grad_accum_steps}")
        if self.total_samples:
            self._count_steps()

    def _check_auto(self) -> None:
        """``rows_per_step`` belongs to "auto", and ``grad_accum_steps`` does not."""
        only_if(self, self.batch_size == AUTO, 'batch_size = "auto"', "rows_per_step")
        if self.batch_size != AUTO:
            return
        if not self.rows_per_step:
            raise InputError('batch_size = "auto": needs rows_per_step, the rows of one optimizer step over all ranks and micro-batches')
        if self.grad_accum_steps != 1:
            message = f'grad_accum_steps = {self.grad_accum_steps}: batch_size = "auto" chooses it; leave it out'
            raise UnreadError("grad_accum_steps", message)

    @property
    def step_rows(self) -> int:
        """Samples (of packed rows: rows) of one optimizer step, over all ranks and micro-batches."""
        return self.rows_per_step if self.batch_size == AUTO else self.batch_size

    def _count_steps(self) -> None:
        """Sets ``max_steps`` by ``total_samples``."""
        steps = self.total_samples // self.step_rows
        if not steps:
            raise InputError(f"total_samples = {self.total_samples}: must be at least one batch, batch_size = {self.step_rows}")
        if self.max_steps not in (0, steps):
            raise InputError(
                f"max_steps = {self.max_steps}: total_samples = {self.total_samples} makes {steps} steps of {self.step_rows}; "
                "leave one of the two out, or set it to 0"
            )
        self.max_steps = steps


@dataclass
class DistributedConfig:
    """FSDP2 over all ranks.

    Attributes:
        reshard_after_forward: free gathered weights between forward and backward (ZeRO-3) or keep them
            (ZeRO-2).
        shard_size: processes that share one copy of weights, gradients and optimizer state; there are as many
            copies as that goes into all processes, and gradients are summed over copies, too (hybrid
            sharding, Zhao et al. 2023, section 3.2.2). On a cluster: the processes of one node. 0: all share
            one copy.
        tensor_parallel: processes that compute each layer together, on the same samples: each has some of the
            heads and of the feed-forward's channels (Shoeybi et al. 2019). They exchange activations in every
            layer: the processes of one node at most. Must divide ``model.n_heads``, ``n_kv_heads`` and
            ``ffn_dim``.
        context_parallel: processes that share each row in training, some of its positions each, and exchange
            keys and values in every layer (Grattafiori et al. 2024, section 3.3.2): for rows that are too long
            for one. Archs that need whole rows refuse it.
        accumulate_sharded: with ``train.grad_accum_steps`` each micro-batch's gradients are reduced at once,
            and only a process' part of the sum is held: 4 bytes a parameter less in memory, and as many more
            reductions. False: the sum is reduced once a step.
        balance_images: in training, processes with more images than others send some to them to be encoded:
            for packed rows, of which some have many. Features are equal up to rounding.
        timeout_s: seconds that a collective may take before the run stops with exit code 3.
    """

    reshard_after_forward: bool = True
    shard_size: int = 0
    tensor_parallel: int = 1
    context_parallel: int = 1
    accumulate_sharded: bool = False
    balance_images: bool = False
    timeout_s: int = 600

    def __post_init__(self) -> None:
        at_least(self, 1, "timeout_s", "tensor_parallel", "context_parallel")
        at_least(self, 0, "shard_size")
        if self.shard_size % self.group:
            together = f"tensor_parallel = {self.tensor_parallel} times context_parallel = {self.context_parallel}"
            raise InputError(f"shard_size = {self.shard_size}: must be a multiple of {together}")

    def check_shared(self, sizes: Mapping[str, int]) -> None:
        """Refuses ``sizes``, by key, that ``tensor_parallel`` does not divide."""
        if wrong := [f"{key} = {size}" for key, size in sizes.items() if size % self.tensor_parallel]:
            raise InputError(f"{', '.join(wrong)}: distributed.tensor_parallel = {self.tensor_parallel} must divide it")

    @property
    def group(self) -> int:
        """Processes that have the same samples."""
        return self.tensor_parallel * self.context_parallel

    def check_processes(self, count: int) -> None:
        """Refuses groups that ``count`` processes cannot be divided into."""
        if count % self.group:
            keys = f"distributed.tensor_parallel = {self.tensor_parallel}, context_parallel = {self.context_parallel}"
            raise InputError(f"{keys}: their product must divide the number of processes, {count}")
        if self.shard_size and count % self.shard_size and count > 1:
            raise InputError(f"distributed.shard_size = {self.shard_size}: must divide the number of processes, {count}")


@dataclass
class CheckpointConfig:
    """When a run saves itself.

    Attributes:
        interval: steps between checkpoints; 0: only at the end and when interrupted.
        keep_last_n: the newest ones stay, older ones are deleted.
        keep_best: a score, such as "eval/exact_match": the checkpoint with the best one is also kept, and
            ``checkpoints/best`` names it. Empty keeps none.
        best_is: whether the "highest" or the "lowest" score is the best.
        in_background: training goes on while a checkpoint is written from a copy in CPU memory, of the size
            of this process' weights and optimizer state. If it cannot be written, the run ends with exit code
            3 when the next one is due, or at its end.
    """

    interval: int = 500
    keep_last_n: int = 2
    keep_best: str = ""
    best_is: str = "highest"
    in_background: bool = False

    def __post_init__(self) -> None:
        at_least(self, 0, "interval")
        at_least(self, 1, "keep_last_n")
        one_of(self, "best_is", ("highest", "lowest"))
        only_if(self, self.keep_best, "keep_best", "best_is")


@dataclass
class TrackerConfig:
    """One of ``metrics.trackers``, which get the numbers of ``metrics.jsonl`` as well. A name alone is the
    same as a table with that ``type``.

    Subclasses register with ``@registry.register_tracker_config``.

    Attributes:
        type: "tensorboard", "wandb", "mlflow", "trackio", or a plugin's name.
    """

    type: str = ""


@dataclass
class HookConfig:
    """One ``[[hooks]]`` table. They run in this order, after evaluation.

    Subclasses register with ``@registry.register_hook_config``.

    Attributes:
        type: which hook: "study", or one of a plugin.
    """

    type: str = ""


@dataclass
class MetricsConfig:
    """The numbers of a run, in ``metrics.jsonl``.

    Attributes:
        interval: steps between lines.
        tensorboard: write the same numbers to ``events/``.
        trackers: others that get the same numbers: names, or tables with a ``type`` and its keys.
        diagnosis: also record gradients, updates and gates of each part of the model, the share of attention
            on images, seconds of each phase of a step, FLOPs a second and memory.
        peak_tflops: of one device, in 1e12 FLOPs a second, to record what share of it is used; 0: not known.
    """

    interval: int = 10
    tensorboard: bool = True
    trackers: list[TrackerConfig] = field(default_factory=list)
    diagnosis: bool = False
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "interval")
        at_least(self, 0, "peak_tflops")
        only_if(self, self.diagnosis, "diagnosis = true", "peak_tflops")
        if not self.tensorboard and any(each.type == "tensorboard" for each in self.trackers):
            raise InputError("trackers: 'tensorboard' is there, with tensorboard = false; leave one of them out")

    def all_trackers(self) -> list[TrackerConfig]:
        """``trackers``, and before them "tensorboard" unless it is among them or not wanted."""
        adds_tensorboard = self.tensorboard and all(each.type != "tensorboard" for each in self.trackers)
        return [*([registry.tracker_configs.get("tensorboard")()] if adds_tensorboard else []), *self.trackers]


@dataclass
class EvalConfig:
    """Metrics on the held-out split.

    Attributes:
        interval: steps between evaluations during training; 0 means none.
        at_end: evaluate when training is done.
        samples: texts that are asked during training, drawn once by ``train.seed``; at the end all are. 0
            means all here, too.
        batch_size: texts generated together.
        max_new_tokens: of one answer, the one that ends it included. Longer true answers are counted beside
            the score: no model can write them whole.
        beams: texts that are followed at once for each answer, the best of which is the answer; 1 is greedy.
            ``batch_size`` times as many rows are computed together.
        length_penalty: of several beams: a text's score is its log-likelihood divided by the power
            ``length_penalty`` of its length. Below 0 it favours short answers. From -10 to 10.
        shots: examples with their answers that are in front of each question, as earlier turns; tasks that
            score given answers take none.
        shots_split: the examples are from the "training" data, or "held_out" ones, never the question's own
            sample.
        shots_pool: samples that examples are chosen from, drawn by ``train.seed``; 0: all.
        shots_by: "random" draws them for each question by ``train.seed``; "similarity" takes those whose
            images are the most similar to the question's, the most similar one last: by the cosine of the
            mean features of the model's vision encoder.
        shots_images: false leaves the images of examples out, and their placeholders.
        blind: repeat each evaluation with blank images.
        shuffled: repeat each evaluation with the images of other questions.
        exact_match: generate an answer to each held-out question and compare it with the truth.
        loss: mean cross-entropy of the held-out answers, for instance of captions. Where the data have no
            questions it is always measured.
        text_path: a UTF-8 file of plain text. Each evaluation reads it without any image and reports the
            perplexity, which shows how much of the language model is kept.
        text_window: tokens of the text that are read together, each after the ones before it.
        tasks: further metrics by name: docs/tasks.md, or of plugins.
        options: of a task in ``tasks``, by its name: ``[eval.options.NAME]``.
    """

    BUILT_IN: ClassVar[tuple[str, ...]] = ("exact_match", "loss", "text_perplexity")  # tasks with keys of their own here

    interval: int = 0
    at_end: bool = True
    samples: int = 512
    batch_size: int = 512
    max_new_tokens: int = 16
    beams: int = 1
    length_penalty: float = 1.0
    shots: int = 0
    shots_split: str = "training"
    shots_pool: int = 2048
    shots_by: str = "random"
    shots_images: bool = True
    blind: bool = True
    shuffled: bool = False
    exact_match: bool = True
    loss: bool = False
    text_path: PathText = ""
    text_window: int = 512
    tasks: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def scores(self) -> list[str]:
        """What the keys of the scores in ``metrics.jsonl`` begin with, one for each task."""
        return [f"eval/{name}" for name in (*self.BUILT_IN, *self.tasks)]

    def measures(self, key: str) -> bool:
        """Whether ``key`` can be a score of one of the tasks: "eval/NAME", "eval/NAME_blind" or
        "eval/NAME/KIND".
        """
        return any(key == name or key.startswith((f"{name}_", f"{name}/")) for name in self.scores)

    def __post_init__(self) -> None:
        at_least(self, 0, "interval", "samples", "shots", "shots_pool")
        one_of(self, "shots_split", ("training", "held_out"))
        one_of(self, "shots_by", ("random", "similarity"))
        only_if(self, self.shots > 0, "shots above 0", "shots_split", "shots_pool", "shots_by", "shots_images")
        at_least(self, 1, "batch_size", "max_new_tokens", "beams", "text_window")
        only_if(self, self.beams > 1, "beams above 1", "length_penalty")
        at_least(self, -MOST_LENGTH_PENALTY, "length_penalty")
        at_most(self, MOST_LENGTH_PENALTY, "length_penalty")
        at_most(self, MOST_ROWS, "batch_size", "beams")
        at_most(self, MOST_NEW_TOKENS, "max_new_tokens")
        only_if(self, bool(self.text_path), "text_path", "text_window")
        if twice := [name for at, name in enumerate(self.tasks) if name in (*self.BUILT_IN, *self.tasks[:at])]:
            raise InputError(f"tasks = {self.tasks}: {twice[0]!r} is there already; name each task but {', '.join(self.BUILT_IN)} once")
