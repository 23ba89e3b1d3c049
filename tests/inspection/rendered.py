"""A whole batch as text, for tests of ``render_row`` and of what makes batches."""

from __future__ import annotations

from collections.abc import Mapping

from kempnerforge.data.batching.batch import Batch
from kempnerforge.inspection.audit import render_row
from kempnerforge.inspection.audit_rows import Decoder, rows_of


def render_rows(batch: Batch, tokenizer: Decoder, color: bool, names: Mapping[int, str] | None = None) -> list[str]:
    """``render_row`` of each row; of special tokens BOS and EOS alone are named, unless ``names`` are given."""
    if names is None:
        names = {tokenizer.eos_id: "<eos>"} | ({} if tokenizer.bos_id is None else {tokenizer.bos_id: "<bos>"})
    return [render_row(row, number, tokenizer, color, names) for number, row in enumerate(rows_of(batch))]
