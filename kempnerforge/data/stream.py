"""Rows by number from tables that can only be read forwards, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from kempnerforge.data.sample import SampleError

BLOCK = 64
"""Rows that are kept and dropped together."""

Block = list[Any]
"""Arrow tables of ``BLOCK`` rows together, fewer at the end. They are not joined: shards may store the same
values in other types.
"""
Opener = Callable[[int], tuple[int, Iterator[Any]]]
"""Row -> a row at or before it where reading may begin, and the Arrow tables from there on."""


class RowStream:
    """Rows of a stream by number. Later rows are read up to, the last rows read are kept in memory, and for
    all others the stream is opened again. Every process reads by itself.

    Args:
        keep: rows that stay in memory, those that were read last; the table that the stream handed out last
            comes on top.
    """

    def __init__(self, open_at: Opener, keep: int) -> None:
        self._open_at, self._keep, self._limit = open_at, keep, -(-keep // BLOCK) + 2
        self._forget()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return RowStream, (self._open_at, self._keep)

    def row(self, index: int) -> dict[str, Any]:
        """The values of row ``index`` by column. Raises SampleError: the stream ends before it, or cannot be
        read so far.
        """
        number, offset = divmod(index, BLOCK)
        rows = 0
        for table in self._block(number):
            if offset < rows + table.num_rows:
                return table.slice(offset - rows, 1).to_pylist()[0]
            rows += table.num_rows
        raise SampleError(f"the stream ends after {number * BLOCK + rows} rows")

    def _forget(self) -> None:
        self._process = os.getpid()
        self._kept: dict[int, Block] = {}
        self._blocks: Iterator[Block] | None = None
        self._next = 0  # the number of the block that self._blocks gives next
        self._end: tuple[int, str] | None = None  # a block that cannot be had, and why

    def _block(self, number: int) -> Block:
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

    def _advance(self, blocks: Iterator[Block]) -> Block:
        try:
            block = next(blocks, None)
            reason = f"the stream ends after {self._next * BLOCK} rows"
        except Exception as error:  # whatever files, decompression, Arrow or a network raise
            block, reason = None, f"the stream cannot be read beyond row {self._next * BLOCK}: {first_line(error)}"
        if block is None:
            self._blocks, self._end = None, (self._next, reason)
            raise SampleError(reason)
        return block

    def _read(self, number: int) -> Iterator[Block]:
        """Blocks from ``number`` on; the last one may be shorter."""
        row, tables = self._open_at(number * BLOCK)
        skip, held, rows = number * BLOCK - row, [], 0
        for table in tables:
            rest = table.slice(skip)
            skip -= table.num_rows - rest.num_rows
            while rest.num_rows:
                held.append(rest.slice(0, BLOCK - rows))
                rows += held[-1].num_rows
                rest = rest.slice(held[-1].num_rows)
                if rows == BLOCK:
                    yield held
                    held, rows = [], 0
        if rows:
            yield held


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, or its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
