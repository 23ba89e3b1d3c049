"""Hostile texts and paths among good rows of one source: each is skipped, counted and named, or encoded as the text that it is."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config.data import DataConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Batch, Encoder, Kind, Layout, Sample, Source, Text, Tokenizer, build_source
from kempnerforge.data.batching.loader import build_loader
from kempnerforge.data.sources.captions import CaptionsConfig
from kempnerforge.data.sources.llava import LlavaConfig
from kempnerforge.data.text.interleave import INPUT_IDS, KINDS
from tests.data.samples import png

GOOD = 40
MEGABYTE = "many words " * 100_000
NOT_UTF8 = b"\xff\xfe caf\xe9"


@dataclass(frozen=True)
class Case:
    """A row, and the reason why it is skipped; None: it is used, with its caption as text."""

    name: str
    caption: Any = "a good caption"
    image: Any = "good.png"
    reason: str | None = None


CASES = [
    Case("empty caption", caption="", reason="(no caption|empty answer)"),
    Case("caption of white space", caption=" \n\t", reason="(no caption|empty answer)"),
    Case("a megabyte", caption=MEGABYTE, reason="a text of [0-9]+ tokens, max_text_len = 60"),
    Case("lone surrogate", caption="a\ud800b", reason="lone surrogate"),
    Case("not UTF-8", caption=NOT_UTF8, reason="not UTF-8 at byte"),
    Case("a number", caption=5),
    Case("an object", caption={"a": "b"}, reason="must be a string, not dict"),
    Case("special tokens", caption="<eos><bos>a<pad> <|im_end|>"),
    Case("NUL in the caption", caption="a\0b"),
    Case("NUL in the path", image="good\0.png", reason="empty or with a NUL"),
    Case("path traversal", image="../secret.png", reason="leaves the data root"),
    Case("path traversal inside", image="sub/../../secret.png", reason="leaves the data root"),
    Case("absolute path", image="/etc/hostname", reason="leaves the data root"),
    Case("symlink", image="link.png", reason="leaves the data root"),
    Case("URL", image="https://example.org/a.png", reason="URLs are not fetched"),
    Case("file URL", image="file:///etc/passwd", reason="URLs are not fetched"),
    Case("missing file", image="nowhere.png", reason="no such file"),
]
PLACEHOLDER = Case("placeholder in a caption", caption="an <image> of <image>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.png").write_bytes(png((0, 200, 0)))
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    return folder


def line(row: dict[str, Any], caption: Any) -> bytes:
    """``row`` as JSON; a caption of bytes goes in as it is."""
    text = json.dumps(row)
    return text.encode() if not isinstance(caption, bytes) else text.encode().replace(b"CAPTION", caption)


def written(case: Case) -> Any:
    return "CAPTION" if isinstance(case.caption, bytes) else case.caption


def caption_row(case: Case) -> dict[str, Any]:
    return {"image": case.image, "caption": written(case)}


def llava_row(case: Case) -> dict[str, Any]:
    return {"image": case.image, "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": written(case)}]}


def epoch(source: Source, encoder: Encoder, cfg: DataConfig) -> list[Batch]:
    """Batches in which each sample has had its turn once."""
    train = TrainConfig(batch_size=6, seq_len=64)
    loader = build_loader(source, encoder, cfg=cfg, layout=encoder.layout, train_cfg=train)
    steps = -(-len(source) // train.batch_size)
    return [batch for _, batch in zip(range(steps), loader, strict=False)]


@pytest.mark.parametrize("name", ["captions", "llava"])
def test_hostile_rows_among_good_ones(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    if name == "captions":
        make, row, cases = CaptionsConfig, caption_row, [*CASES, PLACEHOLDER]
    else:  # in LLaVA's format it marks the places of images, which are not as many
        make, row, cases = LlavaConfig, llava_row, [*CASES, replace(PLACEHOLDER, reason="2 of '<image>' in a text and 1 images")]
    lines = [line(row(Case(f"good {k}", caption=f"good {k}")), "") for k in range(GOOD)]
    number = {case.name: 1 + 2 * k for k, case in enumerate(cases)}
    for case in cases:
        lines.insert(number[case.name] - 1, line(row(case), case.caption))
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    cfg = make(path=str(folder / "rows.jsonl"), max_bad_fraction=0.5)
    source = build_source(cfg, "train")
    assert source is not None and len(source) == GOOD + len(cases)
    encoder = Encoder(tokenizer, cfg, Layout(2, 8, 60, 64, 64), seed=0)
    batches = epoch(source, encoder, cfg)
    skipped = dict(bad for batch in batches for bad in batch.skipped)
    used = {sample for batch in batches for sample in batch.sample_names}
    assert {f"rows.jsonl:{k + 1}" for k in range(len(lines))} - used == {f"rows.jsonl:{number[case.name]}" for case in cases if case.reason}
    assert len(skipped) == sum(case.reason is not None for case in cases), "each is counted once, and nothing else is"
    for case in cases:
        where = f"{name}/train[{number[case.name] - 1}]"
        if case.reason is not None:
            assert f"rows.jsonl:{number[case.name]}: " in skipped[where] and re.search(case.reason, skipped[where]), case.name
            continue
        encoded = encoder.encode(source[number[case.name] - 1], 0)
        answer = encoded.table[INPUT_IDS][encoded.table[KINDS] == Kind.ANSWER].tolist()
        assert tokenizer.decode(answer[:-1]) == str(case.caption) and answer.index(tokenizer.eos_id) == len(answer) - 1, case.name
        assert len(encoded.images) == 1


def test_too_many_bad_lines_refuse_the_file(folder: Path) -> None:
    good = json.dumps({"image": "good.png", "caption": "a"}).encode()
    for bad, fraction, refused in ((1, 0.01, False), (2, 0.01, True), (2, 0.02, False), (0, 0.0, False), (1, 0.0, True)):
        (folder / "rows.jsonl").write_bytes(b"\n".join([good] * (100 - bad) + [b"{"] * bad))
        cfg = CaptionsConfig(path=str(folder / "rows.jsonl"), max_bad_fraction=fraction)
        if refused:
            with pytest.raises(ValueError, match=f"rows.jsonl: {bad} bad lines: line {101 - bad}: not JSON"):
                build_source(cfg, "train")
        else:
            source = build_source(cfg, "train")
            assert source is not None and len(source) == 100


def test_names_of_tile_markers_in_a_sample_are_text() -> None:
    """The tokens that ``data.images`` adds stand for places of tiles, and nothing that somebody wrote is one."""
    cfg = DataConfig(images=ImagesConfig(fit="tiles", max_side=16, marker_grid=2))
    tokenizer = Tokenizer.train(["what is it\n", "it is <row_1_col_2>"], 400)
    tokenizer.add_tokens(cfg.images.new_tokens())
    encoder = Encoder(tokenizer, cfg, Layout(1, 8, 64, 128, 128), seed=0)
    row = encoder.encode(Sample("s", (), (Text("what is <|global_image|>?", "it is <row_1_col_2>"),)), 0)
    assert not set(row.table[0].tolist()) & set(tokenizer.new_token_ids)
    assert tokenizer.decode(row.table[0].tolist()) == "what is <|global_image|>?\nit is <row_1_col_2>"
