"""Where samples come from: one file per source, each registered under the name of its config."""

from kempnerforge.data.sources import easy_vqa, hf_dataset, jsonl, text
from kempnerforge.data.sources.build import build_source, text_corpus

__all__ = ["build_source", "easy_vqa", "hf_dataset", "jsonl", "text", "text_corpus"]
