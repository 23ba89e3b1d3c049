"""Functions of the task beside this file. It needs ``datasets`` and nothing of ``kempnerforge``, so the
directory works wherever it is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(**_: Any) -> Any:
    """The questions: ``id``, ``images`` (opened by Pillow), ``question``, ``answer``, and ``right``: all
    right answers, also as the tokenizer of the job writes them.
    """
    from datasets import load_dataset

    return load_dataset("parquet", data_files={"test": str(Path(__file__).with_name("questions.parquet"))})


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer to the letter, white space aside."""
    right = {" ".join(answer.split()) for answer in doc["right"]}
    return {"exact_match": float(" ".join(results[0].split()) in right)}
