"""Streaming generation: tokens a second of ours against ``model.generate`` of transformers, same weights, prompt, precision and device.

A Llama of about 30 M random parameters is written by transformers and read by ours. Both write greedily, without an end token, a token at a
time to a streamer that does nothing; the tokens must agree. They run in turns in one process; the figures are medians over the rounds. On a
machine that others use, too, CPU time on one thread says more than the clock.

Usage: python benchmarks/generate.py [--prompt 64] [--tokens 128] [--rounds 5] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kempnerforge.util.process import tune_memory

tune_memory()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from kempnerforge.config import DataConfig, JobConfig  # noqa: E402
from kempnerforge.data.batching.collate import prompt_batch  # noqa: E402
from kempnerforge.data.text.encode import Layout, Prompt  # noqa: E402
from kempnerforge.eval.generate import tokens_of  # noqa: E402
from kempnerforge.interop import read_text_weights, take_weights  # noqa: E402
from kempnerforge.interop.settings import complete, model_config  # noqa: E402
from kempnerforge.vlm.build import build_model  # noqa: E402

LAYOUT = Layout(image_tokens=0, image_size=0, max_text_len=2048, seq_len=2048, pad_to=2048)
VOCAB = 16_384


class Nothing(BaseStreamer):
    """transformers calls it with each step's ids."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def both(dtype: torch.dtype) -> tuple[transformers.LlamaForCausalLM, torch.nn.Module]:
    """Their model and ours, with the same weights."""
    cfg = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=448, intermediate_size=1216, num_hidden_layers=10, num_attention_heads=7, num_key_value_heads=7,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(cfg).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours_cfg = model_config(complete(json.loads((Path(folder) / "config.json").read_text())), VOCAB)
        ours = build_model(JobConfig(model=ours_cfg, data=DataConfig(source="text")))
        take_weights(ours, read_text_weights(folder, ours_cfg), folder)
    return theirs.to(dtype), ours.to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    theirs, ours = both(getattr(torch, args.dtype))
    ids = torch.randint(3, VOCAB, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    batch = prompt_batch([Prompt(ids[0].tolist())], None, None, LAYOUT, 0)
    written: dict[str, list[int]] = {}

    def run_theirs() -> None:
        mask = torch.ones_like(ids)
        made = theirs.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False, streamer=Nothing())
        written["transformers"] = made[0, args.prompt :].tolist()

    def run_ours() -> None:
        written["ours"] = list(tokens_of(ours, batch, max_new_tokens=args.tokens, eos_id=-1))

    runs: dict[str, Callable[[], None]] = {"transformers": run_theirs, "ours": run_ours}
    clocks: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "CPU": time.process_time}
    times = {(name, clock): [] for name in runs for clock in clocks}
    for round_ in range(args.rounds + 1):  # the first round warms up
        for name, run in runs.items():
            begin = {clock: read() for clock, read in clocks.items()}
            run()
            for clock, read in clocks.items():
                times[name, clock] += [read() - begin[clock]] * bool(round_)
    median = {key: 1e3 * statistics.median(values) / args.tokens for key, values in times.items()}  # ms a token
    alike = next((k for k, (a, b) in enumerate(zip(*written.values(), strict=True)) if a != b), args.tokens)
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{count / 1e6:.1f} M parameters, {args.dtype}, {torch.get_num_threads()} threads, prompt {args.prompt}, {args.tokens} tokens")
    for name in runs:
        wall, cpu = median[name, "wall"], median[name, "CPU"]
        print(f"{name:14s} {1e3 / wall:8.1f} tokens/s   {wall:6.2f} ms a token, {cpu:6.2f} ms of CPU time")
    wall, cpu = (median["transformers", clock] / median["ours", clock] for clock in clocks)
    print(f"ours / transformers = {wall:.2f}, by CPU time {cpu:.2f}; first {alike} of {args.tokens} tokens agree")


if __name__ == "__main__":
    main()
