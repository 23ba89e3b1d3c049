"""An answer of a trained model, which is written while one reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from kempnerforge.eval.generate import TextStream


class Answer:
    """An answer that is written while one iterates over it: a piece of text for each token, some of them
    empty. The model works only when the next piece is asked for.

    Args:
        tokens: ids, as the model makes them.
        ends: those that end the answer.
        decode: ids -> text.
        byte_ids: see ``TextStream``.

    Attributes:
        num_tokens: made so far, the one that ended it among them.
    """

    def __init__(
        self, tokens: Iterable[int], ends: Collection[int], decode: Callable[[Sequence[int]], str], byte_ids: Collection[int] = ()
    ) -> None:
        self.num_tokens = 0
        self._tokens, self._ends, self._decode = iter(tokens), ends, decode
        self._stream = TextStream(decode, byte_ids)

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.num_tokens += 1
            if token in self._ends:
                break
            yield self._stream.push(token)
        yield self._stream.finish()

    @property
    def text(self) -> str:
        """What has been written so far."""
        return self._decode(self._stream.ids)

    def finish(self) -> str:
        """All of it."""
        for _ in self:
            pass
        return self.text
