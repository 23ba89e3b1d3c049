"""Streams: rows in order whatever is asked for, in bounded memory, the same for any number of processes."""

from __future__ import annotations

import gc
import json
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Batch, Encoder, SampleError, Source, build_loader, build_source
from kempnerforge.data.sources.hf_stream import HFStreamConfig
from kempnerforge.data.stream import BLOCK, RowStream
from tests.data.samples import built

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_parquet(folder: Path, sizes: list[int], image: bytes, row_group: int = 50, junk: int = 0) -> str:
    """Files of so many rows; the answers count on from file to file, up to a thousand."""
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string"), "unread": datasets.Value("string")})
    first = 0
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        rows = [
            {"image": {"bytes": image + os.urandom(junk), "path": None}, "answer": f"a{k % 1000}", "unread": "x" * 50}
            for k in range(first, first + size)
        ]
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"part-{number:03}.parquet", row_group_size=row_group)
        first += size
    return str(folder)


def streamed(**keys: Any) -> HFStreamConfig:
    return HFStreamConfig(**{"ignore_columns": ["unread"]} | keys)


def answer(source: Source, index: int) -> Any:
    return source[index].texts[0].answer


# ---- rows by number -----------------------------------------------------------------------------------------------------


class Counted:
    """Tables of uneven size over numbers; counts what is read."""

    def __init__(self, rows: int, begins: tuple[int, ...] = (0,)) -> None:
        self.rows, self.begins, self.opened, self.read = rows, begins, 0, 0

    def __call__(self, row: int) -> tuple[int, Iterator[Any]]:
        self.opened += 1
        begin = max(b for b in self.begins if b <= row)
        return begin, self._tables(begin)

    def _tables(self, row: int) -> Iterator[Any]:
        while row < self.rows:
            end = min(self.rows, row + 1 + row * 7 % 150)
            self.read += end - row
            yield pa.table({"k": list(range(row, end))})
            row = end


@given(rows=st.integers(1, 700), begins=st.sets(st.integers(1, 600), max_size=2), keep=st.integers(1, 300), asked=st.data())
@settings(max_examples=25, deadline=None)
def test_any_row_in_any_order(rows: int, begins: set[int], keep: int, asked: st.DataObject) -> None:
    stream = RowStream(Counted(rows, (0, *(b for b in begins if b < rows))), keep)
    for index in asked.draw(st.lists(st.integers(0, rows - 1), max_size=12)):
        assert stream.row(index) == {"k": index}
    with pytest.raises(SampleError, match=f"the stream ends after {rows} rows"):
        stream.row(rows)


def test_reading_on_opens_once_and_keeps_what_was_read_lately() -> None:
    numbers = Counted(2000)
    stream = RowStream(numbers, keep=4 * BLOCK)
    stream.row(0)
    for index in range(2000 - 3 * BLOCK):
        assert stream.row(index + 3 * BLOCK)["k"] - stream.row(index)["k"] == 3 * BLOCK
    assert numbers.opened == 1 and numbers.read == 2000
    stream.row(0)
    assert numbers.opened == 2


def test_a_file_that_breaks_off_breaks_single_samples() -> None:
    def open_at(row: int) -> tuple[int, Iterator[Any]]:
        def tables() -> Iterator[Any]:
            yield pa.table({"k": list(range(100))})
            raise OSError("disk on fire")

        return 0, tables()

    stream = RowStream(open_at, 10)
    assert stream.row(60) == {"k": 60}
    for _ in range(2):
        with pytest.raises(SampleError, match="cannot be read beyond row 64: disk on fire"):
            stream.row(64)


# ---- the source ---------------------------------------------------------------------------------------------------------


def test_parquet_files_in_order_with_encoded_images(tmp_path: Path, png: Callable[..., bytes]) -> None:
    image = png((1, 2, 3))
    folder = write_parquet(tmp_path / "rows", [130, 1, 70], image)
    for path in (folder, f"{folder}/*.parquet", f"{folder}/**/*"):
        source = built(streamed(path=path, shuffle_buffer=20))
        assert len(source) == 201
        assert [answer(source, k) for k in (0, 129, 130, 131, 200)] == ["a0", "a129", "a130", "a131", "a200"]
        assert source[5].images == (image,) and source[5].id == f"{path}[5]"
        assert source.length(7) == 2 and source.num_images(7) == 1
        assert source.peers(45) == range(40, 60) and source.peers(200) == range(200, 201)
    copy: Source = pickle.loads(pickle.dumps(source))
    assert answer(copy, 3) == "a3"
    assert len(built(streamed(path=folder, num_samples=150))) == 150


def test_a_resumed_stream_opens_the_row_group_that_it_needs(
    tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_parquet(tmp_path / "rows", [100, 100, 100], png((1, 2, 3)), row_group=30)
    source = built(streamed(path=folder))
    opened: list[Any] = []
    kind = pq.ParquetFile
    read = kind.iter_batches
    monkeypatch.setattr(kind, "iter_batches", lambda *args, **kw: opened.append(kw["row_groups"]) or read(*args, **kw))
    assert answer(source, 265) == "a265"
    assert opened == [[1, 2, 3]]  # block 4 begins with row 256, the third file with row 200


def test_jsonl_lines_fail_one_by_one(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(png((9, 9, 9)))
    good = json.dumps({"image": "a.png", "answer": "grün"}, ensure_ascii=False)
    lines = [
        good,
        "",
        '{"image": "a.png", "answ',
        '{"image": "a.png"}',
        '{"image": "../x.png", "answer": "y"}',
        '{"image": null, "answer": {}}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n" + b'{"image": null, "answer": "\xff"}\n' + good.encode())
    source = built(streamed(path=str(path), num_samples=8))
    assert source[0].texts[0].answer == source[6].texts[0].answer == "grün"
    assert source[0].images == (tmp_path / "a.png",)
    reasons = ("not JSON", "has no column 'answer'", "leaves the data root", "must be a string, not dict", "not UTF-8", "ends after 7 rows")
    for index, reason in zip((1, 2, 3, 4, 5, 7), reasons, strict=True):
        with pytest.raises(SampleError, match=reason):
            source[index]
        assert source.length(index) >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "{tmp}/none.parquet"}, "no such files"),
        ({"path": "{tmp}/*.parquet"}, "no such files"),
        ({"path": "{tmp}/rows.txt"}, "files end in .txt; .* end in one of .parquet, .jsonl"),
        ({"path": "{tmp}/mixed"}, "files end in .jsonl, .parquet"),
        ({"path": "{tmp}/mixed/broken.parquet"}, "cannot read the stream .*broken.parquet"),
        ({"num_samples": 0}, "data.num_samples = 0: .* does not say how many rows it has; say it"),
        ({"answer_column": "label"}, "no column 'label' for data.answer_column; columns: answer"),
        ({"eval_split": "test", "path": "{tmp}/lines"}, "files have no splits; name held-out files in eval_path"),
        ({"eval_split": "test"}, "is a file and has no splits"),
        ({"eval_path": "{tmp}/rows.jsonl"}, "data.eval_num_samples = 0: .* does not say"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"answer": "x"}\n' * 3)
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text('{"answer": "x"}')
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    (tmp_path / "mixed" / "broken.parquet").write_text("PAR?")
    keys = {"path": "{tmp}/rows.jsonl", "image_column": "", "num_samples": 3} | change
    cfg = streamed(**{key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in keys.items()})
    split = "test" if change.keys() & {"eval_split", "eval_path"} else "train"
    with pytest.raises(ValueError, match=message):
        build_source(cfg, split)


def test_more_rows_than_there_are_and_urls_are_refused(tmp_path: Path, png: Callable[..., bytes]) -> None:
    folder = write_parquet(tmp_path / "rows", [30], png((1, 2, 3)))
    with pytest.raises(ValueError, match="data.num_samples = 31: .* has 30 rows"):
        build_source(streamed(path=folder, num_samples=31), "train")
    with pytest.raises(ValueError, match="URLs are not fetched"):
        streamed(path="https://example.org/a.parquet")


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network the hub is played by a generator."""
    asked = []

    def load_dataset(path: str, split: str, streaming: bool) -> Any:
        asked.append((path, split, streaming))
        stream = datasets.IterableDataset.from_generator(lambda: ({"answer": f"{split}{k}", "unread": k} for k in range(100)))
        stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=100)})
        return stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = streamed(path="someone/something", image_column="", eval_split="test", eval_num_samples=10)
    source, held_out = built(cfg), built(cfg, "test")
    assert (len(source), len(held_out)) == (100, 10)
    assert (answer(source, 99), answer(source, 3), answer(held_out, 3)) == ("train99", "train3", "test3")
    assert set(asked) == {("someone/something", "train", True), ("someone/something", "test", True)}


# ---- the loader ---------------------------------------------------------------------------------------------------------


def batches(source: Source, encoder: Encoder, *, size: int = 8, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
    train_cfg = TrainConfig(batch_size=size, seed=3)
    keys = {"cfg": encoder.cfg, "layout": encoder.layout, "train_cfg": train_cfg}
    return iter(build_loader(source, encoder, rank=rank, world=world, start_step=start, **keys))


@pytest.mark.parametrize("batching", ["pad", "group", "pack"])
def test_every_process_sees_its_share_of_one_stream(
    tmp_path: Path, png: Callable[..., bytes], make_encoder: Callable[..., Encoder], batching: str
) -> None:
    """Two epochs of three files, begun anywhere, also in the middle of a file, with workers and ranks."""
    cfg = streamed(path=write_parquet(tmp_path / "rows", [130, 9, 61], png((1, 2, 3))), shuffle_buffer=40)
    steps = 6 if batching == "pack" else 50

    def stream(world: int = 1, workers: int = 0, start: int = 0, stop: int = steps) -> list[list[str]]:
        encoder = make_encoder(batching=batching, num_workers=workers)
        ranks = [batches(built(cfg), encoder, rank=rank, world=world, start=start) for rank in range(world)]
        return [[name for rank in ranks for name in next(rank).sample_names] for _ in range(start, stop)]

    whole = stream()
    if batching != "pack":
        assert sorted(name for names in whole[:25] for name in names) == sorted(f"{cfg.path}[{k}]" for k in range(200))
    assert stream(world=2) == whole
    assert stream(workers=2, start=2, stop=5) == whole[2:5]
    assert stream(start=steps - 2) == whole[-2:]


def test_bad_rows_are_replaced_from_what_is_in_memory(tmp_path: Path, make_encoder: Callable[..., Encoder]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"answer": "a{k}"}}\n' if k % 10 else "{oops\n" for k in range(400)))
    source = built(streamed(path=str(path), image_column="", num_samples=400, shuffle_buffer=20))
    encoder = make_encoder(image_size=0, batching="pad")
    for step, batch in zip(range(50), batches(source, encoder), strict=False):
        assert {number // 20 for number in numbers(batch)} <= {step * 8 // 20, (step * 8 + 7) // 20}
        assert all("not JSON" in reason for _, reason in batch.skipped)


@pytest.fixture(scope="module")
def hundred_mib(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_parquet(tmp_path_factory.mktemp("large") / "rows", [2500] * 4, b"", row_group=100, junk=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ten_thousand_samples_stay_flat_in_memory(hundred_mib: str, make_encoder: Callable[..., Encoder], workers: int) -> None:
    """100 MB of pictures are read by each process; they are not decoded."""
    encoder = make_encoder(image_size=0, batching="pad", num_workers=workers)
    stream = batches(built(streamed(path=hundred_mib, shuffle_buffer=50)), encoder, size=50)
    seen = [numbers(batch) for batch in islice(stream, 40)]
    gc.collect()
    pa.default_memory_pool().release_unused()
    before = memory()
    seen += [numbers(batch) for batch in islice(stream, 160)]
    assert sorted(number for batch in seen for number in batch) == list(range(10_000))
    assert memory() - before < 10 * (workers + 1)


def numbers(batch: Batch) -> list[int]:
    return [int(name.split("[")[1][:-1]) for name in batch.sample_names]


def memory() -> float:
    """MiB that this process and its children have."""
    pages = 0
    for pid in (os.getpid(), *map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())):
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_window_that_is_too_small_for_a_step_is_refused(
    tmp_path: Path, png: Callable[..., bytes], make_encoder: Callable[..., Encoder]
) -> None:
    source = built(streamed(path=write_parquet(tmp_path / "rows", [200], png((1, 2, 3))), shuffle_buffer=20))
    next(batches(source, make_encoder(batching="pad"), size=64))
    with pytest.raises(ValueError, match="data.shuffle_buffer = 20: batching = 'group' rearranges 64 samples at once; use at least 32"):
        batches(source, make_encoder(batching="group"), size=64)
    with pytest.raises(ValueError, match="data.shuffle_buffer = 20: batching = 'pack' rearranges [0-9]+ samples at once"):
        batches(source, make_encoder(batching="pack"), size=64)


def test_files_of_other_splits_are_not_trained_on(tmp_path: Path, png: Callable[..., bytes]) -> None:
    write_parquet(tmp_path, [4, 4], png((1, 2, 3)))
    for number, file in enumerate(sorted(tmp_path.glob("*.parquet"))):
        file.rename(tmp_path / f"{('train', 'test')[number]}-00000.parquet")
    with pytest.raises(ValueError, match="test-00000.parquet is not of split 'train', as train-00000.parquet is; give a pattern"):
        built(streamed(path=str(tmp_path)))
    assert len(built(streamed(path=f"{tmp_path}/train-*.parquet", prompt_column=""))) == 4
