"""Mixtures: shares, phases, templates and splits of the parts; and exact resume of everything at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge.config import ConfigError, load_config
from kempnerforge.config.data import DataConfig, JsonlConfig, TextConfig
from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Batch, Encoder, Layout, SampleError, Tokenizer, build_loader, build_source
from kempnerforge.data.sources.hf_stream import HFStreamConfig
from kempnerforge.data.sources.mixture import MixtureConfig, PhaseConfig
from tests.data.samples import assert_same_batch, built
from tests.dist import ROOT

SIZES = (40, 25, 12)
SHARES = (0.5, 0.3, 0.2)


def write_rows(path: Path, count: int, image: str = "", answer: str = "") -> str:
    rows = [{"image": image or None, "answer": (answer or f"{path.stem} ") + "and on " * (k % 5) + str(k)} for k in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def parts(tmp_path: Path, png: Callable[..., bytes]) -> list[DataConfig]:
    """Pictures, text-only rows with a template of their own, and running text."""
    (tmp_path / "a.png").write_bytes(png((200, 1, 2)))
    (tmp_path / "words.txt").write_text("red blue yes no\n" * 60)
    held_out = write_rows(tmp_path / "held_out.jsonl", 3)
    return [
        JsonlConfig(path=write_rows(tmp_path / "pictures.jsonl", SIZES[0], "a.png")),
        JsonlConfig(path=write_rows(tmp_path / "notes.jsonl", SIZES[1]), eval_path=held_out, answer_template="{answer}!"),
        TextConfig(path=str(tmp_path / "words.txt")),
    ]


def encoder_for(cfg: DataConfig, tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer, cfg, Layout(2, 8, 32, 64, 40), seed=0)


def batches(cfg: DataConfig, tokenizer: Tokenizer, *, size: int = 12, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Batch]:
    encoder, train_cfg = encoder_for(cfg, tokenizer), TrainConfig(batch_size=size, seed=3)
    source = built(cfg, tokenizer=tokenizer)
    return iter(
        build_loader(source, encoder, cfg=cfg, layout=encoder.layout, train_cfg=train_cfg, rank=rank, world=world, start_step=start)
    )


def drawn(cfg: MixtureConfig, tokenizer: Tokenizer, steps: int, size: int = 12) -> list[list[int]]:
    """The parts of the samples of each step."""
    source = built(cfg, tokenizer=tokenizer)
    train_cfg = TrainConfig(batch_size=size, seed=3)
    encoder = encoder_for(cfg, tokenizer)
    loader = build_loader(source, encoder, cfg=cfg, layout=encoder.layout, train_cfg=train_cfg)
    return [batch.parts for batch, _ in zip(loader, range(steps), strict=False)]


# ---- the source ---------------------------------------------------------------------------------------------------------


def test_parts_lie_one_after_the_other(parts: list[DataConfig], tokenizer: Tokenizer, tmp_path: Path) -> None:
    cfg = MixtureConfig(parts=parts)
    assert cfg.sections() == parts and not cfg.needs_images
    source = built(cfg, tokenizer=tokenizer)
    windows = len(built(parts[2], tokenizer=tokenizer))
    assert len(source) == 40 + 25 + windows and windows > 5
    assert [source[k].part for k in (0, 39, 40, 64, 65, len(source) - 1)] == [0, 0, 1, 1, 2, 2]
    assert [source.part(k) for k in (0, 39, 40, 64, 65, len(source) - 1)] == [0, 0, 1, 1, 2, 2]
    assert source[41].id == "notes.jsonl:2" and source[41].texts[0].answer == "notes and on 1"
    assert [source.num_images(k) for k in (3, 50)] == [1, 0] and source.length(41) == len("notes and on 1")
    assert source.length(65) == 4 * 24  # a window has tokens, the others characters
    assert (source.peers(3), source.peers(50), source.peers(65)) == (range(40), range(40, 65), range(65, len(source)))
    with pytest.raises(IndexError):
        source[len(source)]


def test_each_part_has_its_own_templates(parts: list[DataConfig], tokenizer: Tokenizer) -> None:
    cfg = MixtureConfig(parts=parts)
    source, encoder = built(cfg, tokenizer=tokenizer), encoder_for(cfg, tokenizer)
    trained = [tokenizer.decode([int(t) for t in encoder.encode(source[k], 0).table[2 - 1] if t >= 0]) for k in (0, 40)]
    assert "!" not in trained[0] and "notes 0!" in trained[1]
    assert "notes 0!" in list(built(cfg).corpus()) and "pictures 0" in list(built(cfg).corpus())


def test_held_out_are_the_parts_that_have_some(parts: list[DataConfig]) -> None:
    held_out = built(MixtureConfig(parts=parts), "test")
    assert [held_out[k].part for k in range(len(held_out))] == [1, 1, 1]
    assert build_source(MixtureConfig(parts=parts[:1]), "test") is None


def test_a_bad_sample_names_its_part(parts: list[DataConfig], tmp_path: Path) -> None:
    write_rows(tmp_path / "pictures.jsonl", 2, "../a.png")
    with pytest.raises(SampleError, match=r"parts\[0\]: pictures.jsonl:1: .* leaves the data root"):
        built(MixtureConfig(parts=parts))[0]


def test_a_part_without_data_is_named(parts: list[DataConfig], tmp_path: Path) -> None:
    parts[1] = JsonlConfig(path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"data.parts\[1\]: .*nowhere.jsonl"):
        build_source(MixtureConfig(parts=parts), "train")


def test_the_fingerprint_is_that_of_all_parts(parts: list[DataConfig], tmp_path: Path) -> None:
    before = built(MixtureConfig(parts=parts)).fingerprint()
    assert built(MixtureConfig(parts=parts)).fingerprint() == before
    write_rows(tmp_path / "notes.jsonl", SIZES[1], answer="other ")
    assert built(MixtureConfig(parts=parts)).fingerprint() != before


# ---- what is drawn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["pad", "group"])
def test_three_sources_have_their_shares_within_one_sample(parts: list[DataConfig], tokenizer: Tokenizer, batching: str) -> None:
    """At every step; without grouping, which sorts inside of windows, after every sample."""
    seen = drawn(MixtureConfig(parts=parts, weights=list(SHARES), batching=batching), tokenizer, 64, size=11)
    flat = np.array([part for step in seen for part in step])
    ends = range(1, len(flat) + 1) if batching == "pad" else range(32 * 11, len(flat) + 1, 32 * 11)
    for end in ends:
        assert np.abs(np.bincount(flat[:end], minlength=3) - end * np.array(SHARES)).max() < 1


def test_weights_by_size_and_temperature(parts: list[DataConfig], tokenizer: Tokenizer) -> None:
    def shares(**keys: Any) -> np.ndarray:
        source = built(MixtureConfig(parts=parts[:2], **keys))
        return np.bincount([source.part(k) for k in source.order(0).indices(0, 6500)]) / 6500

    sizes = np.array(SIZES[:2])
    assert shares() == pytest.approx(sizes / 65, abs=1 / 6500)
    assert shares(temperature=2.0) == pytest.approx(sizes**0.5 / sum(sizes**0.5), abs=2e-4)
    assert shares(temperature=1e6) == pytest.approx([0.5, 0.5], abs=2e-4)


def test_phases_change_the_shares_at_their_step(parts: list[DataConfig], tokenizer: Tokenizer) -> None:
    phases = [PhaseConfig(3, [0, 1, 0]), PhaseConfig(7, [1, 0, 3])]
    for batching in ("pad", "group"):
        cfg = MixtureConfig(parts=parts, weights=[1, 1, 0], phases=phases, batching=batching)
        counts = [Counter(step) for step in drawn(cfg, tokenizer, 39)]
        assert sum(counts[:3], Counter()) == {0: 18, 1: 18}
        assert counts[3:7] == [Counter({1: 12})] * 4
        assert sum(counts[7:], Counter()) == {0: 96, 2: 288}


def test_with_packs_a_phase_begins_with_a_window(parts: list[DataConfig], tokenizer: Tokenizer) -> None:
    """Not before its step, soon after it, and at once for good."""
    cfg = MixtureConfig(parts=parts[:2], weights=[1, 0], phases=[PhaseConfig(5, [0, 1])], batching="pack")
    seen = drawn(cfg, tokenizer, 60, size=2)
    first = next(step for step, parts in enumerate(seen) if 1 in parts)
    assert 5 <= first < 50 and all(set(parts) == {1} for parts in seen[first + 1 :])


def test_bad_samples_change_no_shares(parts: list[DataConfig], tokenizer: Tokenizer, tmp_path: Path) -> None:
    cfg = MixtureConfig(parts=parts, weights=[2, 1, 0], batching="pad")
    stream = batches(cfg, tokenizer)
    (tmp_path / "pictures.jsonl").write_text((tmp_path / "pictures.jsonl").read_text().replace("a.png", "b.png", 20))
    taken = [next(stream) for _ in range(5)]
    assert sum(len(batch.skipped) for batch in taken) > 5
    assert [Counter(batch.parts) for batch in taken] == [Counter({0: 8, 1: 4})] * 5


# ---- resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["pad", "group", "pack"])
def test_resume_anywhere_with_workers_and_other_ranks(parts: list[DataConfig], tokenizer: Tokenizer, tmp_path: Path, batching: str) -> None:
    """One rank, then two with workers, then one: rows, labels and augmented pixels are those of a run that never stopped. The parts are in
    the middle of epochs, a streamed one in the middle of a file, packs in the middle of windows.
    """
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "stream").mkdir()
    for number in range(2):
        pq.write_table(pa.table({"answer": [f"row {number} {k}" for k in range(21)]}), tmp_path / "stream" / f"{number}.parquet")
    parts[0].images = ImagesConfig(augment=AugmentConfig(flip=0.5, brightness=0.5))
    streamed = HFStreamConfig(path=str(tmp_path / "stream"), image_column="", shuffle_buffer=25)
    keys: dict[str, Any] = {"parts": [*parts, streamed], "weights": [3, 1, 1, 2], "phases": [PhaseConfig(4, [1, 1, 1, 1])]}

    def taken(start: int, stop: int, workers: int = 0, world: int = 1) -> list[list[Batch]]:
        cfg = MixtureConfig(**keys, batching=batching, num_workers=workers)
        ranks = [batches(cfg, tokenizer, rank=rank, world=world, start=start) for rank in range(world)]
        return [[next(rank) for rank in ranks] for _ in range(start, stop)]

    whole = taken(0, 11)
    for (expected,), (batch,) in zip(whole[7:], taken(7, 11), strict=True):
        assert_same_batch(expected, batch)
    for (expected,), shared in zip(whole[3:7], taken(3, 7, workers=2, world=2), strict=True):
        assert expected.sample_names == [name for batch in shared for name in batch.sample_names]
        assert expected.parts == [part for batch in shared for part in batch.parts]
        assert expected.images is not None and torch.equal(expected.images, torch.cat([b.images for b in shared if b.images is not None]))
        assert expected.num_targets == sum(batch.num_targets for batch in shared)
    assert {part for (batch,) in whole for part in batch.parts} == {0, 1, 2, 3}
    pictures = torch.cat([batch.images for (batch,) in whole if batch.images is not None])
    assert len(pictures.flatten(1).unique(dim=0)) > 20  # all of one file


# ---- config -------------------------------------------------------------------------------------------------------------

TOML = """
[vlm]
arch = "joint_decoder"
max_text_len = 64
[data]
source = "mixture"
{keys}
[[data.parts]]
source = "easy_vqa"
form = "captions"
[[data.parts]]
{second}
[train]
max_steps = 5
"""
QUESTIONS = 'source = "easy_vqa"'


def load(tmp_path: Path, keys: str = "", second: str = QUESTIONS) -> MixtureConfig:
    path = tmp_path / "job.toml"
    path.write_text(TOML.format(keys=keys, second=second))
    cfg = load_config(path).data
    assert isinstance(cfg, MixtureConfig)
    return cfg


def test_a_mixture_in_toml(tmp_path: Path) -> None:
    cfg = load(tmp_path, "weights = [1, 3]\nphases = [{start_step = 2, weights = [0, 1]}]")
    assert [part.source for part in cfg.parts] == ["easy_vqa", "easy_vqa"] and cfg.needs_images
    assert cfg.phases == [PhaseConfig(2, [0.0, 1.0])]


@pytest.mark.parametrize(
    ("keys", "second", "message"),
    [
        ("", 'source = "mixture"', "a mixture needs at least one"),
        ("", 'source = "mixture"\n[[data.parts.parts]]\nsource = "easy_vqa"', r"parts\[1\].source = 'mixture': a mixture of mixtures"),
        ("", QUESTIONS + '\ntokenizer = "x"', r"parts\[1\].tokenizer = 'x': holds for the whole job; set it in \[data\]"),
        ("", QUESTIONS + "\nnum_workers = 1", r"parts\[1\].num_workers = 1: holds for the whole job"),
        ("", QUESTIONS + '\nfrom = "captions"', r"\[data\] parts\[1\].from = \"captions\": unknown key; did you mean 'form'"),
        (
            'answer_template = "{answer}."',
            QUESTIONS,
            r"answer_template = '{answer}.': a mixture does not read it; set it in \[\[data.parts\]\]",
        ),
        ("weights = [1]", QUESTIONS, r"weights = \[1.0\]: must be 2, one for each of parts"),
        ("weights = [1, -1]", QUESTIONS, r"weights = \[1.0, -1.0\]: none may be below 0"),
        ("weights = [0, 0]", QUESTIONS, "not all 0"),
        ("temperature = 0", QUESTIONS, r"temperature = 0.0: must be > 0"),
        ("temperature = 2\nweights = [1, 1]", QUESTIONS, "temperature = 2.0: is for weights by size"),
        ("phases = [{start_step = 0, weights = [1, 1]}]", QUESTIONS, r"phases\[0\].start_step = 0: must be >= 1; what holds from step 0"),
        ("phases = [{start_step = 1, weights = [1]}]", QUESTIONS, r"phases\[0\].weights = \[1.0\]: must be 2"),
        (
            "phases = [{start_step = 4, weights = [1, 1]}, {start_step = 4, weights = [1, 0]}]",
            QUESTIONS,
            r"phases\[1\].start_step = 4: must be more than that before it, 4",
        ),
    ],
)
def test_what_makes_no_mixture_is_refused(tmp_path: Path, keys: str, second: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, keys, second)


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parts = \[\]: a mixture needs at least one"):
        MixtureConfig()


@pytest.mark.parametrize("name", ["mixture", "hf_stream"])
def test_the_example_loads(name: str) -> None:
    assert load_config(ROOT / "configs" / "data" / f"{name}.toml").data.source == name


def test_how_much_may_be_bad_holds_for_the_parts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 20)
    Path(path).write_text(Path(path).read_text() + "no json\n")
    with pytest.raises(ValueError, match="bad line"):
        built(MixtureConfig(parts=[JsonlConfig(path=path)]))
    assert len(built(MixtureConfig(parts=[JsonlConfig(path=path)], max_bad_fraction=0.2))) == 21
