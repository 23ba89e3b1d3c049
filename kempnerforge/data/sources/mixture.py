"""A mixture: samples are drawn from several sources by weight, and each source has its templates. Weights may
change with the steps of a stage.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from kempnerforge.config import registry
from kempnerforge.config.checks import more_than, not_default
from kempnerforge.config.data import JOB_KEYS, DataConfig
from kempnerforge.data.batching.loader import CHARACTERS_PER_TOKEN
from kempnerforge.data.batching.order import Mixed, Order
from kempnerforge.data.sample import Sample, SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.sources.keys import Ignoring
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError, UnreadError, cut

MIXTURE = "mixture"
SMALLEST_LOSS_WEIGHT = 1e-12
"""Sums of much smaller ones have no reciprocal in fp32."""


@dataclass
class PhaseConfig:
    """One ``[[data.phases]]`` table.

    Attributes:
        start_step: optimizer step of the stage from which the weights hold. With ``batching = "pack"``, where
            a step takes as many samples as fit, they hold from the first window of packs that begins at that
            step or after it.
        weights: of the parts, in their order.
    """

    start_step: int
    weights: list[float]


@registry.register_data_config
@dataclass
class MixtureConfig(DataConfig):
    """Several sources. Of every n samples in a row since the beginning of a phase, each part has its share of
    n up to less than one sample; shares are weights over their sum, exact for short decimals (.5, .3, .2) and
    else rounded to about one in 250,000. A part that is used up begins again, shuffled anew; a change of
    phase restarts none. Held out are the held-out samples of all parts that have any.

    Attributes:
        parts: ``[[data.parts]]``, each a section as ``[data]`` of its own source would be, without the keys
            that hold for the whole job: these are in ``[data]``, templates and all else in the parts.
        weights: of the parts; 0 leaves one out. Empty: by size.
        temperature: of weights by size, size ** (1 / temperature): 1 keeps the sizes, large values make all
            alike (Raffel et al. 2020, "T5", section 3.5.2; Xue et al. 2021, "mT5", whose exponent alpha this
            is the inverse of).
        phases: other weights from later steps on; steps must increase.
        loss_weights: how much a trained token of each part counts: the loss that is sent backward is the mean
            over the tokens of a step with these weights, over their sum (``train/weighted_loss``;
            ``train/loss`` and ``eval/loss`` count all alike). Empty: all alike.
    """

    source: str = MIXTURE
    parts: list[DataConfig] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    temperature: float = 1.0
    phases: list[PhaseConfig] = field(default_factory=list)
    loss_weights: list[float] = field(default_factory=list)

    def loss_weights_by_section(self) -> list[float]:
        return self.loss_weights if set(self.loss_weights) != {1.0} else []

    def never_reached(self, steps: int) -> str:
        late = next((phase for phase in self.phases if phase.start_step >= steps), None)
        return f"phases: start_step = {late.start_step}" if late is not None else ""

    def sections(self) -> list[DataConfig]:
        return list(self.parts)

    @property
    def needs_images(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # a fact about the parts, not the class
        return any(part.needs_images for part in self.parts)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise InputError("parts = []: a mixture needs at least one [[data.parts]] table")
        allowed = {*JOB_KEYS, "source", "parts", "weights", "temperature", "phases", "loss_weights"}
        for key in not_default(self):
            if key not in allowed:
                raise UnreadError(key, f"{key} = {cut(repr(getattr(self, key)))}: a mixture does not read it; set it in [[data.parts]]")
        for index, part in enumerate(self.parts):
            self._check_part(index, part)
        more_than(self, 0, "temperature")
        if self.weights and self.temperature != 1:
            raise InputError(f"temperature = {self.temperature}: is for weights by size; leave weights empty, or the temperature at 1")
        if self.weights:
            self._check_weights("weights", self.weights)
        if self.loss_weights:
            self._check_weights("loss_weights", self.loss_weights)
            if min(self.loss_weights) < SMALLEST_LOSS_WEIGHT:
                raise InputError(
                    f"loss_weights = {self.loss_weights}: each must be at least {SMALLEST_LOSS_WEIGHT}; "
                    "a part that is not trained has weight 0 in weights"
                )
        for index, phase in enumerate(self.phases):
            if phase.start_step < 1:
                raise InputError(
                    f"phases[{index}].start_step = {phase.start_step}: must be >= 1; what holds from step 0 on is data.weights"
                )
            self._check_weights(f"phases[{index}].weights", phase.weights)
        for index, (before, phase) in enumerate(pairwise(self.phases), 1):
            if phase.start_step <= before.start_step:
                raise InputError(f"phases[{index}].start_step = {phase.start_step}: must be more than that before it, {before.start_step}")

    def _check_part(self, index: int, part: DataConfig) -> None:
        if part.source == MIXTURE:
            raise InputError(f"parts[{index}].source = {MIXTURE!r}: a mixture of mixtures is not possible; list the inner parts here")
        for key in not_default(part):
            if key in JOB_KEYS:
                raise InputError(f"parts[{index}].{key} = {getattr(part, key)!r}: holds for the whole job; set it in [data]")

    def _check_weights(self, key: str, weights: list[float]) -> None:
        if len(weights) != len(self.parts):
            raise InputError(f"{key} = {weights}: must be {len(self.parts)}, one for each of parts")
        if min(weights) < 0 or not sum(weights):
            raise InputError(f"{key} = {weights}: none may be below 0, and not all 0")


class MixturePart(NamedTuple):
    """Samples of a mixture.

    Attributes:
        number: of the ``[[data.parts]]`` table.
        characters: what its ``length`` counts, in characters.
    """

    number: int
    source: Source
    characters: int = 1


@dataclass(frozen=True)
class Located:
    """Where a sample of a mixture is.

    Attributes:
        index: of the sample in the source of ``part``.
        offset: number of the first sample of ``part`` in the mixture.
    """

    part: MixturePart
    index: int
    offset: int


@registry.register_source(MIXTURE)
class Mixture(Source):
    """The samples of all parts, numbered one part after the other."""

    cfg: MixtureConfig

    def __init__(self, cfg: MixtureConfig, split: str) -> None:
        super().__init__(cfg, split)
        parts = [replace(part, max_bad_fraction=cfg.max_bad_fraction) for part in cfg.parts]
        self._set([MixturePart(number, source) for number, part in enumerate(parts) if (source := _build(number, part, split)) is not None])

    def _set(self, parts: list[MixturePart]) -> None:
        self._parts = parts
        self.from_files = any(part.source.from_files for part in parts)
        self._offsets = [0, *accumulate(len(part.source) for part in parts)]

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        return any(registry.sources.get(part.source).has(part, split) for part in cfg.sections())

    def tokenised(self, tokenizer: Tokenizer, seq_len: int) -> Mixture:
        parts = []
        for part in self._parts:
            source = part.source.tokenised(tokenizer, seq_len)
            parts.append(part if source is part.source else MixturePart(part.number, source, CHARACTERS_PER_TOKEN))
        mixture = copy.copy(self)
        mixture._set(parts)
        return mixture

    def order(self, seed: int) -> Order:
        """By weight; the parts are shuffled independently of each other."""
        pick = lambda weights: [weights[part.number] for part in self._parts]
        sizes = [len(part.source) for part in self._parts]
        if self.cfg.weights:
            weights = pick(self.cfg.weights)
        elif self.cfg.temperature == 1:
            weights = sizes
        else:
            weights = [(size / max(sizes)) ** (1 / self.cfg.temperature) for size in sizes]
        phases = [(0, weights), *((phase.start_step, pick(phase.weights)) for phase in self.cfg.phases)]
        seeds = (int(np.random.default_rng((seed, 2, part.number)).integers(2**32)) for part in self._parts)  # alike parts: other orders
        return Mixed([part.source.order(part_seed) for part, part_seed in zip(self._parts, seeds, strict=True)], self._offsets[:-1], phases)

    def __len__(self) -> int:
        return self._offsets[-1]

    def __getitem__(self, index: int) -> Sample:
        at = self._find(index)
        try:
            return replace(at.part.source[at.index], part=at.part.number)
        except SampleError as error:
            raise SampleError(f"parts[{at.part.number}]: {error}") from None

    def length(self, index: int) -> int:
        at = self._find(index)
        return at.part.source.length(at.index) * at.part.characters

    def num_images(self, index: int) -> int:
        at = self._find(index)
        return at.part.source.num_images(at.index)

    def part(self, index: int) -> int:
        return self._find(index).part.number

    def asks(self, index: int) -> bool:
        at = self._find(index)
        return at.part.source.asks(at.index)

    def peers(self, index: int) -> range:
        """Of the same part, so that bad samples change no shares."""
        at = self._find(index)
        peers = at.part.source.peers(at.index)
        return range(at.offset + peers.start, at.offset + peers.stop)

    def fingerprint(self) -> str:
        return digest(*(part.source.fingerprint() for part in self._parts))

    def shards(self) -> Sequence[str]:
        return [file for part in self._parts for file in part.source.shards()]

    def ignoring(self) -> Iterator[Ignoring]:
        return chain.from_iterable(part.source.ignoring() for part in self._parts)

    def corpus(self) -> Iterator[str]:
        return chain.from_iterable(part.source.corpus() for part in self._parts)

    def _find(self, index: int) -> Located:
        position = bisect_right(self._offsets, range(len(self))[index]) - 1
        offset = self._offsets[position]
        return Located(self._parts[position], range(len(self))[index] - offset, offset)


def _build(number: int, cfg: DataConfig, split: str) -> Source | None:
    """As ``build_source``; a part must have something to train on."""
    try:
        source = build_source(cfg, split)
    except InputError as error:
        raise InputError(f"data.parts[{number}]: {error}") from None
    if source is None and split == "train":
        raise InputError(f"data.parts[{number}]: source = {cfg.source!r}: has no training samples")
    return source
