"""What a stage costs: parameters, FLOPs and bytes, counted on the meta device by running the model there, not
by a formula per arch.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from kempnerforge.config import JobConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.eval.generate import generate
from kempnerforge.eval.mode import mode
from kempnerforge.model.transformer import Cache
from kempnerforge.vlm.base import VLM, Output
from kempnerforge.vlm.build import build_model
from kempnerforge.vlm.parts import part_of, parts

REST = ""
"""The part of products outside of all modules: the head, where it is the embedding's own weight."""


@dataclass(frozen=True)
class ModuleCost:
    """One part of the model.

    Attributes:
        parameters, trainable: counts.
        forward_flops, backward_flops: of one sample in training.
    """

    name: str
    parameters: int
    trainable: int
    forward_flops: float
    backward_flops: float

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Cost:
    """What one stage costs, on one process.

    Attributes:
        modules: the parts; they cover the model.
        state_bytes: fp32 weights and gradients, optimizer state, and the weights once more in the compute
            dtype.
        activation_bytes: that the forward pass of one micro-batch holds at most, most of it for the backward
            pass.
        fixed_bytes: of these, what is the same for any number of rows: with ``train.logits_at_once`` the
            logits of a piece, and the gradients of the head.
    """

    modules: list[ModuleCost]
    state_bytes: int
    activation_bytes: int
    fixed_bytes: int = 0

    @property
    def forward_flops(self) -> float:
        return sum(module.forward_flops for module in self.modules)

    @property
    def backward_flops(self) -> float:
        return sum(module.backward_flops for module in self.modules)

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class GenerationCost:
    """What an answer costs.

    Attributes:
        prompt_length: positions of the prompt, images included where they are in the stream.
        prefill_flops: to read the prompt, images included.
        decode_flops: of the first token that is made from the cache.
    """

    prompt_length: int
    prefill_flops: int
    decode_flops: int


def _counter() -> FlopCounterMode:
    """NOTE: torch counts the gradient of the weights of a grouped convolution as if there were no groups, a
    depthwise one as C times what it is.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: object) -> int:
    """Gradients of the input and of the weights cost as much as the forward pass each."""
    transposed, _, _, wanted = rest[-4:]  # after bias, stride, padding, dilation; between them output padding and groups
    return conv_flop_count(list(x), list(weight), list(gradient), transposed) * sum(wanted[:2])


class Meter:
    """Counts the FLOPs of passes through ``model`` by part. Every product is counted in exactly one part.

    A product belongs to the innermost module that is running. In the backward pass that is the one that was
    running when its autograd node was made, which the node's sequence number tells.

    NOTE: ``FlopCounterMode`` counts by module as well, but in a backward pass it leaves a module when the
    gradient of its input is computed: a module whose input needs no gradient gets the FLOPs of all modules
    that follow.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = {module: part_of(f"{name}.weight") for name, module in model.named_modules() if name}
        self._counter = _counter()
        self._flops: defaultdict[str, int] = defaultdict(int)
        self._running = [REST]
        self._booked = 0
        self._marks: list[tuple[int, str]] = [(0, REST)]  # from this node on, the part

    def forward(self, batch: Batch, cache: Cache | None = None) -> tuple[Tensor, dict[str, int]]:
        """One pass: what it would send backward, and FLOPs by part."""
        handles = []
        for module, part in self._parts.items():
            handles.append(module.register_forward_pre_hook(partial(self._enter, part)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with self._counter:
                total = self.model(batch, cache).mean(1, 1)
        finally:
            for handle in handles:
                handle.remove()
        return total, self._taken()

    def backward(self, total: Tensor) -> dict[str, int]:
        """FLOPs by part of the backward pass of the ``forward`` that gave ``total``."""
        begins = [number for number, _ in self._marks]
        for node in _nodes(total):
            _, part = self._marks[bisect_right(begins, node._sequence_nr()) - 1]
            node.register_prehook(partial(self._at, part))
        with self._counter:
            total.backward()
        return self._taken()

    def _enter(self, part: str, *_: object) -> None:
        self._book()
        self._running.append(part)
        self._mark()

    def _leave(self, *_: object) -> None:
        self._book()
        self._running.pop()
        self._mark()

    def _at(self, part: str, *_: object) -> None:
        self._book()
        self._running[-1] = part

    def _mark(self) -> None:
        self._marks.append((torch.autograd._get_sequence_nr(), self._running[-1]))  # pyright: ignore[reportPrivateImportUsage]

    def _book(self) -> None:
        """What was counted since the last call belongs to the part that is running."""
        now = self._counter.get_total_flops()
        self._flops[self._running[-1]] += now - self._booked
        self._booked = now

    def _taken(self) -> dict[str, int]:
        self._book()
        found = {part: flops for part, flops in self._flops.items() if flops}
        assert sum(found.values()) == self._counter.get_total_flops(), "every product belongs to one part"
        self._flops.clear()
        self._running, self._booked = [REST], 0
        self._counter = _counter()
        return found


def _nodes(total: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """The nodes of the autograd graph of ``total``, without the leaves."""
    waiting = [total.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or not node.next_functions:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, as long as they are there.

    Attributes:
        now: that are there.
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: MutableMapping[torch.UntypedStorage, int] = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in given and storage not in self._known:
                self._known[storage] = storage.nbytes()
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def cost(model: VLM, batch: Batch, trainable: frozenset[str], optimizer_slots: Mapping[str, int], compute: torch.dtype) -> Cost:
    """Counts one micro-batch of a stage.

    Args:
        model: on the meta device; only shapes are computed.
        batch: a real one, for its shapes.
        trainable: names of the parameters that train.
        optimizer_slots: name -> fp32 numbers that the optimizer keeps per number of the parameter.
        compute: the compute dtype.

    NOTE: products are counted with all logits at once: they are the same ones, and those of the backward pass
    are found by their nodes.
    """
    parameters, at_once = dict(model.named_parameters()), model.logits_at_once
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    meter, held, fixed = Meter(model), Held(), 0
    moved = batch.to("meta")
    model.to(compute)
    try:
        with mode(model, training=True):
            if at_once:
                fixed = _hold_in_pieces(model, moved, held)
                model.logits_at_once = 0
            with nullcontext() if at_once else held:
                total, forward = meter.forward(moved)
            backward = meter.backward(total)
    finally:
        model.logits_at_once = at_once
        model.to(torch.float32)
    model.zero_grad(set_to_none=True)
    rows = max(1, len(batch.sample_names))
    modules, by_part = [], parts(list(parameters))
    for part in [*by_part, *(p for p in forward | backward if p not in by_part)]:
        names = by_part.get(part, [])
        sizes = [parameters[name].numel() for name in names]
        train = [parameters[name].numel() for name in names if name in trainable]
        shown = part or ("output head (tied)" if model.transformer.output_head is None else "outside of modules")
        modules.append(ModuleCost(shown, sum(sizes), sum(train), forward.get(part, 0) / rows, backward.get(part, 0) / rows))
    state = sum(
        p.numel() * (4 + compute.itemsize % 4 + (4 + 4 * optimizer_slots[n] if n in trainable else 0)) for n, p in parameters.items()
    )
    return Cost(modules, state, held.peak, fixed)


def _hold_in_pieces(model: VLM, batch: Batch, held: Held) -> int:
    """A forward pass within ``held``. Returns ``Cost.fixed_bytes`` of it."""
    score, before = model.score_stream, list[int]()

    def score_stream(x: Tensor, batch: Batch, head: Callable[[Tensor], Tensor] | None = None) -> Output:
        before.append(held.now)
        return score(x, batch, head)

    model.score_stream = score_stream  # on the instance
    try:
        with held:
            model(batch)
    finally:
        del model.score_stream
    return held.peak - before[0] if before and model.in_pieces(batch) else 0


class TrainingFlops:
    """FLOPs of training on a micro-batch, forward and backward, the vision tower included. A batch whose
    shapes were met before is not counted
    again: of batches that differ in the number of their targets alone, the head's FLOPs are the only
        difference, and they are linear in it.

    NOTE: features that ``train.feature_cache`` has are counted as if they were computed.

    Args:
        job: ``model.vocab_size`` is set.
    """

    def __init__(self, job: JobConfig) -> None:
        self.model = build_model(job, "meta")
        self._slopes: dict[frozenset[str], int] = {}
        self._known: dict[tuple[object, ...], tuple[int, int]] = {}  # shapes -> (targets, FLOPs)

    def count(self, batch: Batch, trainable: frozenset[str]) -> int:
        """FLOPs of ``batch`` where the parameters named ``trainable`` train."""
        images = None if batch.images is None else batch.images.shape
        layout = (
            batch.row_images,
            batch.image_parts and (batch.row_image_tokens, sum(not part.view for part in batch.image_parts)),
            batch.row_words,
            batch.row_codes,
            batch.leading_images,
            batch.has_documents,
            batch.documents,
        )
        shapes = (trainable, batch.input_ids.shape, images, batch.image_index.shape, batch.num_pairs, *layout)
        if shapes not in self._known:
            self._known[shapes] = batch.num_targets, self._run(batch, trainable)
        targets, flops = self._known[shapes]
        if trainable not in self._slopes:
            more = replace(batch, targets=torch.cat([batch.targets, batch.targets[:1]]))
            self._slopes[trainable] = self._run(more, trainable) - self._run(batch, trainable)
        return flops + self._slopes[trainable] * (batch.num_targets - targets)

    def _run(self, batch: Batch, trainable: frozenset[str]) -> int:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        with torch.random.fork_rng(devices=[]), mode(self.model, training=True), _counter() as counter:
            self.model(batch.to("meta")).mean(1, 1).backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()


class _Metered(nn.Module):
    """Replaces a model in ``generate`` on the meta device, and keeps the FLOPs of each call."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.flops: list[int] = []

    def forward(self, batch: Batch, cache: Cache) -> Output:
        _, flops = self.meter.forward(batch.to("meta"), cache)
        self.flops.append(sum(flops.values()))
        return Output(torch.zeros(()), torch.zeros(len(batch.input_ids), 1))


def generation_cost(model: VLM, prompt: Batch) -> GenerationCost:
    """Counts reading ``prompt``, one row, and one token after it, with a cache.

    Args:
        model: on the meta device.
        prompt: as generation gets it.

    Raises:
        NotImplementedError: the arch does not generate.
    """
    metered = _Metered(Meter(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # NOTE: without a graph a view of a parameter that trains has no gradient function, which the counter asks for.
    nn.ParameterList(trained).requires_grad_(False)
    try:
        with mode(model, training=False):
            generate(metered, prompt, max_new_tokens=2, eos_id=-1)
    finally:
        nn.ParameterList(trained).requires_grad_(True)
    return GenerationCost(prompt.input_ids.shape[1], *metered.flops)
