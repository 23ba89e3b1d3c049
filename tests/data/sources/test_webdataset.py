"""Tar shards: what ``tarfile`` writes is found again by headers alone, manifests are believed and checked, damage is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config import TrainConfig
from kempnerforge.data import Encoder, Sample, SampleError, Source, Text, build_loader
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.shards import Shard, ShardError, index_tar
from kempnerforge.data.sources import build_source
from kempnerforge.data.sources.shard_list import expand_braces, list_shards
from kempnerforge.data.sources.webdataset import WebDatasetConfig
from kempnerforge.data.text.interleave import LABELS
from tests.data import samples

Png = Callable[..., bytes]
Content = bytes | str | dict[str, Any] | list[Any]


def built(path: Path | str, split: str = "train", **cfg: Any) -> Source:
    return samples.built(WebDatasetConfig(path=str(path), **cfg), split)


def write(path: Path, members: dict[str, Content] | list[tuple[str, Content]], layout: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(first: int, number: int, image: bytes) -> dict[str, Content]:
    return {
        f"{k:04d}.{kind}": image if kind == "webp" else f"caption {k}\n" for k in range(first, first + number) for kind in ("webp", "txt")
    }


@pytest.fixture
def foundry(tmp_path: Path, png: Png) -> Path:
    """Four shards of 8 with a manifest, as VLA Foundry lays them out; the names end in .tar in half of its lines."""
    lines = []
    for k in range(4):
        write(tmp_path / "data" / f"shard-{k:04d}.tar", shard(8 * k, 8, png((k, 0, 0))))
        lines.append(json.dumps({"shard": f"shard-{k:04d}" + ".tar" * (k % 2), "num_sequences": 8}))
    (tmp_path / "data" / "manifest.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path / "data" / "manifest.jsonl"


# ---- samples ------------------------------------------------------------------------------------------------------------------------------


def test_a_manifest_with_and_without_tar(foundry: Path, png: Png) -> None:
    source = built(foundry)
    assert len(source) == 32
    assert source[11] == Sample("shard-0001.tar:0011", (png((1, 0, 0)),), (Text("", "caption 11"),))
    assert [source[k].texts[0].answer for k in range(32)] == [f"caption {k}" for k in range(32)]
    assert [source.length(k) for k in (0, 31)] == [10, 11] and source.num_images(3) == 1
    with pytest.raises(IndexError):
        source[32]


def test_shards_are_read_when_they_are_needed(foundry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    module = "kempnerforge.data.sources.webdataset.index_tar"
    monkeypatch.setattr(module, lambda path: read.append(os.path.basename(path)) or index_tar(path))
    source = built(foundry)
    assert read == ["shard-0000.tar"]
    assert source[25].id == source[24].id.replace("24", "25") == "shard-0003.tar:0025"
    assert read == ["shard-0000.tar", "shard-0003.tar"]
    copy = pickle.loads(pickle.dumps(source))  # as loader workers get it
    assert [copy[k] for k in range(32)] == [source[k] for k in range(32)]


@pytest.mark.parametrize(
    "path",
    ["{}", "{}/*.tar", "{}/shard-000[0-3].tar", "{}/shard-{{0000..0003}}.tar", "{}/shard-0000.tar::{}/shard-{{0001..0002}}.tar::{}/*3.tar"],
)
def test_shards_without_a_manifest(foundry: Path, path: str) -> None:
    path = path.replace("{}", str(foundry.parent)).replace("{{", "{").replace("}}", "}")
    assert built(path)[0] == built(foundry)[0]
    assert [built(path)[k].id for k in range(32)] == [built(foundry)[k].id for k in range(32)]


def test_ranges() -> None:
    assert list(expand_braces("a{08..11}b")) == ["a08b", "a09b", "a10b", "a11b"]
    assert list(expand_braces("{0..1}/{2..3}")) == ["0/2", "0/3", "1/2", "1/3"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]


def test_texts_are_read_without_images(foundry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = built(foundry)
    sizes = []
    read = Shard.read
    monkeypatch.setattr(Shard, "read", lambda self, member: sizes.append(member.size) or read(self, member))
    assert [source.texts(k)[0].answer for k in (3, 30)] == ["caption 3", "caption 30"]
    assert list(source.corpus())[1::2][:2] == ["caption 0", "caption 1"]
    assert max(sizes) < 20


def test_what_is_held_out(foundry: Path) -> None:
    assert build_source(WebDatasetConfig(path=str(foundry)), "test") is None
    held_out = built(foundry, "test", eval_path=str(foundry.parent / "shard-0003.tar"))
    assert len(held_out) == 8 and held_out[0].id == "shard-0003.tar:0024"


def test_fields_of_json(tmp_path: Path, png: Png) -> None:
    red = png((255, 0, 0))
    fields = {
        "caption": "ein Bild 🙂",
        "meta": {"title": {"en": "a picture"}},
        "texts": [{"prompt": "what?", "answer": "that"}, {"answer": "this"}],
    }
    path = write(
        tmp_path / "a.tar", {"x.json": fields, "x.png": red, "x.txt": "q?", "y.json": [{"prompt": "a", "answer": "b"}], "y.png": red}
    )
    read = lambda **cfg: built(path, ignore_columns=["*"], **cfg)
    assert read(answer_column="json.caption")[0].texts == (Text("", "ein Bild 🙂"),)
    assert read(answer_column="json.meta.title.en", prompt_column="txt")[0].texts == (Text("q?", "a picture"),)
    assert read(texts_column="json.texts")[0].texts == (Text("what?", "that"), Text("", "this"))
    assert read(texts_column="json")[1].texts == (Text("a", "b"),)
    assert read(answer_column="txt", image_column="")[0].images == ()
    with pytest.raises(ValueError, match='a.tar: key "txt" is read by nothing .*; key "json.meta" is .*; key "json.texts" is'):
        built(path, answer_column="json.caption")
    for cfg, index, message in (
        ({"answer_column": "json.meta.name"}, 0, "a.tar:x: .json has no field 'meta.name'"),
        ({"answer_column": "json.caption.de"}, 0, ".json has no field 'caption.de'"),
        ({"answer_column": "json.meta"}, 0, "must be a string, not dict"),
        ({"answer_column": "json.caption"}, 1, "a.tar:y: .json has no field 'caption'"),
        ({"answer_column": "txt"}, 1, "a.tar:y: has no .txt; members: json, png"),
    ):
        with pytest.raises(SampleError, match=message):
            read(**cfg)[index]


def test_images_of_a_sample(tmp_path: Path, png: Png) -> None:
    images = [png((k, 0, 0)) for k in range(11)]
    many = [(f"m.{k}.png", image) for k, image in enumerate(images)]
    path = write(
        tmp_path / "a.tar", [("a.JPG", images[1]), ("a.png", images[2]), ("a.txt", "a"), *many[::-1], ("m.txt", "b"), ("n.txt", "c")]
    )
    source = built(path)
    assert source[0].images == (images[1],)  # the first extension of the list that is there
    assert source[1].images == tuple(images)  # by number, not by name
    assert [source.num_images(k) for k in range(3)] == [1, 11, 0]
    with pytest.raises(SampleError, match="a.tar:n: has no .jpg or .jpeg or .png or .webp; members: txt"):
        source[2]


def test_pairs_may_stand_apart_or_be_incomplete(tmp_path: Path, png: Png) -> None:
    red = png((255, 0, 0))
    members = [
        ("1.txt", "a"),
        ("2.txt", "b"),
        ("3.txt", "c"),
        ("2.png", red),
        ("1.png", red),
        ("4.png", red),
        ("5.txt", " \n"),
        ("5.png", red),
    ]
    source = built(write(tmp_path / "a.tar", members))
    assert len(source) == 5
    assert [source[k].texts[0].answer for k in range(2)] == ["a", "b"]
    for index, message in ((2, "a.tar:3: has no .jpg"), (3, "a.tar:4: has no .txt"), (4, "a.tar:5: .*empty")):
        with pytest.raises(SampleError, match=message):
            source[index]
    twice = built(write(tmp_path / "b.tar", [("1.txt", "a"), ("1.png", red), ("1.txt", "b"), ("2.txt", "c"), ("2.png", red)]))
    with pytest.raises(SampleError, match="b.tar:1: two members .txt"):
        twice[0]
    assert twice[1].texts == (Text("", "c"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", ".txt is not UTF-8 at byte 0"), (b"x" * 100, r".txt has 100 bytes, more than 64")],
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes, message: str, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kempnerforge.data.sources.webdataset.MAX_TEXT", 64)
    source = built(write(tmp_path / "a.tar", {"1.txt": content, "1.png": png((1, 2, 3))}))
    with pytest.raises(SampleError, match=message):
        source[0]


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff"])
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    source = built(write(tmp_path / "a.tar", {"1.json": content}), answer_column="json.caption", image_column="")
    with pytest.raises(SampleError, match=r"a.tar:1: .json:? (is )?not"):
        source[0]


def test_a_huge_image_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kempnerforge.data.sources.webdataset.MAX_IMAGE", 1000)
    source = built(write(tmp_path / "a.tar", {"1.txt": "a", "1.png": bytes(1001)}))
    with pytest.raises(SampleError, match=r"a.tar:1: .png has 1001 bytes, more than 1000"):
        source[0]


def test_rows_are_made_of_them(foundry: Path, make_encoder: Callable[..., Encoder]) -> None:
    encoder, source = make_encoder(), built(foundry)
    assert [len(encoder.encode(source[k], 0).images) for k in (0, 31)] == [1, 1]
    row = encoder.encode(source[9], 0)
    *trained, end = row.table[LABELS][row.table[LABELS] != IGNORE].tolist()
    assert encoder.tokenizer.decode(trained) == "caption 9" and end == encoder.tokenizer.eos_id


@pytest.mark.parametrize("batching", ["group", "pack"])
def test_a_run_goes_on_in_the_middle_of_a_shard(foundry: Path, make_encoder: Callable[..., Encoder], batching: str) -> None:
    third = foundry.parent / "shard-0002.tar"
    third.write_bytes(third.read_bytes()[:3000])

    def batches(start: int, steps: int, workers: int = 0) -> list[tuple[Any, ...]]:
        encoder = make_encoder(batching=batching, num_workers=workers)
        loader = build_loader(
            built(foundry), encoder, cfg=encoder.cfg, layout=encoder.layout, train_cfg=TrainConfig(batch_size=2), start_step=start
        )
        return [(batch.input_ids.tolist(), batch.sample_names, batch.skipped) for batch in islice(loader, steps)]

    whole = batches(0, 8)
    names = [name for _, found, _ in whole for name in found]
    assert len({name.split(":")[0] for name in names}) == 3 and not any("shard-0002" in name for name in names)
    assert batches(5, 3) == batches(5, 3, workers=2) == whole[5:]
    skipped = [reason for _, _, found in whole for _, reason in found]
    if batching == "group":
        assert skipped and all("shard-0002.tar: cut off" in reason for reason in skipped)


# ---- names ----------------------------------------------------------------------------------------------------------------------------------

NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=130)
TREE = st.lists(NAME, max_size=2).map(lambda parts: "".join(f"{part}/" for part in parts))


def expected(names: list[str]) -> dict[str, set[str]]:
    """Keys and extensions, by the words of the documentation."""
    found: dict[str, set[str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        key, _, extension = base.partition(".")
        if key and extension:
            found.setdefault(os.path.join(folder, key), set()).add(extension.lower())
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.tuples(TREE, NAME, st.sampled_from(["", ".txt", ".json", ".PNG"]), st.integers(0, 1100)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_member_is_found(tmp_path: Path, made: list[tuple[str, str, str, int]], layout: int) -> None:
    contents = {f"{folder}{name}{extension}".rstrip("/"): bytes([k]) * size for k, (folder, name, extension, size) in enumerate(made)}
    try:
        path = write(tmp_path / "any.tar", dict(contents), layout)
    except ValueError:
        assert layout == tarfile.USTAR_FORMAT  # which has no room for long names
        return
    with tarfile.open(path) as tar:
        names = [member.name for member in tar]
    shard = index_tar(str(path))
    found = {shard.key(k): shard for k in range(len(shard))}
    assert list(found) == list(expected(names))
    if len(set(names)) == len(names):
        for k, (key, extensions) in enumerate(expected(names).items()):
            stored = [name for name in names if name in contents and expected([name]) and next(iter(expected([name]))) == key]
            if len(extensions) == len(stored):
                members = shard.members(k)
                assert members.keys() == extensions
                assert {shard.read(member) for member in members.values()} == {contents[name] for name in stored}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, layout: int) -> None:
    key = "/".join(["folder" * 8] * 3) + "/0001"
    index = index_tar(str(write(tmp_path / "a.tar", {f"{key}.txt": "a", f"{key}.seg.png": b"b", "2.txt": "c"}, layout)))
    assert [index.key(k) for k in range(2)] == [key, "2"]
    assert {name: index.read(member) for name, member in index.members(0).items()} == {"txt": b"a", "seg.png": b"b"}


def test_a_name_is_no_path(tmp_path: Path, png: Png) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "data" / "a.tar"
    members: list[tuple[str, Content]] = []
    for name in ("../secret", "/etc/passwd", "a/../../b", "C:\\x"):
        members += [(f"{name}.txt", f"about {name}"), (f"{name}.png", png((1, 1, 1)))]
    source = built(write(path, members))
    assert [source[k].texts[0].answer for k in range(4)] == [f"about {name}" for name in ("../secret", "/etc/passwd", "a/../../b", "C:\\x")]
    with tarfile.open(path, "a") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "link.txt"),
            (tarfile.LNKTYPE, "hard.txt"),
            (tarfile.DIRTYPE, "dir.txt"),
            (tarfile.FIFOTYPE, "pipe.txt"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.txt"
            tar.addfile(info)
        for name in ("._0001.txt", ".hidden", "README"):
            tar.addfile(tarfile.TarInfo(name))
    assert len(index_tar(str(path))) == 4  # links, directories, pipes and nameless files are no samples


# ---- damage ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_that_is_cut_off_anywhere_is_named(tmp_path: Path, layout: int) -> None:
    whole = write(tmp_path / "whole.tar", {"1.txt": "a" * 700, f"{'long' * 50}.txt": "b" * 600}, layout).read_bytes()
    end = len(whole.rstrip(b"\0"))
    used = -(-end // 512) * 512
    for size in [*range(0, used, 256), used]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"cut.tar: (cut off|damaged)"):
            index_tar(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[: used + 512])
    assert len(index_tar(str(tmp_path / "cut.tar"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"\x1f\x8b" + data, "compressed with gzip; unpack it"),
        (lambda data: b"(\xb5/\xfd" + data, "compressed with zstd; unpack it"),
        (lambda data: b"not a tar" * 200, "damaged at byte 0"),
        (lambda data: data[:1024] + b"x" + data[1025:], "damaged at byte 1024"),
        (lambda data: data[:124] + b"z" * 12 + data[136:], "damaged at byte 0"),
        (lambda data: data[:124] + b"77777777777\0" + data[136:148] + b"?" * 8 + data[156:], "damaged at byte 0"),
        (lambda data: b"", "cut off: 0 bytes"),
        (lambda data: data[:1536], "cut off: '1.png' ends at byte 1537, the file has 1536"),
    ],
)
def test_a_shard_that_is_damaged_is_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = write(tmp_path / "a.tar", {"1.txt": "a", "1.png": "b"})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"a.tar: {message}"):
        built(path)


def test_a_header_without_end_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ShardError, match="a.tar: damaged at byte 0: a header of more than"):
        index_tar(str(tmp_path / "a.tar"))


def test_a_later_shard_that_is_damaged_costs_its_samples(foundry: Path) -> None:
    third = foundry.parent / "shard-0002.tar"
    third.write_bytes(third.read_bytes()[:3000])
    source = built(foundry)
    for index in (16, 23):
        with pytest.raises(SampleError, match=r"shard-0002.tar\[\d\]: .*shard-0002.tar: cut off"):
            source[index]
        assert source.length(index) == source.num_images(index) == 0
    assert [source[k].texts[0].answer for k in (15, 24)] == ["caption 15", "caption 24"]
    with pytest.raises(ValueError, match="shard-0002.tar: cut off"):
        built(foundry.parent)  # no manifest: all are read at the start


def test_a_shard_that_changes_costs_its_samples(foundry: Path) -> None:
    source = built(foundry)
    source[0]
    (foundry.parent / "shard-0000.tar").write_bytes(b"short")
    with pytest.raises(SampleError, match="shard-0000.tar:0000: no longer readable"):
        source[0]


def test_a_changed_shard_changes_the_fingerprint(foundry: Path, png: Png) -> None:
    before = built(foundry).fingerprint()
    assert built(foundry).fingerprint() == before
    write(foundry.parent / "shard-0003.tar", shard(24, 8, png((3, 0, 0))) | {"0024.txt": "x" * 2000})
    assert built(foundry).fingerprint() != before


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (["0.png", "1.jpg"], ["0.png", "1.jpg"]),
        (["png", "jpg"], ["jpg"]),  # the first of image_column counts
        (["0.png", "0.jpg", "1.png"], ["0.jpg", "1.png"]),
        (["png", "0.png", "1.png"], "has .png and .0.png: either one image or numbered ones"),
        (["jpg", "0.png"], "has .jpg and .0.png"),
    ],
)
def test_no_image_of_a_sample_is_passed_over(names: list[str], seen: list[str] | str, tmp_path: Path, png: Png) -> None:
    pictures = {name: png((k, 0, 0)) for k, name in enumerate(names)}
    write(tmp_path / "a.tar", {"0.txt": "red", **{f"0.{name}": content for name, content in pictures.items()}})
    source = built(tmp_path / "a.tar")
    if isinstance(seen, str):
        with pytest.raises(SampleError, match=seen):
            source[0]
    else:
        assert list(source[0].images) == [pictures[name] for name in seen]


# ---- manifests ------------------------------------------------------------------------------------------------------------------------------


def test_a_count_that_is_wrong_names_shard_and_numbers(foundry: Path) -> None:
    lines = foundry.read_text().splitlines()
    foundry.write_text("\n".join([lines[0].replace("8}", "9}"), *lines[1:]]))
    with pytest.raises(ValueError, match="shard-0000.tar: 8 samples, but its manifest says num_sequences = 9"):
        built(foundry)
    foundry.write_text("\n".join([*lines[:3], lines[3].replace("8}", "7}")]))
    source = built(foundry)
    assert len(source) == 31
    with pytest.raises(SampleError, match="shard-0003.tar: 8 samples, but its manifest says num_sequences = 7"):
        source[30]


def test_shards_of_plain_text(tmp_path: Path) -> None:
    """VLA Foundry's ``text_untokenized``: members of the name .json with the text itself, or with JSON; its manifest counts sequences."""
    members: dict[str, Content] = {"a.json": b"Once upon\n", "b.json": b"2024\n", "c.json": b'{"text": "a field"}', "d.json": b"{not JSON"}
    write(tmp_path / "shard-0.tar", members)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"shard": "shard-0", "num_sequences": 2048}')
    read = {"answer_column": "json", "image_column": ""}
    with pytest.raises(ValueError, match="4 samples, but its manifest says num_sequences = 2048"):
        built(manifest, **read)
    source = built(manifest, manifest_counts=False, **read)
    assert len(source) == 4 and [source.num_images(k) for k in range(4)] == [0] * 4
    assert [source[k].texts[0].answer for k in (0, 1, 3)] == ["Once upon", "2024", "{not JSON"]
    with pytest.raises(SampleError, match="must be a string, not dict"):
        source[2]
    assert built(manifest, manifest_counts=False, **read | {"answer_column": "json.text"})[2].texts[0].answer == "a field"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "manifest.jsonl, line 2: not JSON"),
        ("[]", 'line 2: must be like {"shard"'),
        ('{"shard": "shard-0001"}', "line 2: must be like"),
        ('{"shard": "shard-0001", "num_sequences": true}', "line 2: must be like"),
        ('{"shard": "shard-0001", "num_sequences": -1}', "line 2: must be like"),
        ('{"shard": "shard-0009", "num_sequences": 8}', "line 2: no such shard: .*shard-0009.tar"),
        ('{"shard": "../shard-0001", "num_sequences": 8}', "must be a path below the manifest's directory"),
        ('{"shard": "/data/shard-0001.tar", "num_sequences": 8}', "must be a path below"),
        ('{"shard": "https://example.org/shard-0001", "num_sequences": 8}', "must be a path below"),
        ('{"shard": "", "num_sequences": 8}', "must be a path below"),
    ],
)
def test_lines_of_a_manifest_that_are_refused(foundry: Path, line: str, message: str) -> None:
    foundry.write_text(foundry.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(ValueError, match=message):
        list(list_shards(str(foundry), "data.path"))


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, message in (
        ("nowhere/*.tar", r"data.path = 'nowhere/\*.tar': no tars there"),
        ("nowhere.tar", "data.path: no such shard: nowhere.tar"),
        (str(tmp_path), "no tars there"),
        ("nowhere.jsonl", "data.path = 'nowhere.jsonl': No such file"),
        (str(tmp_path / "empty.jsonl"), "lists no shards"),
    ):
        with pytest.raises(ValueError, match=message):
            built(path)


def test_columns_that_no_sample_has(tmp_path: Path, png: Png) -> None:
    path = write(tmp_path / "a.tar", {"1.txt": "a", "1.gif": png((1, 1, 1))})
    with pytest.raises(ValueError, match=r"a.tar: no column 'jpg;.*' for data.image_column; columns: gif, txt"):
        built(path)
    with pytest.raises(ValueError, match=r"a.tar: no column 'json.caption' for data.answer_column; columns: gif, txt"):
        built(path, image_column="gif", answer_column="json.caption")
    with pytest.raises(ValueError, match="root = 'x'"):
        WebDatasetConfig(path="a.tar", root="x")


@pytest.mark.parametrize("size", [-1536, -512])
def test_a_size_below_zero_is_refused(tmp_path: Path, size: int) -> None:
    """An extended header may say any size; tarfile believes it."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        info = tarfile.TarInfo("b.txt")
        info.pax_headers = {"size": str(size)}
        tar.addfile(info)
    with pytest.raises(ShardError, match=r"a.tar: damaged at byte \d+: a size below 0"):
        index_tar(str(path))


def test_a_range_that_counts_down_is_refused() -> None:
    with pytest.raises(ValueError, match="counts down"):
        list(expand_braces("x/{127..000}.tar"))
