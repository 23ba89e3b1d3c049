"""Junk in every kind of file that somebody else may have written: it is refused, or used as it says; never a traceback, never a hang.

``pytest tests/faults/test_fuzz.py -m slow --fuzz 200`` tries so many mutations of each kind. What goes wrong is printed with its seed.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import tarfile
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import tomli_w

from kempnerforge.checkpoint import resolve
from kempnerforge.checkpoint.manifest import CheckpointError, verify
from tests.checkpoint.helpers import reseal
from tests.data.text.chat_templates import FAMILIES
from tests.faults.conftest import Observe
from tests.interop.tiny_vlms import SPECIAL, save, write_tokenizer
from tests.training.tiny import CONFIG, Ended, assert_same_tensors, call, make_job, rows_of, tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]

ODD: list[Any] = [
    None, True, 0, -1, 1, 3, 2**40, 2**63 - 1, -(2**63), 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../..", "\x1b[31m", "[bold]",
    "a" * 10_000, "null", [], [0], [[]], {}, {"a": 1}, "/dev/zero", "~", "$HOME",
]  # fmt: skip
SECONDS = 60
"""After which a command hangs. Two steps of training take one."""


# ---- mutations -------------------------------------------------------------------------------------------------------


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a part gone, doubled, moved or overwritten; once or twice."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(max(1, len(found)))
        size = rng.choice([1, 2, 16, max(1, len(found) // 3)])
        match rng.randrange(6):
            case 0 if found:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = found[at : at + size]
            case 3:
                found[at:at] = rng.randbytes(size)
            case 4:
                found[at : at + size] = rng.randbytes(size)
            case _:
                del found[at:]
    return bytes(found)


def spoil_value(value: Any, rng: random.Random) -> Any:
    """One value somewhere in ``value`` replaced by an odd one, or a key renamed, doubled or gone."""
    places: list[tuple[Any, Any]] = []

    def collect(here: Any) -> None:
        for key in here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ():
            places.append((here, key))
            collect(here[key])

    value = json.loads(json.dumps(value))
    collect(value)
    if not places:
        return rng.choice(ODD)
    here, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del here[key]
        case 1 if isinstance(here, dict):
            here[f"{key}{rng.choice('sx_')}"] = here.pop(key)
        case 2 if isinstance(here[key], int | float) and not isinstance(here[key], bool):
            here[key] = here[key] * rng.choice([-1, 0, 2, 1000, 1 << 40])
        case _:
            here[key] = rng.choice(ODD)
    return value


# ---- kinds of files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: what is there before, in a folder that all mutations of it share.
        spoil: a mutation of it in a folder of its own: the shared folder, that one, random numbers. It returns the command.
        right: after exit code 0: whether what came of it is what the file says.
    """

    make: Callable[[Path], object]
    spoil: Callable[[Path, Path, random.Random], list[object]]
    right: Callable[[Path, Path], bool] = lambda base, folder: True


def toml(base: Path, folder: Path, rng: random.Random) -> list[object]:
    text = CONFIG.replace("{folder}", str(base))
    if rng.random() < 0.3:
        (folder / "job.toml").write_bytes(spoil_bytes(text.encode(), rng))
    else:
        table = _without_null(spoil_value(tomllib.loads(text), rng))
        (folder / "job.toml").write_text(tomli_w.dumps(table if isinstance(table, dict) else {}), encoding="utf-8", errors="replace")
    return ["train", folder / "job.toml", f"--run.dir={folder}/run", "--train.max_steps=2", "--eval.at_end=false"]


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(entry) for key, entry in value.items() if entry is not None}
    return [_without_null(entry) for entry in value if entry is not None] if isinstance(value, list) else value


def trained(base: Path) -> None:
    assert call("train", make_job(base), "--scheduler.name=constant", "--train.max_steps=2", "--eval.at_end=false").code == 0


def checkpoint(base: Path, folder: Path, rng: random.Random) -> list[object]:
    """With checksums that are right, so that only what is in it can be wrong."""
    shutil.copytree(base / "run", folder / "run")
    path = resolve(folder / "run")
    if rng.random() < 0.5:
        manifest = verify(path)
        (path / "manifest.json").write_bytes(_encoded(manifest, spoil_value(manifest.state, rng)))
    else:
        file = rng.choice([path for path in sorted(path.rglob("*")) if path.is_file() and path.name != "manifest.json"])
        file.write_bytes(spoil_bytes(file.read_bytes(), rng))
        reseal(path)
    if rng.random() < 0.5:
        return ["generate", folder / "run", base / "0.png", "--prompt=what?", "--max-new-tokens=2"]
    more = ["--scheduler.name=constant", "--train.max_steps=3", "--eval.at_end=false"]
    return ["train", base / "job.toml", f"--run.dir={folder}/run", *more]


def _encoded(manifest: Any, state: Any) -> bytes:
    try:
        return replace(manifest, state=state).encode()
    except CheckpointError:  # no JSON
        return replace(manifest, state={"step": "x"}).encode()


def rows(base: Path, folder: Path, rng: random.Random) -> list[object]:
    found = rows_of(base)
    if rng.random() < 0.5:
        found[rng.randrange(len(found))] = spoil_value(found[0], rng)
        text = "".join(json.dumps(row) + "\n" for row in found).encode()
    else:
        text = spoil_bytes("".join(json.dumps(row) + "\n" for row in found).encode(), rng)
    (folder / "train.jsonl").write_bytes(text)
    return ["data", "check", base / "job.toml", f"--data.path={folder}/train.jsonl", f"--data.root={base}", "--data.max_bad_fraction=0.5"]


def tars(base: Path) -> None:
    make_job(base)
    with tarfile.open(base / "shard.tar", "w") as tar:
        for number, row in enumerate(rows_of(base)):
            members = {"png": (base / row["image"]).read_bytes(), "txt": row["answer"].encode()}
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tar(base: Path, folder: Path, rng: random.Random) -> list[object]:
    (folder / "shard.tar").write_bytes(spoil_bytes((base / "shard.tar").read_bytes(), rng))
    return _check(base, folder, "webdataset", "shard.tar")


def parquets(base: Path) -> None:
    make_job(base)
    found = [{**row, "image": {"bytes": (base / row["image"]).read_bytes(), "path": None}} for row in rows_of(base)]
    datasets.Dataset.from_list(found).to_parquet(base / "rows.parquet")


def parquet(base: Path, folder: Path, rng: random.Random) -> list[object]:
    (folder / "rows.parquet").write_bytes(spoil_bytes((base / "rows.parquet").read_bytes(), rng))
    return _check(base, folder, "hf_dataset", "rows.parquet")


def _check(base: Path, folder: Path, source: str, name: str) -> list[object]:
    text = (base / "job.toml").read_text().replace('source = "jsonl"', f'source = "{source}"')
    without = ("path = ", "eval_path", *(["prompt_column"] if source == "webdataset" else []))
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(without))
    (folder / "job.toml").write_text(text.replace("[data]\n", f'[data]\npath = "{folder / name}"\n'))
    return ["data", "check", folder / "job.toml"]


def model(base: Path, folder: Path, rng: random.Random) -> list[object]:
    shutil.copytree(base / "llava", folder / "llava")
    file = folder / "llava" / rng.choice(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(json.dumps(spoil_value(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(spoil_bytes(file.read_bytes(), rng))
    return ["import", folder / "llava", folder / "out", "--no-verify"]


def talks(base: Path) -> None:
    make_job(base)
    (base / "words").mkdir()
    write_tokenizer(base / "words", False, sorted({token for family in FAMILIES.values() for token in family.specials} - set(SPECIAL)))


def template(base: Path, folder: Path, rng: random.Random) -> list[object]:
    shutil.copytree(base / "words", folder / "words")
    text = rng.choice(list(FAMILIES.values())).template
    (folder / "words" / "chat_template.jinja").write_bytes(spoil_bytes(text.encode(), rng))
    return ["data", "check", base / "job.toml", "--data.template=chat", f"--data.tokenizer={folder}/words"]


CACHED = ["--scheduler.name=constant", "--train.max_steps=2", "--eval.at_end=false", "--vlm.freeze=[]"]


def caches(base: Path) -> None:
    trained(base)
    assert call("train", base / "job.toml", *CACHED, f"--run.dir={base}/other", f"--data.images.cache_dir={base}/images").code == 0


def cache(base: Path, folder: Path, rng: random.Random) -> list[object]:
    shutil.copytree(base / "images", folder / "images")
    found = [path for path in sorted((folder / "images").rglob("*")) if path.is_file()]
    for file in rng.sample(found, min(4, len(found))):
        file.write_bytes(spoil_bytes(file.read_bytes(), rng) if rng.random() < 0.7 else rng.choice(found).read_bytes())
    return ["train", base / "job.toml", *CACHED, f"--run.dir={folder}/run", f"--data.images.cache_dir={folder}/images"]


def same_weights(base: Path, folder: Path) -> bool:
    assert_same_tensors(tensors(folder / "run"), tensors(base / "other"))
    return True


KINDS = {
    "TOML, trained for two steps": Kind(make_job, toml),
    "checkpoints with checksums made anew": Kind(trained, checkpoint),
    "rows of a JSONL file": Kind(make_job, rows),
    "tars": Kind(tars, tar),
    "Parquet files": Kind(parquets, parquet),
    "directories of transformers": Kind(lambda base: save("llava", base / "llava"), model),
    "chat templates": Kind(talks, template),
    "entries of the image cache": Kind(caches, cache, same_weights),
}


# ---- the judge -------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A command took more than ``SECONDS``."""


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, base: Path, folder: Path, seed: str) -> tuple[str, str]:
    """ "refused", "right", "silent", "traceback" or "hang", and what there is to read about it."""
    argv: list[object] = kind.spoil(base, folder, random.Random(seed))
    try:
        with limited():
            ended: Ended = call(*argv)
    except Hang:
        return "hang", " ".join(map(str, argv))
    except Exception:
        return "traceback", traceback.format_exc(limit=-4)
    if ended.code == 0:
        try:
            return ("right" if kind.right(base, folder) else "silent"), ""
        except AssertionError as error:
            return "silent", str(error)
    if ended.code in (2, 3) and ended.err.count("Traceback") == 0:
        return "refused", ""
    return "traceback", ended.err


@pytest.mark.parametrize("name", KINDS)
def test_junk(name: str, tmp_path: Path, observe: Observe, request: pytest.FixtureRequest) -> None:
    kind, count = KINDS[name], int(request.config.getoption("--fuzz", default=20) or 20)
    (base := tmp_path / "base").mkdir()
    kind.make(base)
    found: Counter[str] = Counter()
    told: list[str] = []
    for number in range(count):
        folder, seed = tmp_path / "one", f"{name} {number}"
        folder.mkdir()
        what, text = outcome(kind, base, folder, seed)
        found[what] += 1
        if what not in ("refused", "right"):
            told.append(f"{what} ({seed}): {text}")
        shutil.rmtree(folder)
    counts = ", ".join(f"{found[what]} {what}" for what in ("refused", "right", "traceback", "hang", "silent"))
    observe(f"junk: {count} {name}", counts, None)
    print(f"{name}: {counts}")
    assert not told, "\n".join(told)
