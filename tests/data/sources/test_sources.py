from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kempnerforge.config.data import DataConfig, EasyVQAConfig, HFDatasetConfig, JsonlConfig, TextConfig
from kempnerforge.data import Encoder, Layout, Sample, SampleError, Source, Text, Tokenizer, build_source, collate, load_image
from kempnerforge.data import source as data_source
from kempnerforge.data.batching.loader import RowClasses
from kempnerforge.data.sources import rows
from kempnerforge.data.sources.pictures import resolve_image
from kempnerforge.inspection.audit import audit
from tests.data.samples import built

Png = Callable[..., bytes]


def samples_of(source: Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


# ---- easy-VQA ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "images", "questions"), [("train", 4000, 38_575), ("test", 1000, 9_673)])
def test_easy_vqa_has_its_published_size(split: str, images: int, questions: int) -> None:
    pytest.importorskip("easy_vqa")
    samples = samples_of(built(EasyVQAConfig(), split))
    assert len(samples) == images
    assert sum(len(s.texts) for s in samples) == questions
    assert len({t.answer for s in samples for t in s.texts}) == 13
    assert len({s.id for s in samples}) == images
    assert load_image(samples[7].images[0], 64).shape == (64, 64, 3)


def test_easy_vqa_captions() -> None:
    pytest.importorskip("easy_vqa")
    captions = samples_of(built(EasyVQAConfig(form="captions")))
    assert len(captions) == 2435
    assert all(len(s.texts) == 1 and s.texts[0].prompt == "" for s in captions)
    by_id = {s.id: s for s in samples_of(built(EasyVQAConfig()))}
    for sample in captions[:50]:
        shape, colour = str(sample.texts[0].answer).split()
        answers = {t.answer for t in by_id[sample.id].texts}
        assert shape in answers & {"circle", "rectangle", "triangle"}
        assert colour in answers
        assert sample.images == by_id[sample.id].images

    both = samples_of(built(EasyVQAConfig(with_captions=True)))
    assert len(both) == 4000
    ridden = {s.id: s.texts[-1] for s in both if s.texts[-1].prompt == ""}
    assert ridden == {s.id: s.texts[0] for s in captions}
    assert all(s.texts[:-1] == by_id[s.id].texts for s in both if s.id in ridden)


def test_easy_vqa_words_become_single_tokens() -> None:
    pytest.importorskip("easy_vqa")
    cfg = EasyVQAConfig()
    tokenizer = Tokenizer.train(built(cfg).corpus(), cfg.tokenizer_vocab_size)
    assert tokenizer.vocab_size <= 512
    answers = {str(t.answer) for s in samples_of(built(cfg)) for t in s.texts}
    assert {a: len(tokenizer.encode(a)) for a in answers} == dict.fromkeys(answers, 1)


def test_easy_vqa_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ValueError, match=r'pip install "kempnerforge\[quickstart\]"'):
        build_source(EasyVQAConfig(), "train")


# ---- paths -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, png: Png) -> Path:
    """A data root with a picture, beside a secret and with a link that leads to it."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "red.png").write_bytes(png((255, 0, 0)))
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "data-secret").mkdir()
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(root / "sub" / "red.png", root / "inner.png")
    return root


@pytest.mark.parametrize("value", ["sub/red.png", "./sub/../sub/red.png", "inner.png", "{root}/sub/red.png"])
def test_paths_below_the_root(root: Path, value: str) -> None:
    assert resolve_image(value.format(root=root), str(root)) == root / "sub" / "red.png"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("../secret.png", "leaves the data root"),
        ("sub/../../secret.png", "leaves the data root"),
        ("../data-secret/x.png", "leaves the data root"),
        ("{root}/../secret.png", "leaves the data root"),
        ("/etc/passwd", "leaves the data root"),
        ("link.png", "leaves the data root"),
        ("https://example.org/a.png", "URLs are not fetched"),
        ("file:///etc/passwd", "URLs are not fetched"),
        ("data:image/png;base64,AAAA", "URLs are not fetched"),
        ("", "empty or with a NUL"),
        ("a\0b.png", "empty or with a NUL"),
    ],
)
def test_paths_that_are_refused(root: Path, value: str, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        resolve_image(value.format(root=root), str(root))


# ---- JSONL -------------------------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def test_jsonl_rows(root: Path) -> None:
    path = write_lines(
        root / "rows.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"image": "sub/red.png", "q": "what?", "answer": "rot"}).encode(),
        "",
        {"image": ["sub/red.png", "inner.png"], "q": "", "answer": "größe 🙂"},
        {"image": None, "q": "why?", "answer": "so"},
    )
    source = built(JsonlConfig(path=path, prompt_column="q"))
    red = root / "sub" / "red.png"
    assert samples_of(source) == [
        Sample("rows.jsonl:1", (red,), (Text("what?", "rot"),)),
        Sample("rows.jsonl:3", (red, red), (Text("", "größe 🙂"),)),
        Sample("rows.jsonl:4", (), (Text("why?", "so"),)),
    ]
    assert [source.length(i) for i in range(3)] == [8, 7, 6]
    assert list(source.corpus()) == ["what?\n", "rot", "\n", "größe 🙂", "why?\n", "so"]


def test_jsonl_several_texts_and_root(root: Path, tmp_path: Path) -> None:
    texts = [{"prompt": "a?", "answer": "b"}, {"answer": "c"}]
    path = write_lines(tmp_path / "rows.jsonl", {"image": "red.png", "texts": texts})
    source = built(JsonlConfig(path=path, root=str(root / "sub"), texts_column="texts"))
    assert source[0].texts == (Text("a?", "b"), Text("", "c"))
    assert source[0].images == (root / "sub" / "red.png",)
    assert source.length(0) == 4


INTERLEAVED = [
    {
        "image": ["sub/red.png", "sub/red.png"],
        "texts": [{"prompt": "<image>a<image>", "answer": "b"}, {"prompt": "<image>", "answer": "c<image>"}],
    },
    {"image": "sub/red.png", "texts": [{"prompt": "see <image>", "answer": "b"}]},
    {"image": None, "texts": [{"prompt": "a", "answer": "b"}]},
    {"image": ["sub/red.png"], "texts": [{"prompt": "<image><image>", "answer": "b"}]},
]


def starts(source: Source, encoder: Encoder) -> list[list[int]]:
    """Where the images of each row begin that can be encoded."""
    encoded = [encoder.encode(source[index], 0) for index in range(3)]
    batch = collate(encoded, 0, None)
    assert audit(batch, encoder.tokenizer.eos_id) == []
    with pytest.raises(SampleError, match="2 of '<image>' in a text and 1 images"):
        encoder.encode(source[3], 0)
    return [batch.image_starts[batch.image_rows == row].tolist() for row in range(3)]


def test_interleaved_rows_of_a_file(root: Path, make_encoder: Callable[..., Encoder]) -> None:
    source = built(JsonlConfig(path=write_lines(root / "rows.jsonl", *INTERLEAVED), texts_column="texts"))
    assert [source.num_images(index) for index in range(4)] == [2, 1, 0, 1]
    assert starts(source, make_encoder(image_tokens=4)) == [[0, 6, 16], [5], []]
    layout = make_encoder(image_tokens=4).layout
    assert RowClasses(source, layout)(np.arange(4)).tolist() == [(8 + 24 // 4) // 16, 0, 0, 0]
    assert RowClasses(source, Layout(32, 8, 100, 100, 0))(np.arange(4)).tolist() == [4, 2, 0, 2]
    corpus = list(source.corpus())
    assert not any("<image>" in text for text in corpus) and "see " in corpus


def test_a_tokenizer_learns_from_some_of_many_samples(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": "sub/red.png", "prompt": "", "answer": f"word{number}"} for number in range(100)]
    cfg = JsonlConfig(path=write_lines(root / "many.jsonl", *rows))
    everything = [text for text in built(cfg).corpus() if "word" in text]
    assert everything == [f"word{number}" for number in range(100)]
    monkeypatch.setattr(data_source, "CORPUS_SAMPLES", 20)
    some = [text for text in built(cfg).corpus() if "word" in text]
    assert len(some) == 20 and some == [text for text in everything if text in some]
    assert min(map(everything.index, some)) < 20 and max(map(everything.index, some)) >= 80
    assert some == [text for text in built(cfg).corpus() if "word" in text]
    monkeypatch.setattr(data_source, "CORPUS_SAMPLES", 100)
    assert [text for text in built(cfg).corpus() if "word" in text] == everything


@pytest.mark.parametrize("kept", [0, 1, 10_000])
def test_keys_are_judged_once_for_rows_of_one_form(kept: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_OUTLINES", kept)
    good = {"image": "sub/red.png", "texts": [{"prompt": "a", "answer": "b"}]}
    typo = {"image": "sub/red.png", "texts": [{"prompt": "a", "answer": "b", "anwser": "c"}]}
    listed = [good, typo, good, typo, {**good, "id": None}, {**good, "extra": 1}, {**good, "extra": "x"}]
    path = write_lines(root / "many.jsonl", *listed)
    with pytest.raises(ValueError, match="read by nothing") as raised:
        built(JsonlConfig(path=path))
    message = str(raised.value)
    assert """line 2: key "texts.anwser" is read by nothing (nearest is 'answer') (2 times)""" in message
    assert 'line 6: key "extra" is read by nothing' in message and message.count("(2 times)") == 2


def test_interleaved_rows_of_a_dataset(hf: Any, root: Path, make_encoder: Callable[..., Encoder]) -> None:
    red = (root / "sub" / "red.png").read_bytes()
    listed = [value if isinstance(value, list) else [value] if value else [] for value in (row["image"] for row in INTERLEAVED)]
    rows = {"image": [[{"bytes": red, "path": None} for _ in entry] for entry in listed], "texts": [row["texts"] for row in INTERLEAVED]}
    features = hf.Features({"image": hf.List(hf.Image()), "texts": hf.List({"prompt": hf.Value("string"), "answer": hf.Value("string")})})
    hf.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "set"))
    source = built(HFDatasetConfig(path=str(root / "set"), texts_column="texts"))
    assert starts(source, make_encoder(image_tokens=4)) == [[0, 6, 16], [5], []]


def test_jsonl_splits(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", {"answer": "a"})
    test = write_lines(tmp_path / "b.jsonl", {"answer": "b"})
    assert build_source(JsonlConfig(path=train, image_column=""), "test") is None
    assert built(JsonlConfig(path=train, eval_path=test, image_column=""), "test")[0].texts == (Text("", "b"),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", '{"answer": "a"}', "[1]"], r"rows.jsonl: 2 bad lines: line 1: not JSON: .*; line 3: a JSON object is needed, not list"),
        ([b'{"answer": "\xff"}'], "1 bad lines: line 1: not UTF-8 at byte 12"),
        (["[" * 100_000], "line 1: not read: nested more than 64 levels"),
        (["{"] * 9, "9 bad lines: line 1: .*line 5: [^;]*$"),
        ([""], "no rows"),
        ([{"id": 1}], "no column 'answer' or 'answers' or .* or 'texts' for data.answer_column; columns: id"),
        ([{"answer": "a"}, {"id": 2}], "1 of 2 rows have no column 'answer'"),
        (["[", '{"answer": "a"}', "]"], "is a JSON array, not one JSON object a line; data.source = 'hf_dataset' reads it as it is, or"),
    ],
)
def test_jsonl_files_that_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        build_source(JsonlConfig(path=path, image_column=""), "train")


def test_jsonl_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path = '.*nowhere.jsonl': No such file"):
        build_source(JsonlConfig(path=str(tmp_path / "nowhere.jsonl")), "train")
    path = write_lines(tmp_path / "a.jsonl", {"answer": "a"})
    with pytest.raises(ValueError, match=r"data.eval_path = '.*nowhere.jsonl': No such file"):
        build_source(JsonlConfig(path=path, eval_path=str(tmp_path / "nowhere.jsonl")), "test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": None, "q": "a", "answer": {}}, "rows.jsonl:1: column 'answer': must be a string, not dict"),
        ({"image": None, "q": "a", "answer": None}, "column 'answer' is null"),
        ({"image": None, "q": None, "answer": "b"}, "column 'q' is null"),
        ({"image": None, "q": ["a"], "answer": "b"}, "column 'q': must be a string, not list"),
        ({"image": None, "q": "a", "answer": ""}, "column 'answer': empty answer"),
        ({"image": 5, "q": "a", "answer": "b"}, "column 'image': an image is a path, bytes or base64, not int"),
        ({"image": {}, "q": "a", "answer": "b"}, "column 'image': an image with neither bytes nor path"),
        ({"image": ["x.png", None], "q": "a", "answer": "b"}, "column 'image': image 2 of 2 is null"),
        ({"image": "../x.png", "q": "a", "answer": "b"}, "leaves the data root"),
    ],
)
def test_a_row_of_the_wrong_kind_is_only_skipped(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = built(JsonlConfig(path=write_lines(tmp_path / "rows.jsonl", row), prompt_column="q"))
    with pytest.raises(SampleError, match=message):
        source[0]
    assert list(source.corpus()) == []


@pytest.mark.parametrize("texts", [None, [], "a", [3], [{"prompt": "a"}], [{"answer": ""}]])
def test_a_list_of_texts_of_the_wrong_kind_is_only_skipped(tmp_path: Path, texts: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"texts": texts})
    with pytest.raises(SampleError, match="rows.jsonl:1"):
        built(JsonlConfig(path=path, image_column="", texts_column="texts"))[0]


def test_jsonl_that_changes_is_a_skipped_sample(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"answer": "a"})
    source = built(JsonlConfig(path=path, image_column=""))
    Path(path).write_text("gone")
    with pytest.raises(SampleError, match="rows.jsonl:1: cannot be read: not JSON"):
        source[0]


# ---- Hugging Face datasets -----------------------------------------------------------------------------------------------------------


def test_hf_dataset_on_disk(hf: Any, tmp_path: Path, png: Png) -> None:
    red, broken = png((255, 0, 0)), b"not a picture"
    rows = {
        "image": [{"bytes": red, "path": None}, {"bytes": broken, "path": None}, None],
        "q": ["a?", "b?", "c?"],
        "answer": ["x", "y", "zz"],
    }
    features = hf.Features({"image": hf.Image(decode=False), "q": hf.Value("string"), "answer": hf.Value("string")})
    table = hf.Dataset.from_dict(rows, features=features).cast_column("image", hf.Image())
    hf.DatasetDict({"train": table, "val": table.select([0])}).save_to_disk(str(tmp_path / "set"))

    cfg = HFDatasetConfig(path=str(tmp_path / "set"), prompt_column="q", eval_split="val")
    source = built(cfg)
    assert [s.texts for s in samples_of(source)] == [(Text("a?", "x"),), (Text("b?", "y"),), (Text("c?", "zz"),)]
    assert [s.images for s in samples_of(source)] == [(red,), (broken,), ()]  # nothing is decoded before the guarded decoder
    assert [source.length(i) for i in range(3)] == [3, 3, 4]
    assert len(built(cfg, "test")) == 1
    assert build_source(HFDatasetConfig(path=cfg.path, prompt_column="q"), "test") is None

    with pytest.raises(ValueError, match="no split 'dev'; splits: train, val"):
        build_source(HFDatasetConfig(path=cfg.path, split="dev"), "train")
    with pytest.raises(ValueError, match="no column 'label' for data.answer_column; columns: answer, image, q"):
        build_source(HFDatasetConfig(path=cfg.path, answer_column="label"), "train")


def test_hf_dataset_of_lists(hf: Any, tmp_path: Path, png: Png) -> None:
    images = [png((k, 0, 0)) for k in range(2)]
    texts = [{"prompt": "a?", "answer": "b"}, {"prompt": "c?", "answer": "d"}]
    features = hf.Features({"images": hf.List(hf.Image()), "texts": hf.List({"prompt": hf.Value("string"), "answer": hf.Value("string")})})
    encoded = [[{"bytes": image, "path": None} for image in images]]
    hf.Dataset.from_dict({"images": encoded, "texts": [texts]}, features=features).save_to_disk(str(tmp_path / "set"))
    source = built(HFDatasetConfig(path=str(tmp_path / "set"), image_column="images", texts_column="texts"))
    assert source[0].images == tuple(images)
    assert source[0].texts == (Text("a?", "b"), Text("c?", "d"))
    assert source.length(0) == 6


def test_hf_dataset_files(hf: Any, root: Path) -> None:
    rows = {"image": ["sub/red.png", "../secret.png"], "answer": ["x", "y"]}
    hf.Dataset.from_dict(rows).to_parquet(str(root / "rows.parquet"))
    source = built(HFDatasetConfig(path=str(root / "rows.parquet")))
    assert source[0].images == (root / "sub" / "red.png",)
    with pytest.raises(SampleError, match="leaves the data root"):
        source[1]


def test_hf_dataset_that_cannot_be_read(hf: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="data files end in .parquet, .csv, .tsv, .json, .jsonl"):
        build_source(HFDatasetConfig(path=str(tmp_path / "rows.txt")), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot read the dataset"):
        build_source(HFDatasetConfig(path=str(tmp_path / "empty")), "train")


# ---- plain text ------------------------------------------------------------------------------------------------------------------------


def test_text_windows_predict_each_token_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = "\ufeff" + "what is the colour? red or blue\n\n  yes\n" * 9
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    cfg = TextConfig(path=str(tmp_path / "a.txt"))
    assert "".join(built(cfg).corpus()) == content[1:]
    stream = [*tokenizer.encode(content[1:]), tokenizer.eos_id]
    source = built(cfg, tokenizer=tokenizer, seq_len=10)
    windows = [s.texts[0].answer for s in samples_of(source)]
    assert [id_ for window in windows for id_ in window[1:]] == stream[1:]
    assert [id_ for window in windows for id_ in window[:-1]] == stream[:-1]
    assert all(len(window) == 11 for window in windows[:-1])
    assert [source.length(i) for i in range(len(source))] == [len(window) - 1 for window in windows]
    assert build_source(cfg, "test") is None


def test_text_blocks_do_not_change_the_tokens(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "yes no\n\n\n red blue  \n\tcircle\r\n is it?\n" * 20 + "end"
    (tmp_path / "a.txt").write_bytes(content.encode())
    cfg = TextConfig(path=str(tmp_path / "a.txt"))
    whole = built(cfg, tokenizer=tokenizer, seq_len=10_000)[0].texts[0].answer
    monkeypatch.setattr("kempnerforge.data.sources.text.BLOCK_CHARACTERS", 7)
    source = built(cfg)
    assert len(source) > 10
    assert "".join(source.corpus()) == content
    assert source.tokenised(tokenizer, 10_000)[0].texts[0].answer == whole


@pytest.mark.parametrize(
    ("content", "message"), [(b"ab\xffcd", "not UTF-8: byte 2"), (b"", "empty"), (b" \n", "empty"), (None, "No such file")]
)
def test_text_that_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"data.path = '.*a.txt': {message}"):
        build_source(TextConfig(path=str(tmp_path / "a.txt")), "train")


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="data.source = 'jsonll'.*easy_vqa.*did you mean 'jsonl'"):
        build_source(DataConfig(source="jsonll"), "train")
