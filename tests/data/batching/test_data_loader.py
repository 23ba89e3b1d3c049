from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from kempnerforge.config.training import TrainConfig
from kempnerforge.data import Batch, Encoder, Sample, Text, build_loader
from kempnerforge.data.batching.loader import Loader, lost_worker
from kempnerforge.data.batching.pack import Sizes
from tests.data.samples import assert_same_batch
from tests.training.tiny import make_job

MakeEncoder = Callable[..., Encoder]


def loader(source: Any, encoder: Encoder, *, batch_size: int = 8, accum: int = 1, **kwargs: Any) -> Iterable[Batch]:
    train_cfg = TrainConfig(batch_size=batch_size, grad_accum_steps=accum, seed=3)
    return build_loader(source, encoder, cfg=encoder.cfg, layout=encoder.layout, train_cfg=train_cfg, **kwargs)


@pytest.fixture
def flawed(pictures: list[Sample]) -> list[Sample | None]:
    """Pictures with rows that cannot be used: no row, no image, no answer; and texts that do not all fit."""
    broken = Sample("broken", (b"zz",), (Text("", "red"),))
    mute = Sample("mute", pictures[0].images, (Text("what?", ""),))
    return [*pictures, None, broken, mute]


@pytest.mark.parametrize("batching", ["pad", "group", "pack"])
def test_workers_and_resume_give_the_same_stream(
    list_source: Any, make_encoder: MakeEncoder, flawed: list[Sample | None], batching: str
) -> None:
    source = list_source(flawed)
    reference = list(islice(loader(source, make_encoder(batching=batching), accum=2), 20))
    assert any(batch.skipped for batch in reference)
    for workers, start in ((0, 4), (2, 0), (2, 7)):
        encoder = make_encoder(batching=batching, num_workers=workers)
        resumed = list(islice(loader(source, encoder, accum=2, start_step=start), 20 - 2 * start))
        assert len(resumed) == 20 - 2 * start
        for expected, batch in zip(reference[2 * start :], resumed, strict=True):
            assert_same_batch(expected, batch)


@pytest.mark.parametrize(("world", "accum"), [(2, 1), (2, 2), (4, 1), (1, 4)])
def test_sharing_keeps_the_rows_of_a_step(
    list_source: Any, make_encoder: MakeEncoder, flawed: list[Sample | None], world: int, accum: int
) -> None:
    def rows(world: int, accum: int) -> list[list[Any]]:
        ranks = [iter(loader(list_source(flawed), make_encoder(), accum=accum, rank=r, world=world)) for r in range(world)]
        steps = []
        for _ in range(6):
            batches = [next(rank) for _ in range(accum) for rank in ranks]
            names = [name for batch in batches for name in batch.sample_names]
            tokens = [row[row_ids >= 0].tolist() for b in batches for row, row_ids in zip(b.input_ids, b.sample_ids, strict=True)]
            steps.append([names, tokens, [bad for batch in batches for bad in batch.skipped]])
        return steps

    assert rows(world, accum) == rows(1, 1)


def test_unusable_samples_are_replaced_and_reported(list_source: Any, make_encoder: MakeEncoder, flawed: list[Sample | None]) -> None:
    source = list_source(flawed)
    steps = 27  # 8 epochs of 27 rows
    batches = list(islice(loader(source, make_encoder()), steps))
    skipped = [bad for batch in batches for bad in batch.skipped]
    reasons = dict(skipped)
    assert set(reasons) == {"list/train[24]", "list/train[25]", "list/train[26]"}
    assert reasons["list/train[24]"] == "row 24 is broken"
    assert "sample broken: image 2 bytes: not an image" in reasons["list/train[25]"]
    assert reasons["list/train[26]"] == "sample mute: empty answer"
    assert len(skipped) >= 3 * 8
    assert all(len(batch.sample_names) == 8 for batch in batches)


def test_nothing_usable_is_an_error(list_source: Any, make_encoder: MakeEncoder) -> None:
    with pytest.raises(ValueError, match="data: 8 samples in a row cannot be used, the last because: row . is broken; "):
        next(iter(loader(list_source([None] * 8), make_encoder())))


def test_padding_modes(list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample]) -> None:
    widths = {}
    for batching, by in (("pad", "characters"), ("group", "characters"), ("group", "positions")):
        encoder = make_encoder(max_text_len=200, seq_len=202, pad_to=202, batching=batching, group_by=by)
        batches = list(islice(loader(list_source(pictures), encoder, batch_size=4), 6))
        widths[batching, by] = [batch.input_ids.shape[1] for batch in batches]
        assert sum(batch.useful_tokens for batch in batches) == sum(encoder.encode(s, 0).table.shape[1] for s in pictures)
    assert set(widths["pad", "characters"]) == {202}
    assert max(widths["group", "characters"]) < 202
    assert len(set(widths["group", "characters"])) > 1
    assert sum(widths["group", "positions"]) <= sum(widths["group", "characters"])
    lengths = sorted(encoder.encode(s, 0).table.shape[1] for s in pictures)
    assert sorted(widths["group", "positions"]) == lengths[3::4], "four rows of like length each"


@pytest.mark.parametrize(("batching", "most"), [("pad", 8), ("group", 32 * 8)])
def test_training_starts_before_all_is_read(
    list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample], batching: str, most: int
) -> None:
    read: set[int] = set()

    class Watched(Sequence[Sample]):
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: Any) -> Any:
            read.add(index)
            return pictures[index % len(pictures)]

    next(iter(loader(list_source(Watched()), make_encoder(batching=batching))))
    assert len(read) == most


def test_few_samples_fill_a_large_batch(list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample]) -> None:
    batch = next(iter(loader(list_source(pictures[:8]), make_encoder(), batch_size=32)))
    assert sorted(batch.sample_names) == sorted(s.id for s in pictures[:8] for _ in range(4))


def test_global_random_state_is_left_alone(list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample]) -> None:
    before = torch.get_rng_state()
    list(islice(loader(list_source(pictures), make_encoder(num_workers=1)), 2))
    list(islice(loader(list_source(pictures), make_encoder()), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_worker_arrives(list_source: Any, make_encoder: MakeEncoder) -> None:
    with pytest.raises(ValueError, match="^data: 8 samples in a row cannot be used"):
        next(iter(loader(list_source([None] * 8), make_encoder(num_workers=1))))


def test_slow_libraries_are_not_imported() -> None:
    code = "import sys, kempnerforge.data; print([m for m in ('transformers', 'datasets', 'pandas', 'easy_vqa') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [{"batching": "pack"}, {"group_by": "positions"}])
def test_sizes_are_kept_once(
    list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample], monkeypatch: pytest.MonkeyPatch, cfg: dict[str, Any]
) -> None:
    made: list[object] = []
    init = Sizes.__init__
    monkeypatch.setattr(Sizes, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    assert next(iter(loader(list_source(pictures), make_encoder(**cfg)))).num_targets
    assert len(made) == 1


def test_workers_leave_signals_to_the_main_process(list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample]) -> None:
    """What reaches a whole group (``timeout``, a scheduler, Ctrl-C) ends no worker, and the main process sees signals again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    others = set(multiprocessing.active_children())
    batches = iter(loader(list_source(pictures), make_encoder(num_workers=1)))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid or 0, number)
    for _ in range(6):  # more than was ready before
        next(batches)
    assert worker.is_alive() and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


class EndsWithANote:
    """Garbage that only the collector finds; it notes the process that has collected it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / f"{os.getpid()}").touch()


def test_workers_do_not_end_objects_of_the_main_process(
    list_source: Any, make_encoder: MakeEncoder, pictures: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with threads or children of their own, such as loaders of earlier stages, would crash there."""
    source = list_source(pictures)
    read = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, index: (gc.collect(), read(self, index))[1])
    gc.disable()
    try:
        EndsWithANote(tmp_path)
        next(iter(loader(source, make_encoder(num_workers=1))))
        assert not [*tmp_path.iterdir()]
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())] and not gc.get_freeze_count()


def test_a_program_with_workers_ends(tmp_path: Path) -> None:
    """A loop of the user's own, which stops in the middle of an iteration that is still held."""
    program = f"""
from kempnerforge.config import load_config
from kempnerforge.training.setup import assemble
assembly = assemble(load_config({str(make_job(tmp_path))!r}, ["--data.num_workers=2"]))
batches = assembly.data.batches(assembly.stages[0], 0)
print(next(batches).num_targets)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout) > 0


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "data worker 12 is killed by signal: Killed; .*memory"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "data worker 12, 13 exited unexpectedly; .*memory"),
        ("DataLoader worker (pid 12) is killed by signal: Segmentation fault. ", "data worker 12 is killed by signal: Segmentation fault$"),
        ("Caught KeyError in DataLoader worker process 0.", "$"),
    ],
)
def test_a_lost_worker_is_told_from_an_error_in_one(message: str, said: str) -> None:
    assert re.match(said, lost_worker(RuntimeError(message)))


def test_a_transfer_that_breaks_off_is_a_lost_worker() -> None:
    """An error that a worker caught keeps its class; one on the way from it is its end."""

    def broken(error: Exception) -> Any:
        yield from ()
        raise error

    for error, kind in (
        (EOFError(), RuntimeError),
        (FileNotFoundError(2, "x"), RuntimeError),
        (OSError("Caught OSError in worker"), OSError),
    ):
        with pytest.raises(kind):
            list(Loader(broken(error), workers=1))
    with pytest.raises(EOFError):
        list(Loader(broken(EOFError())))
