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
from itertools import groupby
from typing import Any

import torch

import kempnerforge
from kempnerforge.config.data import TextConfig
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Layout
from kempnerforge.eval.generate import Sampling

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
        self.batch_size = int(batch_size)
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
        rows = [((context + continuation)[-self.window - 1 :], len(continuation)) for _, context, continuation in requests]
        chunks = (rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size))
        return [found for chunk in chunks for found in self._scored(chunk)]

    @torch.inference_mode()
    def _scored(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        encoded = [self.encoder.encode(Sample("", (), (Text("", tuple(ids)),)), seed=0) for ids, _ in rows]
        for row, (ids, scored) in zip(encoded, rows, strict=True):
            row.table[1, : len(ids) - 1 - scored] = IGNORE  # labels of the context
        batch = collate(encoded, self.tokenizer.pad_id, None).to(next(self.model.parameters()).device)
        logs = self.model(batch).logits.float().log_softmax(-1)  # (T, V)
        labels, of_row = batch.labels.flatten()[batch.targets], batch.targets // batch.labels.shape[1]  # (T,)
        nats, greedy = logs.gather(-1, labels[:, None])[:, 0].double(), logs.argmax(-1) == labels  # (T,)
        return [(float(nats[of_row == k].sum()), bool(greedy[of_row == k].all())) for k in range(len(rows))]

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
        asked = [(prompt, options, more[0] if more else {}) for prompt, options, *more in (request.args for request in requests)]
        found = []
        for _, group in groupby(asked, key=lambda one: repr(sorted(one[1].items()))):
            same = list(group)
            for at in range(0, len(same), self.batch_size):
                found += self._answers(same[at : at + self.batch_size])
        return found

    def _answers(self, asked: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """Of requests with the same options."""
        prompts, options = [prompt for prompt, _, _ in asked], asked[0][1]
        inputs = self.processor(images=[list(more.get("visual", ())) for _, _, more in asked], text=prompts)
        room = self.window - inputs.batch.input_ids.shape[1]
        temperature = float(options.get("temperature", 0)) if options.get("do_sample") else 0.0
        most = max(0, min(int(options.get("max_gen_toks", MAX_NEW_TOKENS)), room))
        made = self.model.generate(inputs, max_new_tokens=most, sampling=Sampling(temperature))
        until = options.get("until") or []
        return [_up_to(self.processor.decode(ids), [until] if isinstance(until, str) else until) for ids in made]


def _up_to(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


if __name__ == "__main__":
    importlib.import_module("lm_eval.__main__").cli_evaluate()
