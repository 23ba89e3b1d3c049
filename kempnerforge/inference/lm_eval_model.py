"""A checkpoint of any arch as a model of lm-eval (EleutherAI's lm-evaluation-harness); needs the extra
``lm-eval``.

::

    python -m kempnerforge.inference.lm_eval_model run --model kempnerforge --model_args path=runs/quickstart
    --tasks lambada_openai

It takes the arguments of ``lm-eval``. From Python:
``lm_eval.simple_evaluate(model=LMEvalModel("runs/quickstart"), tasks=[...])``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import kempnerforge
from kempnerforge.config.data import TextConfig
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.inference.harness import Ask, answers, rows_at_once, scored, stops

harness: Any = importlib.import_module("lm_eval.api.model")
registry: Any = importlib.import_module("lm_eval.api.registry")
utils: Any = importlib.import_module("lm_eval.utils")
MAX_NEW_TOKENS = 256
"""Of lm-eval, where a task does not say."""


@registry.register_model("kempnerforge")
class LMEvalModel(harness.TemplateLM):
    """Likelihoods are of plain text as it is, without images. Prompts that are answered are written by the
    template of the model's training, with images at each "<image>" or in front.

    Args:
        path: as ``kempnerforge.load_pretrained``.
        batch_size: texts that are read together.
        device: "cpu" or "cuda"; None: what there is.
    """

    MULTIMODAL = True

    def __init__(self, path: str, batch_size: int | str = 16, device: str | None = None, **_: Any) -> None:
        super().__init__()
        self.model, self.processor = kempnerforge.load_pretrained(path, device=device)
        self.tokenizer, self.window = self.processor.tokenizer, self.processor.assembly.job.model.max_seq_len
        self.batch_size = rows_at_once(batch_size)
        self.encoder = Encoder(self.tokenizer, TextConfig(path="-"), Layout(0, 0, self.window, self.window, self.window), seed=0)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, in nats, and whether greedy generation writes it. Of a
        context that is too long the beginning is left out.
        """
        rows = (self._row((context + continuation)[-self.window - 1 :], len(continuation)) for _, context, continuation in requests)
        return [(one.nats, one.greedy) for one in scored(self.model, rows, self.tokenizer.pad_id, self.batch_size)]

    def _row(self, ids: list[int], tail: int) -> Encoded:
        """A row whose labels are the last ``tail`` tokens."""
        row = self.encoder.encode(Sample("", (), (Text("", tuple(ids)),)), seed=0)
        row.table[1, : len(ids) - 1 - tail] = IGNORE  # labels of the context
        return row

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token is predicted once, in windows of the model's length."""
        found = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.window, 1)
            windows = [((), *utils.make_disjoint_window(window)) for window in rolling]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(windows)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, up to the first of its stops."""
        return answers(self.model, self.processor, (_ask(*request.args) for request in requests), self.batch_size)


def _ask(prompt: str, options: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Ask:
    temperature = float(options.get("temperature", 0)) if options.get("do_sample") else 0.0
    most = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
    return Ask(prompt, (more or {}).get("visual", ()), most, temperature, until=stops(options.get("until")))


if __name__ == "__main__":
    importlib.import_module("lm_eval.__main__").cli_evaluate()
