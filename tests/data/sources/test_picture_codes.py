"""Pictures as answers: samples, their tokens in a row, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.config.build import build
from kempnerforge.config.data import DataConfig, JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.model import ModelConfig, picture_tokens
from kempnerforge.data import Encoder, Layout, Text, Tokenizer, collate
from kempnerforge.data.sources import build_source
from kempnerforge.data.sources.picture_codes import PictureCodesConfig, captions, codes_in, written
from kempnerforge.model.vq import VQVAE, VQConfig
from kempnerforge.util.errors import Problems

COLOURS = {"red": (220, 0, 0), "blue": (0, 0, 220), "green": (0, 200, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of pictures, and pictures with captions."""
    VQVAE(VQConfig(image_size=8, codes=5, code_dim=4, width=8)).save(tmp_path / "codec")
    rows = []
    for name, colour in COLOURS.items():
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9), colour).save(buffer, "PNG")
        (tmp_path / f"{name}.png").write_bytes(buffer.getvalue())
        rows.append({"image": f"{name}.png", "captions": [name, f"a {name} one"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def config(folder: Path, **pictures: object) -> DataConfig:
    table = {"source": "captions", "path": str(folder / "rows.jsonl"), **pictures}
    made = build(
        DataConfig, {"source": "picture_codes", "codec": str(folder / "codec"), "pictures": table}, ("data",), problems := Problems("x")
    )
    problems.raise_if_any()
    return made


def test_captions_ask_for_the_codes_of_their_picture(folder: Path) -> None:
    source = build_source(config(folder), "train")
    assert source is not None and len(source) == 3
    sample, codec = source[0], VQVAE.load(folder / "codec", "")
    codes = codec.encode([np.full((8, 8, 3), COLOURS["red"], np.uint8)])[0]
    assert [text.prompt for text in sample.texts] == ["red", "a red one"] and sample.images == ()
    assert {text.answer for text in sample.texts} == {written(codes)}
    assert [path.name for path in sample.shows if isinstance(path, Path)] == ["red.png"]
    assert [text.split() for text in source.corpus() if text.strip()][:2] == [["red"], ["a", "red", "one"]]


def test_a_row_has_a_token_for_each_code(folder: Path) -> None:
    cfg = config(folder)
    source, names = build_source(cfg, "train"), cfg.tokens()
    assert source is not None and names == picture_tokens(5)
    tokenizer = Tokenizer.train(source.corpus(), 300)
    tokenizer.add_tokens(names)
    codes = ModelConfig(new_tokens=names, vocab_size=tokenizer.base_vocab_size).codes
    assert [tokenizer.token_id(f"<code_{k}>") for k in range(5)] == list(codes)
    encoder = Encoder(tokenizer, cfg, Layout(0, 0, 64, 64, 64, codes=codes), seed=0)
    batch = collate([encoder.encode(source[index], 0) for index in range(3)], tokenizer.pad_id, None)
    trained = batch.labels[batch.labels >= 0]
    assert int(((trained >= codes.start) & (trained < codes.stop)).sum()) == 3 * 2 * 4
    words = [
        len(tokenizer.encode(f"{name}\n")) + len(tokenizer.encode(f"a {name} one\n")) + 2 * 4 for name in COLOURS
    ]  # BOS, boi, eoi, EOS
    assert (batch.row_codes, batch.row_words) == (2 * 4, max(words))
    answer = encoder.texts[0].answer_ids(source[0].texts[0])
    assert written(codes_in(tokenizer.decode(answer), 4) or []) == source[0].texts[0].answer


def test_another_tokenizer_or_picture_is_another_fingerprint(folder: Path) -> None:
    def prints() -> str:
        source = build_source(config(folder), "train")
        assert source is not None
        return source.fingerprint()

    first = prints()
    assert prints() == first
    Image.new("RGB", (9, 9)).save(folder / "red.png")
    second = prints()
    VQVAE(VQConfig(image_size=8, codes=5, code_dim=4, width=8)).save(folder / "codec")
    assert len({first, second, prints()}) == 3


def test_what_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"pictures.template"):
        config(folder, template="chat")
    with pytest.raises(ValueError, match=r"images: only a source of prompts, answers and images reads it"):
        PictureCodesConfig(codec="x", pictures=JsonlConfig(path="x"), images=ImagesConfig(fit="crop"))
    with pytest.raises(ValueError, match=r"pictures: needs one table"):
        PictureCodesConfig(codec=str(folder / "codec"))
    with pytest.raises(ValueError, match=r"data.pictures: data.path = .*rows.json"):
        build_source(config(folder, path=str(folder / "rows.json")), "train")
    (folder / "codec" / "config.json").unlink()
    with pytest.raises(ValueError, match="data.codec"):
        build_source(config(folder), "train")
    with pytest.raises(ValueError, match="names of picture tokens"):
        captions([Text("", "a <code_1>")])
    with pytest.raises(ValueError, match="'<x>' is between '<code_N>'"):
        _ = ModelConfig(new_tokens=["<code_0>", "<x>", "<code_1>"], vocab_size=9).codes


@pytest.mark.parametrize("text", ["", "<boi><eoi>", "<boi><code_1><code_2>", "<boi><code_1><eoi><code_2>", "a<boi><code_1><code_2><eoi>"])
def test_only_a_whole_picture_is_one(text: str) -> None:
    assert codes_in(text, 2) is None and codes_in("<boi> <code_1><code_22>\n<eoi>", 2) == [1, 22]
