"""Embeddings of models that begin with the weights of another one, and have more tokens than it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kempnerforge.config import JobConfig, ModelConfig
from kempnerforge.config.data import TextConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.convert.commands import export_model
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.inference.model import load_pretrained
from kempnerforge.training.initial_weights import rows_by_token
from kempnerforge.training.setup import assemble
from tests.training.tiny import call, write_config

CORPUS = ["a cat and a dog on the mat"] * 4
TEXT = """
[run]
dir = "{folder}/run"
[model]
dim = 32
n_layers = 1
n_heads = 2
vocab_size = 340
max_seq_len = 64
[data]
source = "text"
path = "{folder}/a.txt"
tokenizer_vocab_size = 300
[train]
max_steps = 1
batch_size = 2
seq_len = 32
mixed_precision = "fp32"
[metrics]
tensorboard = false
"""
FROZEN = '[[stages]]\nname = "one"\nsteps = 1\nfreeze = [{ module = "transformer.token_embedding.*" }]\n'


def made(rows: int, new: list[str], tied: bool, seed: int, tokens: tuple[str, ...] = ()):
    tokenizer = Tokenizer.train(CORPUS, 300)
    tokenizer.add_tokens(tokens)
    words = Tokenizer(tokenizer.backend, eos=tokenizer.eos, bos=tokenizer.bos, pad=tokenizer.pad, appended=tokens)
    model = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=rows, new_tokens=new, tie_embeddings=tied)
    torch.manual_seed(seed)
    return assemble(JobConfig(model=model, data=TextConfig(path="a.txt"), train=TrainConfig(max_steps=1)), words, data=False)


def by_id(assembly, tensors, head: bool):
    """Rows of the embedding or the head as the ids of the tokenizer count them."""
    whole, new = ("output_head", "new_tokens.output_head") if head else ("token_embedding", "new_tokens.embedding")
    rows = [tensors[f"transformer.{name}.weight"] for name in (whole, new) if f"transformer.{name}.weight" in tensors]
    return torch.cat([rows[0][: assembly.tokenizer.base_vocab_size], *rows[1:]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 52])
@pytest.mark.parametrize("before", [(), ("<p>",)])
@pytest.mark.parametrize("after", [("<p>",), ("<p>", "<q>")])
def test_rows_of_tokens_that_are_there_stay(tied: bool, padding: int, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Padding, tokens of an earlier run among the new ones, and tokens after them: nothing that was learnt is lost."""
    size = Tokenizer.train(CORPUS, 300).vocab_size
    old, new = made(0 if before else size + padding, [*before], tied, 0), made(size + padding, [*after], tied, 1, before)
    weights = {name: p.detach() for name, p in old.model.named_parameters()}
    found = rows_by_token(weights, new.model, new.tokenizer, old.tokenizer)
    assert {name: t.shape for name, t in found.items()} == {name: p.shape for name, p in new.model.named_parameters()}
    for head in (False,) if tied else (False, True):
        there, here = by_id(old, weights, head), by_id(new, found, head)
        assert len(here) == size + len(after) and torch.equal(here[: len(there)], there)
    other = Tokenizer.train(["zebra quilt jumps vividly over"] * 4, 300)
    kept = rows_by_token(weights, new.model, new.tokenizer, other)
    assert kept.keys() == weights.keys() and all(kept[name] is weights[name] for name in kept)


def test_new_tokens_train_on_a_padded_vocabulary(tmp_path: Path) -> None:
    """The embedding stays frozen and bitwise what it was, the new token learns, and its row goes out with the others."""
    (tmp_path / "a.txt").write_text("a cat <p> and a dog\n\n" * 50)
    path = write_config(tmp_path, config=TEXT)
    assert call("train", path).code == 0
    again = write_config(tmp_path, "new.toml", config=TEXT.replace("/run", "/new") + FROZEN)
    ended = call("train", again, '--model.new_tokens=["<p>"]', f"--run.init_from={tmp_path}/run")
    assert ended.code == 0, ended.err
    before, after = (dict(load_pretrained(tmp_path / name, device="cpu")[0].named_parameters()) for name in ("run", "new"))
    table, new = after["transformer.token_embedding.weight"], after["transformer.new_tokens.embedding.weight"]
    assert len(before["transformer.token_embedding.weight"]) == 340 > len(table)
    assert torch.equal(table, before["transformer.token_embedding.weight"][: len(table)]) and len(new) == 1
    export_model(tmp_path / "new", tmp_path / "out")
    theirs = dict(load_pretrained(tmp_path / "out", device="cpu")[0].named_parameters())
    assert torch.equal(theirs["transformer.token_embedding.weight"], torch.cat([table, new]))


def test_a_tokenizer_with_more_tokens_than_rows_names_one() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size = 270: the tokenizer has \d+ tokens, and '.+' \(id 270\) would have no row"):
        made(270, [], True, 0)
