"""Where samples come from: one file per source, each registered under the name of its config."""

from kempnerforge.data.collections import easy_vqa
from kempnerforge.data.sources import hf_dataset, jsonl, text
from kempnerforge.data.sources.build import build_source, text_corpus

__all__ = ["build_source", "easy_vqa", "hf_dataset", "jsonl", "text", "text_corpus"]
