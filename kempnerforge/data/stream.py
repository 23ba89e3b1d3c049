"""Rows by number of tables that can only be read forwards, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from kempnerforge.data.sample import SampleError

BLOCK = 64
"""Rows that are kept and dropped together."""

Opener = Callable[[int], tuple[int, Iterator[Any]]]
"""Row -> a row at or before it where reading may begin, and the Arrow tables from there on."""


class RowStream:
    """Rows of a stream by number. What lies ahead is read on to, what was read lately is still there, and for anything else the stream is
    opened anew. Every process reads for itself.

    Args:
        keep: rows that stay in memory, those that were read last; the table that the stream handed out last comes on top.
    """

    def __init__(self, open_at: Opener, keep: int) -> None:
        self._open_at, self._keep, self._limit = open_at, keep, -(-keep // BLOCK) + 2
        self._forget()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return RowStream, (self._open_at, self._keep)

    def row(self, index: int) -> dict[str, Any]:
        """The values of row ``index`` by column. Raises SampleError: the stream ends before it, or cannot be read so far."""
        number, offset = divmod(index, BLOCK)
        block = self._block(number)
        if offset >= block.num_rows:
            raise SampleError(f"the stream ends after {number * BLOCK + block.num_rows} rows")
        return block.slice(offset, 1).to_pylist()[0]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._kept: dict[int, Any] = {}
        self._blocks: Iterator[Any] | None = None
        self._next = 0  # the number of the block that self._blocks gives next
        self._end: tuple[int, str] | None = None  # a block that cannot be had, and why

    def _block(self, number: int) -> Any:
        if self._process != os.getpid():
            self._forget()  # files that were open before a fork share their positions with the parent's
        if number in self._kept:
            return self._kept[number]
        if self._end is not None and number >= self._end[0]:
            raise SampleError(self._end[1])
        if self._blocks is None or number < self._next:
            self._blocks, self._next, self._end = self._read(number), number, None
        while self._next <= number:
            self._kept[self._next] = self._advance(self._blocks)
            self._next += 1
            if len(self._kept) > self._limit:
                del self._kept[next(iter(self._kept))]  # that was read first
        return self._kept[number]

    def _advance(self, blocks: Iterator[Any]) -> Any:
        try:
            block = next(blocks, None)
            reason = f"the stream ends after {self._next * BLOCK} rows"
        except Exception as error:  # whatever files, decompression, Arrow or a network raise
            block, reason = None, f"the stream cannot be read beyond row {self._next * BLOCK}: {first_line(error)}"
        if block is None:
            self._blocks, self._end = None, (self._next, reason)
            raise SampleError(reason)
        return block

    def _read(self, number: int) -> Iterator[Any]:
        """Blocks from ``number`` on; the last one may be shorter."""
        import pyarrow as pa

        row, tables = self._open_at(number * BLOCK)
        skip, held, rows = number * BLOCK - row, [], 0
        for table in tables:
            if skip >= table.num_rows:
                skip -= table.num_rows
                continue
            held.append(table.slice(skip))
            rows += held[-1].num_rows
            skip = 0
            if rows < BLOCK:
                continue
            table = pa.concat_tables(held, promote_options="default")
            whole = rows - rows % BLOCK
            for begin in range(0, whole, BLOCK):
                yield table.slice(begin, BLOCK)
            rows -= whole
            held = [table.slice(whole)] if rows else []
        if rows:
            yield pa.concat_tables(held, promote_options="default")


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, or its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
