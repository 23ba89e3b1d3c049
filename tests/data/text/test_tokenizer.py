from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from kempnerforge.data import Tokenizer
from kempnerforge.data.text.tokenizer import BOS, EOS, LONGEST_WORD, PAD, put_in_front
from kempnerforge.model.hf_files import stop_ids
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import write_tokenizer

UNICODE = st.text(st.characters(exclude_categories=("Cs",)))


@given(a=UNICODE, b=UNICODE)
@settings(max_examples=300, deadline=None)
def test_decode_inverts_encode_and_parts_join(tokenizer: Tokenizer, a: str, b: str) -> None:
    assert tokenizer.decode(tokenizer.encode(a)) == a
    assert tokenizer.decode(tokenizer.encode(a) + tokenizer.encode(b)) == a + b


@pytest.mark.parametrize("name", [PAD, BOS, EOS, f"say {EOS} now"])
def test_names_of_special_tokens_are_text(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(name)
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == name
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == name  # type: ignore[list-item]


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_training_is_deterministic_and_bounded() -> None:
    texts = [f"{a} {b} of the {c}" for a in "abcdef" for b in ("sea", "sand") for c in ("hill", "valley")]
    first, second = Tokenizer.train(texts, 270), Tokenizer.train(iter(texts), 270)
    assert first.vocab_size == 270
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != Tokenizer.train(texts, 271).fingerprint


def test_training_takes_the_same_time_for_words_of_any_length() -> None:
    """The trainer alone needs minutes for a word of 300 kB. Words up to ``LONGEST_WORD`` are learnt from as they are."""
    rng = random.Random(0)
    word = lambda length: "".join(rng.choices("abcdefghijklmnop", k=length))
    begin = time.process_time()
    Tokenizer.train([word(300_000)], 600)
    assert time.process_time() - begin < 15
    texts = [word(LONGEST_WORD), "naïve 漢字\r\n\n\t\u2028x", *(word(rng.randint(1, 9)) for _ in range(300))]
    trained = Tokenizer.train(texts, 600)
    alone = tokenizers.Tokenizer(models.BPE())
    alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    alone.train_from_iterator(texts, trainer)
    ours, theirs = (json.loads(backend.to_str()) for backend in (trained.backend, alone))
    assert ours["model"] == theirs["model"] and ours["pre_tokenizer"] == theirs["pre_tokenizer"]


def test_frequent_words_become_one_token(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.encode(word)) for word in ("yes", "no", "red", "blue")] == [1, 1, 1, 1]


def test_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate U\\+D800 at character 2"):
        tokenizer.encode("ab\ud800c")


def test_save_load_pickle_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for copy in (Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert (copy.vocab_size, copy.pad_id, copy.bos_id, copy.eos_id) == (tokenizer.vocab_size, 0, 1, 2)
        assert copy.encode(f"what {EOS} is 🙂") == tokenizer.encode(f"what {EOS} is 🙂")


def test_transformers_reads_what_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "what is  the colour? 🙂 "
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def saved_without(tokenizer: Tokenizer, path: Path, *keys: str) -> Path:
    tokenizer.save(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))
    return path


def test_pad_falls_back_to_eos_and_bos_may_be_absent(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = Tokenizer.from_pretrained(saved_without(tokenizer, tmp_path, "pad_token", "bos_token"))
    assert (loaded.pad_id, loaded.bos_id) == (loaded.eos_id, None)


def test_missing_eos_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="has no EOS"):
        Tokenizer.from_pretrained(saved_without(tokenizer, tmp_path, "eos_token"))


def test_unreadable_directories_are_named(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "nowhere", "data/of/mine", "./here", ""):
        with pytest.raises(ValueError, match=rf"data\.tokenizer = '{nowhere}': no such directory"):
            Tokenizer.from_pretrained(nowhere)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        Tokenizer.from_pretrained(tmp_path)


# ---- new tokens ------------------------------------------------------------------------------------------------------

NEW = ["<image>", "<|end|>", "<e>"]


def fresh() -> Tokenizer:
    return Tokenizer.train(["what is the colour?\n", "red"] * 4, 300)


def test_tokens_with_one_id_are_refused(tmp_path: Path) -> None:
    """transformers loads such a file; it fails where it is written again."""
    write_tokenizer(tmp_path, prefix=False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {name: id_ if len(name) == 1 else 0 for name, id_ in vocab.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data\.tokenizer = .*: cannot be loaded; .*out of vocabulary"):
        Tokenizer.from_pretrained(tmp_path)


def test_new_tokens_follow_the_base_vocabulary() -> None:
    made, plain = fresh(), fresh()
    made.add_tokens(NEW)
    base = plain.vocab_size
    assert made.base_vocab_size == base and made.vocab_size == base + 3
    assert made.new_token_ids == [base, base + 1, base + 2] == [made.token_id(name) for name in NEW]
    assert (plain.base_vocab_size, plain.new_token_ids, plain.token_id("<image>")) == (base, [], None)
    assert made.fingerprint != plain.fingerprint


def test_new_tokens_are_recognised_wherever_they_stand() -> None:
    made, plain = fresh(), fresh()
    text = "red<image> is<|end|>r<e><eos>"
    before = made.encode(text)  # a cached result must not outlive the change
    made.add_tokens(NEW)
    image, end, letter = made.new_token_ids
    pieces = [plain.encode(piece) for piece in ("red", " is", "r", "<eos>")]
    assert made.encode(text) == [*pieces[0], image, *pieces[1], end, *pieces[2], letter, *pieces[3]] != before == plain.encode(text)
    assert made.decode(made.encode(text)) == text
    assert made.eos_id not in made.encode(text)


def test_new_tokens_outlive_saving_and_pickling(tmp_path: Path) -> None:
    made = fresh()
    made.add_tokens(NEW)
    copy = pickle.loads(pickle.dumps(made))
    assert (copy.new_tokens, copy.new_token_ids, copy.fingerprint) == (made.new_tokens, made.new_token_ids, made.fingerprint)
    made.save(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == made.fingerprint and loaded.encode("<image>") == made.encode("<image>")
    assert (loaded.new_tokens, loaded.base_vocab_size) == ((), made.vocab_size), "no one has asked for them yet"
    for _ in range(2):
        loaded.add_tokens(NEW)
        assert (loaded.new_token_ids, loaded.fingerprint) == (made.new_token_ids, made.fingerprint)
    loaded.add_tokens([*NEW, "<more>"])
    assert loaded.new_token_ids == [*made.new_token_ids, made.vocab_size]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("red<image> <e>", add_special_tokens=False).input_ids == made.encode("red<image> <e>")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["<image>", "<eos>"], "'<eos>' is in the tokenizer's vocabulary already"),
        (["a"], "'a' is in the tokenizer's vocabulary already"),
        (["<image>", "<image>"], "needs names, each once"),
        ([""], "needs names, each once"),
    ],
)
def test_names_that_cannot_be_new(names: list[str], message: str) -> None:
    made = fresh()
    with pytest.raises(ValueError, match=message):
        made.add_tokens(names)
    assert made.new_tokens == () and made.fingerprint == fresh().fingerprint


def test_new_tokens_keep_their_order(tmp_path: Path) -> None:
    made = fresh()
    made.add_tokens(NEW)
    made.add_tokens([])
    assert made.new_tokens == tuple(NEW)
    for names in (NEW[:2], NEW[::-1], ["<other>"]):
        with pytest.raises(ValueError, match="begin with"):
            made.add_tokens(names)


def test_a_vocabulary_with_gaps_takes_no_new_tokens() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 9}, unk_token="<eos>"))
    with pytest.raises(ValueError, match="ids have gaps"):
        Tokenizer(backend, eos="<eos>").add_tokens(["<image>"])


# ---- files of others ------------------------------------------------------------------------------------------------

MARKS = ("<|im_start|>", "<|im_end|>", "<tool>")
FILES: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "extra_special_tokens, a list": {"tokenizer_config.json": {"extra_special_tokens": [*MARKS]}},
    "extra_special_tokens, by name": {"tokenizer_config.json": {"extra_special_tokens": dict(zip("abc", MARKS, strict=True))}},
    "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": [*MARKS]}},
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(300 + k): {"content": mark, "special": k < 2} for k, mark in enumerate(MARKS)}
        }
    },
    "added_tokens.json": {"added_tokens.json": {mark: 300 + k for k, mark in enumerate(MARKS)}},
    "special_tokens_map.json": {"special_tokens_map.json": {"additional_special_tokens": [*MARKS], "pad_token": "<tool>"}},
    "names elsewhere": {"special_tokens_map.json": {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}},
    "eos as a token": {"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}},
    "add_bos_token": {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True}},
    "bos in front": {"bos": True},
    "BPE with another class": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": [*MARKS]}},
    "Llama's class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}},
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_is_what_transformers_makes_of_its_files(name: str, tmp_path: Path) -> None:
    """Whatever is named, and wherever: the same tokens, the same roles, the same start of a text."""
    from transformers import AutoTokenizer

    files = dict(FILES[name])
    backend = Tokenizer.train(["a cat and a dog"], 300).backend
    if files.pop("bos", False):
        backend.post_processor = put_in_front("<bos>", 1)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    files["tokenizer_config.json"] = config | files.get("tokenizer_config.json", {})
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert {mark: ours.token_id(mark) for mark in MARKS} == {
        mark: None if (id_ := theirs.get_vocab().get(mark)) is None else id_ for mark in MARKS
    }
    assert (ours.bos, ours.eos) == (theirs.bos_token, theirs.eos_token)
    assert ours.pad == (theirs.pad_token or theirs.eos_token)
    assert set(theirs.all_special_tokens) <= set(ours.special_names.values())
    assert (ours.start_id is not None) == (theirs("a cat").input_ids[:1] == [theirs.bos_token_id])
    ours.save(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint
    assert (again.start_id, again.special_names, again.stop_ids) == (ours.start_id, ours.special_names, ours.stop_ids)


def test_a_saved_tokenizer_that_does_not_say_starts_texts_with_its_bos(tmp_path: Path) -> None:
    """As those of older runs did in training."""
    Tokenizer.train(["abc"], 300).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("adds_bos", "stop_ids")}))
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.start_id == found.bos_id == 1


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"config.json": {"eos_token_id": 7}}, {2, 7}),
        ({"config.json": {"eos_token_id": [7, 8]}}, {2, 7, 8}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [9, 2]}}, {2, 9}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, {2, 7}),
        ({"config.json": {"text_config": {"eos_token_id": [7]}}}, {2, 7}),
        ({"config.json": {}}, {2}),
    ],
)
def test_what_ends_an_answer_in_the_model_of_a_directory_ends_one_here(files: dict[str, Any], want: set[int], tmp_path: Path) -> None:
    Tokenizer.train(["abc"], 300).save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.stop_ids == want
    found.save(tmp_path / "run")
    assert Tokenizer.from_pretrained(tmp_path / "run").stop_ids == want
    assert pickle.loads(pickle.dumps(found)).stop_ids == want


def test_an_id_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, "<eos>"]}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id has '<eos>', which is no id"):
        stop_ids(tmp_path)


def test_a_tokenizer_with_another_token_in_front_is_refused() -> None:
    backend = Tokenizer.train(["abc"], 300).backend
    backend.post_processor = put_in_front("<pad>", 0)
    with pytest.raises(InputError, match="puts '<pad>' in front of each text, and its BOS is '<bos>'"):
        Tokenizer(backend, eos="<eos>", bos="<bos>")
