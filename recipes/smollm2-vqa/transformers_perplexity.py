"""Perplexity of data/plain-text.txt as transformers computes it, in the windows of `[eval] text_window`: what ours is compared with.

python recipes/smollm2-vqa/transformers_perplexity.py data/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf   # needs: pip install accelerate
python recipes/smollm2-vqa/transformers_perplexity.py runs/smollm2-hf                                     # a directory: an export of ours
"""

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 256


def main() -> None:
    path = Path(sys.argv[1])
    place, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    tokenizer = AutoTokenizer.from_pretrained("runs/smollm2-135m/tokenizer")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more).eval()
    text = Path("data/plain-text.txt").read_text(encoding="utf-8")
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, WINDOW):
            window = torch.tensor(ids[begin : begin + WINDOW + 1])
            logits = model(window[None, :-1]).logits[0].log_softmax(-1)  # (S, V)
            total -= logits.gather(-1, window[1:, None]).sum().item()
    print(f"perplexity {math.exp(total / (len(ids) - 1)):.4f} of {len(ids) - 1} tokens")


if __name__ == "__main__":
    main()
