"""The tokenizer of a model from elsewhere."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.external import ExternalModel
from kempnerforge.interop.gguf_file import read_gguf_tokenizer
from kempnerforge.model.hf_files import CONFIG, stop_ids
from kempnerforge.util.errors import InputError


def read_tokenizer(source: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of a directory, or of another one that is ``given``.

    Raises:
        ValueError: there is none.
    """
    path = given or source
    if path.suffix == ".gguf":
        return read_gguf_tokenizer(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{path}: has no tokenizer (tokenizer.json); name a directory that has one with --tokenizer")
    return Tokenizer.from_pretrained(path if path.is_absolute() else Path.cwd() / path)


def tokenizer_of(external: ExternalModel, given: Path | None = None) -> Tokenizer:
    """As ``read_tokenizer``. The token of an image that is a word of the stream is marked as one that is at
    every placeholder.

    Raises:
        ValueError: there is no tokenizer, or that token is another one.
    """
    words = read_tokenizer(external.path, given)
    if given is not None and external.path.is_dir():
        words = words.changed(stops={*words.stop_ids, *stop_ids(external.path)})
    if external.added_tokens:
        words = _with_tokens(words, external)
    if external.end_id not in (None, words.eos_id):
        raise InputError(
            f"{external.path / CONFIG}: eos_token_id = {external.end_id}, at which the class pools a text, and the tokenizer's EOS is {words.eos_id}"
        )
    if external.job.model.new_tokens:
        words = _up_to(words, external.job.model.vocab_size)
    if not external.image_is_word:
        return words
    name = external.job.data.image_placeholder
    if words.token_id(name) != external.image_id:
        raise InputError(
            f"{external.path / CONFIG}: the token of an image is {external.image_id}, and the tokenizer's {name!r} is {words.token_id(name)}"
        )
    marks = dict.fromkeys([*words.appended, name])
    return words.changed(appended=[*marks])


def _up_to(words: Tokenizer, rows: int) -> Tokenizer:
    """``words`` with a token for each of ``rows`` of the embedding, as new ones follow them."""
    spare = [AddedToken(f"<unused_{number}>", special=True, normalized=False) for number in range(words.vocab_size, rows)]
    words.backend.add_tokens(spare)
    return words.changed()


def _with_tokens(words: Tokenizer, external: ExternalModel) -> Tokenizer:
    """Adds the tokens of ``external`` to the tokenizer.

    NOTE: not as ``new_tokens``, whose rows are in a separate embedding: the checkpoint has these rows in its
    main embedding.
    """
    names, rows = external.added_tokens, external.job.model.vocab_size
    words.backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in names if words.token_id(name) is None])
    if beyond := [name for name in names if not 0 <= (words.backend.token_to_id(name) or 0) < rows]:
        raise InputError(
            f"{external.path / CONFIG}: lm_vocab_size = {rows}: the tokenizer with vlm_extra_tokens has more, {beyond[0]!r} among them"
        )
    return words.changed()
