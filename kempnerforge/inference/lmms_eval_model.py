"""A checkpoint of any arch as a model of lmms-eval; needs the extra ``lmms-eval``.

::

    lmms-eval --model kempnerforge --model_args path=runs/quickstart --tasks mme --batch_size 16

lmms-eval finds it by its entry point. From Python:
``lmms_eval.evaluator.simple_evaluate("kempnerforge", "path=runs/quickstart", tasks=["mme"])``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from kempnerforge.data.text.encode import Encoded
from kempnerforge.inference.harness import Ask, answers, marked, rows_at_once, scored, stops
from kempnerforge.inference.model import TrainedModel
from kempnerforge.inference.processor import Picture, Processor
from kempnerforge.util.errors import InputError

harness: Any = importlib.import_module("lmms_eval.api.model")
instance: Any = importlib.import_module("lmms_eval.api.instance")
MAX_NEW_TOKENS = 1024
"""Of lmms-eval's own models, where a task does not say."""


class LMMSEvalModel(harness.lmms):
    """Prompts and answers are written by the template of the model's training, with images at each "<image>"
    of a prompt; without one, where they were in training.

    Args:
        path: as ``kempnerforge.load_pretrained``.
        batch_size: prompts that are read together.
        device: as torch names it; None: the GPU of this process, or the CPU if there is none.
    """

    def __init__(self, path: str, batch_size: int | str = 1, device: str | None = None, **more: Any) -> None:
        super().__init__()
        if unknown := more.keys() - {"max_batch_size"}:  # lmms-eval gives that to every model
            raise InputError(f"--model_args {', '.join(sorted(unknown))}: unknown; allowed are path, batch_size, device")
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        found = TrainedModel.load(path, device=device or gpu)
        self.device, self.batch_size, self._found = found.device, rows_at_once(batch_size), found
        self.processor = Processor(found.assembly)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, up to the first of its stops."""
        return answers(self._found.model, self.processor, self._asks(requests), self.batch_size)

    def _asks(self, requests: Sequence[Any]) -> Iterator[Ask]:
        for context, options, visual, *place in self._arguments(requests):
            yield _ask(context, visual(self._doc(*place)), options)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """The answers of all rounds of each request, as ``_kept``; its task writes each question from the
        answers before.
        """
        found = []
        for context, options, visual, next_round, *place in self._arguments(requests):
            doc, said, facts, ended, number = self._doc(*place), list[str](), None, False, 0
            images = visual(doc)
            while not ended:
                said += answers(self._found.model, self.processor, [_ask(context, images, options)], 1)
                number += 1
                images, context, ended, said, facts = next_round(doc, previous_output=said, round_idx=number, previous_round_info=facts)
                said = list(said)
            found.append(_kept(said))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each answer the mean loss of its tokens, in nats, and whether greedy generation writes it, as
        ``_kept``. The token that ends an answer is one of them.

        NOTE: not a log-likelihood: lmms-eval's own models return the loss, and its tasks take the smallest.
        """
        rows = scored(self._found.model, self._rows(requests), self.processor.tokenizer.pad_id, self.batch_size)
        return [_kept((-one.nats / one.tokens, one.greedy)) for one in rows]

    def _rows(self, requests: Sequence[Any]) -> Iterator[Encoded]:
        for context, target, visual, *place in self._arguments(requests):
            doc = self._doc(*place)
            answer = target if isinstance(target, str) else target(doc)
            yield self.processor.answered(visual(doc) or (), marked(context, self.processor), answer.strip())

    def _arguments(self, requests: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        for request in tqdm(requests, desc="kempnerforge", disable=self.rank != 0):
            yield request.args

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def _ask(context: str, images: Sequence[Picture] | None, options: Mapping[str, Any]) -> Ask:
    temperature = options.get("temperature") or 0.0
    sampled = options.get("do_sample", True) and temperature > 0
    return Ask(
        context,
        images or (),
        int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature if sampled else 0.0,
        (options.get("top_p") or 1.0) if sampled else 1.0,
        stops(options.get("until")),
        int(options.get("num_beams") or 1),
    )


def _kept(result: Any) -> Any:
    """``result`` as the evaluators of 0.7.0 to 0.7.3 leave it: of a bare pair they make a string, in which
    multiple choice finds no loss.
    """
    return instance.GenerationResult(result)


def manifest() -> Any:
    """What the entry point gives to lmms-eval: the model's name and class."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest("kempnerforge", simple_class_path=f"{__name__}.{LMMSEvalModel.__name__}")
