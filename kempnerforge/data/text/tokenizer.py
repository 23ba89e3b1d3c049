"""Text <-> token ids, on top of ``tokenizers``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kempnerforge.model.hf_checks import check_config, class_call
from kempnerforge.model.hf_files import CONFIG, stop_ids
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import expand, is_no_hub_id, start_of
from kempnerforge.util.reading import check_files, read_object, read_text

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CACHED, CACHED_CHARACTERS = 8192, 256  # strings that are kept, in each process; longer ones are rarely seen twice
LONGEST_WORD = 4096
CHAT_TEMPLATE = "chat_template.jinja"
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
PLAIN_CLASS = "PreTrainedTokenizerFast"  # of transformers: adds nothing to tokenizer.json
OWN_KEYS = {"tokenizer_class", "clean_up_tokenization_spaces", "bos_token", "eos_token", "pad_token", "new_tokens", "adds_bos", "stop_ids"}
"""Of ``tokenizer_config.json`` as ``Tokenizer.save`` writes it."""


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with the ids that training needs.

    Args:
        backend: the tokenizer. Its truncation and padding are switched off, and names of special tokens
            inside a text are encoded as text.
        eos: the token that ends an answer.
        bos: the token that is called so, if there is one.
        adds_bos: whether a text starts with it; None: as the backend's post-processor has it.
        pad: the token on padding; None takes ``eos``.
        appended: tokens of ``backend`` that an earlier ``add_tokens`` has put after the others; it may be
            asked for them again.
        chat_template: how conversations are written, in Jinja, if the tokenizer says.
        stops: ids of further tokens that end an answer.

    Attributes:
        vocab_size: one more than the largest id.
        new_tokens: names that ``add_tokens`` was asked for, in the order of their ids. They are recognised
            wherever they are in a text.
        appended: names that ``add_tokens`` has put after the vocabulary, here or before the tokenizer was
            saved.
        base_vocab_size: ``vocab_size`` without the new tokens; their ids follow it without a gap.
        bos_id, eos_id, pad_id, unknown_id: ids of these tokens.
        start_id: id of the token that every text starts with, if there is one.
        stop_ids: at these generation ends, EOS among them.
        special_names: names of added and special tokens by id.
        fingerprint: hex digest of everything that decides which ids a text gets. The chat template is not
            part of it: it decides what the text is.

    Raises:
        ValueError: a named token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos: str,
        bos: str | None = None,
        pad: str | None = None,
        appended: Sequence[str] = (),
        chat_template: str | None = None,
        adds_bos: bool | None = None,
        stops: Iterable[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos, self.bos, self.pad = eos, bos, pad or eos
        self.chat_template = chat_template
        vocab = backend.get_vocab(with_added_tokens=True)
        missing = [token for token in (self.eos, self.bos, self.pad) if token is not None and token not in vocab]
        if missing:
            raise InputError(f"data.tokenizer: special token {missing[0]!r} is not in the vocabulary")
        self.eos_id: int = vocab[self.eos]
        self.pad_id: int = vocab[self.pad]
        self.bos_id: int | None = None if self.bos is None else vocab[self.bos]
        added = backend.encode("").ids[:1]
        starts = self.bos_id is not None and (added == [self.bos_id] if adds_bos is None else adds_bos)
        if adds_bos is None and added and added[0] not in (self.bos_id, self.eos_id):
            raise InputError(f"data.tokenizer: puts {backend.id_to_token(added[0])!r} in front of each text, and its BOS is {self.bos!r}")
        self.start_id: int | None = self.bos_id if starts else None
        self.stop_ids: frozenset[int] = frozenset({self.eos_id, *stops})
        self.new_tokens: tuple[str, ...] = ()
        self.appended = tuple(appended)
        self._changed(vocab)

    def _changed(self, vocab: dict[str, int]) -> None:
        self.vocab_size: int = max(vocab.values()) + 1
        self.fingerprint = self._fingerprint(vocab)
        self._backends: dict[str, tokenizers.Tokenizer] = {"": self.backend}
        self.special_names: dict[int, str] = {id_: token.content for id_, token in self.backend.get_added_tokens_decoder().items()}
        self.special_names |= {vocab[name]: name for name in (self.eos, self.bos, self.pad) if name is not None}
        self._cached = lru_cache(maxsize=CACHED)(self._encode)

    @property
    def base_vocab_size(self) -> int:
        return self.vocab_size - len(self.new_tokens)

    @property
    def new_token_ids(self) -> list[int]:
        """Ids of ``new_tokens``."""
        return list(range(self.base_vocab_size, self.vocab_size))

    @property
    def byte_ids(self) -> frozenset[int]:
        """Tokens of one byte each ("byte fallback"): the decoder joins neighbours."""
        decoder = self.backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return frozenset()
        return frozenset(id_ for name, id_ in self.backend.get_vocab(with_added_tokens=True).items() if BYTE_TOKEN.fullmatch(name))

    def token_id(self, name: str) -> int | None:
        """The id of the token called ``name``, if there is one."""
        return self.backend.token_to_id(name)

    def add_tokens(self, names: Sequence[str]) -> None:
        """Puts tokens after the vocabulary. Those that it was given before, here or before it was saved, may
        be named again.

        Args:
            names: all new tokens, in the order of their ids; the ones that are there already first.

        Raises:
            ValueError: a name is empty, given twice, or in the vocabulary otherwise.
        """
        names = tuple(names)
        earlier = self.appended
        if not names:
            return
        if names[: len(earlier)] != earlier:
            raise InputError(f"model.new_tokens = {list(names)}: this tokenizer already has new tokens; begin with {list(earlier)}")
        known = self.backend.get_vocab(with_added_tokens=True)
        for name in (added := names[len(earlier) :]):
            if not name or names.count(name) > 1:
                raise InputError(f"model.new_tokens = {list(names)}: needs names, each once")
            if name in known:
                raise InputError(f"model.new_tokens: {name!r} is in the tokenizer's vocabulary already; take another name, or leave it out")
        # NOTE: special ones would not be recognised inside a text, as no special token's name is
        self.backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in added])
        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.new_tokens = self.appended = names
        self._changed(vocab)
        if [vocab[name] for name in names] != self.new_token_ids:
            raise InputError(f"model.new_tokens = {list(names)}: the tokenizer's ids have gaps, so new ones cannot follow them")

    def _fingerprint(self, vocab: dict[str, int]) -> str:
        parts = json.loads(self.backend.to_str())
        model = parts["model"]
        deciding = [sorted(vocab.items()), parts["normalizer"], parts["pre_tokenizer"], model.get("merges"), model["type"]]
        unknown = model.get("unk_token")
        self.unknown_id: int | None = model.get("unk_id") if unknown is None else vocab.get(unknown)
        specials = [self.start_id, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps([deciding, specials], sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self) -> Any:
        return _rebuild, (self.backend.to_str(), self._named, self.new_tokens)

    @property
    def _named(self) -> dict[str, Any]:
        """The arguments of the constructor after the backend."""
        names = {"eos": self.eos, "bos": self.bos, "pad": self.pad, "appended": self.appended, "chat_template": self.chat_template}
        return names | {"adds_bos": self.start_id is not None, "stops": self.stop_ids}

    def changed(self, **named: Any) -> Tokenizer:
        """The same with other arguments of the constructor."""
        return Tokenizer(self.backend, **self._named | named)

    def without_last(self) -> Tokenizer:
        """The same without the last of its ``new_tokens``."""
        parts, name = json.loads(self.backend.to_str()), self.new_tokens[-1]
        parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != name]
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)), **self._named).changed(appended=self.appended[:-1])

    def starting(self) -> Tokenizer:
        """The same, with a backend that puts the token there that a text starts with."""
        if self.start_id is None or self.backend.encode("").ids[:1] == [self.start_id]:
            return self
        return self._around(put_in_front(str(self.bos), self.start_id))

    def enclosing(self) -> Tokenizer:
        """The same, with a backend that puts the token there that a text starts with, and EOS after it."""
        start = [] if self.start_id is None else [(str(self.bos), self.start_id)]
        if self.backend.encode("").ids == [*(id_ for _, id_ in start), self.eos_id]:
            return self
        single = " ".join([*(name for name, _ in start), "$A", self.eos])
        return self._around(processors.TemplateProcessing(single=single, special_tokens=[*start, (self.eos, self.eos_id)]))

    def _around(self, post_processor: Any) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = post_processor
        return Tokenizer(backend, **self._named)

    def _encode(self, text: str, after: str = "") -> tuple[int, ...]:
        if after not in self._backends:
            self._backends[after] = _without_prefix(self.backend, after)
        try:
            return tuple(self._backends[after].encode(text, add_special_tokens=False).ids)
        except TypeError:
            # the binding refuses strings that are not Unicode text
            if not isinstance(text, str):
                raise
            bad = next((i for i, char in enumerate(text) if 0xD800 <= ord(char) <= 0xDFFF), 0)
            raise InputError(f"lone surrogate U+{ord(text[bad]):04X} at character {bad}: not valid Unicode text") from None

    def encode(self, text: str, after: str = "") -> list[int]:
        """Ids of ``text``, nothing added; the name of a special token inside it is text like any other, that
        of a new one is the token.

        Args:
            after: what comes before ``text``: "" nothing, "special" a special token, "text" other text.
                Tokenizers that put a space in front of a text put none where a whole of several pieces would
                not get one.

        Raises:
            ValueError: ``text`` holds a lone surrogate.
        """
        return list(self._cached(text, after) if len(text) <= CACHED_CHARACTERS else self._encode(text, after))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are left out, new ones are not."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write a directory that ``from_pretrained`` and ``transformers.AutoTokenizer`` read."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        config = {
            "tokenizer_class": PLAIN_CLASS,
            "clean_up_tokenization_spaces": False,
            **{key: token for key, token in names.items() if token is not None},
            "adds_bos": self.start_id is not None,
            "stop_ids": sorted(self.stop_ids),
            **({"new_tokens": list(self.appended)} if self.appended else {}),
        }
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (path / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8", newline="")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE (Radford et al. 2019, section 2.2) over ``texts``; the same texts give the same
        tokenizer.

        NOTE: the trainer's time grows with the square of a word's length, so words of more than
        ``LONGEST_WORD`` bytes are learnt from in parts.

        Args:
            texts: the training text.
            vocab_size: entries at most: three special tokens, 256 bytes, then merges.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts = pre_tokenizers.Split(tokenizers.Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")  # a byte is a character, and none a line break
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False)
        unicode = (text.encode("utf-8", "ignore").decode() for text in texts)  # a lone surrogate makes its sample unusable, not the run
        backend.train_from_iterator(unicode, trainer)
        backend.pre_tokenizer = words
        return cls(backend, eos=EOS, bos=BOS, pad=PAD, adds_bos=True)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> Tokenizer:
        """A Hugging Face tokenizer: a local directory, or a hub id where there is a network. No code of the
        repository is run. What ends an answer in the model whose directory it is, by its
        ``generation_config.json`` or ``config.json``, ends one here, too.

        Raises:
            ValueError: it cannot be read, has no fast implementation, or has no EOS.
        """
        path_or_id = expand(str(path_or_id))
        is_there = bool(path_or_id) and Path(path_or_id).is_dir()
        where = f"data.tokenizer = {path_or_id!r}"
        if is_no_hub_id(path_or_id) and not is_there:
            raise InputError(f"{where}: no such directory{start_of(path_or_id)}")
        check_files(path_or_id, "additional_chat_templates/*")
        plain = _read_plain(Path(path_or_id))
        if plain is not None:
            return plain
        from transformers import AutoTokenizer

        config = Path(path_or_id) / CONFIG
        settings = read_object(config) if config.is_file() else {}
        check_config(f"{where}: {CONFIG}", settings)
        what = "cannot be loaded" if is_there else f"neither a directory{start_of(path_or_id)} nor a hub tokenizer that can be loaded"
        with class_call(where, what, settings):
            loaded: Any = AutoTokenizer.from_pretrained(str(path_or_id), trust_remote_code=False)
            backend = getattr(loaded, "backend_tokenizer", None)
            copied = tokenizers.Tokenizer.from_str(backend.to_str()) if backend is not None else None  # transformers keeps its own
        if copied is None:
            raise InputError(f"{where}: has no fast implementation (tokenizer.json)")
        if loaded.eos_token is None:
            raise InputError(f"{where}: has no EOS token, so answers could not end")
        return cls(
            copied,
            eos=loaded.eos_token,
            bos=loaded.bos_token,
            pad=loaded.pad_token,
            chat_template=_default_template(loaded.chat_template),
            stops=stop_ids(Path(path_or_id)),
        )


def _rebuild(serialised: str, named: dict[str, Any], new: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(serialised), **named)
    tokenizer.add_tokens(new)
    return tokenizer


def put_in_front(name: str, id_: int) -> Any:
    """A post-processor that puts one token in front of a text."""
    return processors.TemplateProcessing(single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, id_)])


def _default_template(found: Any) -> str | None:
    """The chat template for plain conversations; some tokenizers have several, by name, or as a list of
    {name, template}.
    """
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _without_prefix(backend: tokenizers.Tokenizer, after: str) -> tokenizers.Tokenizer:
    """``backend`` for a piece of a longer text. Some tokenizers put a space in front of the whole text only
    (Metaspace "first"), some also after each special token; none does inside.
    """

    def changed(node: Any) -> Any:
        if isinstance(node, list):
            kept = [entry for entry in node if after == "special" or not isinstance(entry, dict) or entry.get("type") != "Prepend"]
            return [changed(entry) for entry in kept]
        if not isinstance(node, dict):
            return node
        node = {key: changed(value) for key, value in node.items()}
        if node.get("type") == "Metaspace" and (after == "text" or node.get("prepend_scheme") == "first"):
            node["prepend_scheme"] = "never"
        if node.get("type") == "ByteLevel" and after == "text":
            node["add_prefix_space"] = False
        return node

    parts = json.loads(backend.to_str())
    old = {key: parts[key] for key in ("normalizer", "pre_tokenizer")}
    # a lone normalizer is treated as a list of one, so that it can be left out
    whole = {"type": "Sequence", "normalizers": [old["normalizer"]] if old["normalizer"] else []}
    new = {"normalizer": changed(whole), "pre_tokenizer": old["pre_tokenizer"] and changed(old["pre_tokenizer"])}
    if new == {"normalizer": whole, "pre_tokenizer": old["pre_tokenizer"]}:
        return backend
    inner = tokenizers.Tokenizer.from_str(json.dumps(parts | new))
    inner.encode_special_tokens = True
    return inner


def _read_plain(path: Path) -> Tokenizer | None:
    """The tokenizer of a directory that ``Tokenizer.save`` wrote: read without importing transformers, which
    takes seconds. Any other may say more than ``tokenizer.json`` does, in its config or beside it.
    """
    files = path / "tokenizer.json", path / "tokenizer_config.json"
    others = path / "added_tokens.json", path / "special_tokens_map.json"
    if not all(file.is_file() for file in files) or any(file.is_file() for file in others):
        return None
    try:
        config: Any = read_object(files[1])
        is_plain = config.keys() <= OWN_KEYS and config.get("clean_up_tokenization_spaces") is False
        if not is_plain or config.get("tokenizer_class") != PLAIN_CLASS or not isinstance(config.get("eos_token"), str):
            return None
        backend = tokenizers.Tokenizer.from_file(str(files[0]))
        chat = path / CHAT_TEMPLATE
        return Tokenizer(
            backend,
            **{key: config.get(f"{key}_token") for key in ("bos", "eos", "pad")},
            appended=[str(name) for name in config.get("new_tokens", ())],
            chat_template=read_text(chat) if chat.is_file() else None,
            adds_bos=bool(config.get("adds_bos", True)),  # older ones do not say: texts started with a BOS that had a name
            stops=(*config.get("stop_ids", ()), *stop_ids(path)),
        )
    except Exception as error:
        raise InputError(f"data.tokenizer = {str(path)!r}: cannot be read: {error}") from None
